"""Ahead-of-time compilation of every kernel and tile, for a chip that need not be there, and what the compiler says.

A spill, too much shared memory or a missing matrix instruction shows here, before anybody runs on the chip.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokensel_kernels.attention_mass import _attention_mass_kernel
from tokensel_kernels.logits_stats import _logits_stats_kernel
from tokensel_kernels.tiles import TILES, attention_rows, interpreting
from tokensel_kernels.vocab_grad import (
    _block_gradient_kernel,
    _gather_rows_kernel,
    _head_gradient_kernel,
    _hidden_gradient_kernel,
    _logits_gradient_kernel,
)
from tokensel_kernels.vocab_stats import _hidden_stats_kernel

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program
HEAD_SIZES = (64, 96, 128, 192, 256)
_ELEMENT = {2: "bf16", 4: "fp32"}
_INTEGERS_64 = ("label_ptr", "order_ptr")
_INSTRUCTIONS = {
    "WGMMA": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "MMA": "mma.sync",
    "MFMA": "v_mfma",
    "TMA": "cp.async.bulk.tensor",
}


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one kernel on one tile."""

    kernel: str
    case: str
    arch: str
    element: str
    registers: int  # a thread
    spilled: int  # stores to local memory in the machine code; spilled registers on AMD
    shared: int  # bytes a program
    shared_limit: int
    narrow_offsets: int  # products with a stride in 32 bits, where a matrix may hold more than 2^31 elements
    instructions: dict[str, int]  # in the program text: matrix instructions by kind, TMA loads


@dataclass(frozen=True)
class _Case:
    kernel: object
    name: str
    size: int  # bytes of an element
    constants: dict
    descriptors: dict[str, tuple[int, int]]  # argument -> block of its TMA descriptor
    skip: tuple[str, ...] = ()  # optional pointers that are not given


def _cases(arch: str) -> Iterator[_Case]:
    for size in _ELEMENT:
        for kind in ("stats", "full_stats"):
            full = kind != "stats"
            tile = TILES[arch][kind][size]
            blocks = {"x": tile.rows, "history_x": tile.rows, "w": tile.columns, "history_w": tile.columns}
            descriptors = {name: (rows, tile.depth) for name, rows in blocks.items()} if tile.tma else {}
            options = {"PAIR": True, "HAS_BIAS": full, "HAS_SOFTCAP": full, "ENTROPY": full}
            name = f"{tile.rows}x{tile.columns}x{tile.depth}, two models" + ", bias, softcap, entropy" * full
            yield _Case(
                _hidden_stats_kernel, name, size, options | tile.constants(), descriptors, () if full else ("bias_ptr",)
            )
        for entropy in (False, True):
            options = {"PAIR": True, "HAS_BIAS": True, "HAS_SOFTCAP": True}
            columns = {"ENTROPY": entropy, "COLUMNS": 4096 // size, "num_warps": 8}
            name = f"{4096 // size} columns, two models" + ", entropy" * entropy
            yield _Case(_logits_stats_kernel, name, size, options | columns, {})
        options = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "COLUMNS": 1024, "num_warps": 8}
        yield _Case(_block_gradient_kernel, "1024 columns, bias, softcap", size, options, {})
        tile = TILES[arch]["gradient"][size]
        descriptors = {"x": (tile.rows, tile.depth), "w": (tile.columns, tile.depth)} if tile.tma else {}
        options = {"HAS_BIAS": True, "HAS_SOFTCAP": True}
        name = f"{tile.rows}x{tile.columns}x{tile.depth}, bias, softcap"
        yield _Case(_logits_gradient_kernel, name, size, options | tile.constants(), descriptors)
        tile = TILES[arch]["matmul"][size]
        name = f"{tile.rows}x{tile.columns}x{tile.depth}"
        by_row = {"dz": (tile.depth, tile.rows), "x": (tile.depth, tile.columns)} if tile.tma else {}
        by_depth = {"dz": (tile.rows, tile.depth), "w": (tile.depth, tile.columns)} if tile.tma else {}
        yield _Case(_hidden_gradient_kernel, name, size, tile.constants(), by_depth)
        yield _Case(_head_gradient_kernel, name, size, {"WANT_BIAS": False} | tile.constants(), by_row, ("dbias_ptr",))
        yield _Case(_gather_rows_kernel, "1024 columns", size, {"ROWS": 128, "COLUMNS": 1024, "num_warps": 4}, {})
        for d in HEAD_SIZES if size == 2 else (128,):
            for lse in (False, True):
                tile = TILES[arch]["attention"][size]
                rows = attention_rows(tile, d)
                constants = {
                    "HAS_LSE": lse, "HAS_SINKS": False, "HAS_SOFTCAP": False, "GROUP": 4, "GROUP_PADDED": 4,
                     "D": d, "D_PADDED": triton.next_power_of_2(d), "ROWS": rows // 4,
                    "KEYS": tile.keys, "PRECISION": tile.precision,
                    "num_warps": tile.warps, "num_stages": tile.stages,
                }  # fmt: skip
                name = f"{rows}x{tile.keys}, head size {d}" + ", lse given" * lse
                missing = ("sinks_ptr",) if lse else ("sinks_ptr", "lse_ptr")
                yield _Case(_attention_mass_kernel, name, size, constants, {}, missing)


def _type_of(name: str, case: _Case) -> str:
    element = _ELEMENT[case.size]
    if name in case.descriptors:
        rows, columns = case.descriptors[name]
        return f"tensordesc<{element}[{rows},{columns}]>"
    if name in _INTEGERS_64:
        return "*i64"
    if name in ("count_ptr", "low_ptr", "prompt_end_ptr"):
        return "*i32"
    if name in ("flags_ptr", "query_ptr"):
        return "*i8"
    if name in ("sums_ptr", "lse_ptr", "coefficient_ptr", "dx_ptr", "mass_ptr"):
        return "*fp32"
    if name == "z_ptr" and case.kernel is _block_gradient_kernel:
        return "*fp32"
    if name.endswith("_ptr") or name in ("x", "w", "history_x", "history_w", "dz"):
        return f"*{element}"
    return "fp32" if name in ("logit_scale", "softcap", "scale") else "i32"


def _compile(case: _Case, arch: str) -> CompiledKernel:
    options = {name: case.constants[name] for name in ("num_warps", "num_stages") if name in case.constants}
    constants = {name: value for name, value in case.constants.items() if name not in options}
    constants |= dict.fromkeys(case.skip)
    names = case.kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else _type_of(name, case) for name in names}
    # torch's tensors begin at 16 bytes, and so do rows, or they are copied
    aligned = [n for n, t in signature.items() if t.startswith("*") or n in ("V", "D", "history_D") or "_stride" in n]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
    source = ASTSource(case.kernel, signature, {(names.index(n),): value for n, value in constants.items()}, attributes)
    compiled = triton.compile(source, target=ARCHITECTURES[arch], options=options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spilled = _resources(compiled)
    instructions = {name: text.count(code) for name, code in _INSTRUCTIONS.items() if code in text}
    name = case.kernel.__name__.strip("_").removesuffix("_kernel")
    shared = compiled.metadata.shared
    narrow = len(narrow_offsets(compiled.asm["ttir"]))
    element = _ELEMENT[case.size]
    resources = (registers, spilled, shared, SHARED_LIMIT[arch])
    return CompiledKernel(name, case.name, arch, element, *resources, narrow, instructions)


# In Triton's IR, where every value is assigned once: %name = operation operands : type
_ASSIGNMENT = re.compile(r"^\s*(%[\w$.-]+) = ([\w.]+)\s*(.*)$")
_VALUE = re.compile(r"%[\w$.-]+")
_SAME_VALUE = ("arith.extsi", "tt.splat", "tt.expand_dims", "tt.broadcast")
_STRIDE = re.compile(r"%(\w*stride\w*|S|N)$")  # S is the stride of what is [B, S], and N of sums


def narrow_offsets(ttir: str) -> list[str]:
    """Lines of Triton's IR that multiply a row by a stride in 32 bits: past 2^31 elements they would wrap around.

    Rows inside a tile (constants and ranges alone) may: their number is small.
    """
    made: dict[str, tuple[str, list[str]]] = {}  # value -> its operation and operands
    lines = []

    def is_stride(value: str) -> bool:
        operation, operands = made.get(value, ("argument", []))
        return is_stride(operands[0]) if operation in _SAME_VALUE else bool(_STRIDE.match(value))

    def inside_a_tile(value: str) -> bool:
        operation, operands = made.get(value, ("argument", []))
        if operation in ("arith.constant", "tt.make_range"):
            return True
        return operation.startswith(("arith.", "tt.")) and bool(operands) and all(map(inside_a_tile, operands))

    for line in ttir.splitlines():
        if assignment := _ASSIGNMENT.match(line):
            value, operation, rest = assignment.groups()
            operands = _VALUE.findall(rest.partition(" : ")[0])
            made[value] = (operation, operands)
            if operation == "arith.muli" and not re.search(r": (i64|tensor<[\dx]*i64>)", rest):
                for stride, row in (operands, operands[::-1]):
                    if is_stride(stride) and not inside_a_tile(row):
                        lines.append(line.strip())
                        break
    return lines


def _resources(compiled) -> tuple[int, int]:
    """(registers, spilled): from cuobjdump, which comes with Triton, or from the code object's metadata."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        (vectors,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
        (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
        return int(vectors), int(spilled)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    # a stack frame is not yet a spill (it may be empty); a store to local memory is
    return int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\bSTL\b", code))


def compile_all(arch: str) -> Iterator[CompiledKernel]:
    """Compiles every kernel and tile for an architecture, one after the other.

    Raises:
        ValueError: an architecture that is not known, or kernels that were imported for the interpreter.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    if interpreting():
        raise ValueError("kernels are interpreted, not compiled, under TRITON_INTERPRET=1; unset it")
    for case in _cases(arch):
        yield _compile(case, arch)


def as_row(kernel: CompiledKernel) -> dict:
    """A row for the terminal."""
    fields = asdict(kernel)
    shared = f"{kernel.shared / 1024:.0f} of {kernel.shared_limit / 1024:.0f}"
    instructions = " ".join(f"{name} {count}" for name, count in kernel.instructions.items()) or "-"
    kept = {name: fields[name] for name in ("kernel", "case", "element", "registers", "spilled", "narrow_offsets")}
    return kept | {"shared KiB": shared, "instructions": instructions}
