"""Ahead-of-time compilation of what calls of the kernels would launch, for a chip that need not be there.

The public functions run on meta tensors (`launches`), so what is compiled has the types, divisibilities and constants
of a real launch. A spill, too much shared memory, serialised matrix instructions or an epilogue that costs too much
show here, before anybody runs on the chip.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tokensel_kernels import clocks
from tokensel_kernels.attention_mass import attention_mass
from tokensel_kernels.block_grad import write_block_gradient
from tokensel_kernels.launches import META, Launch, written_down
from tokensel_kernels.logits_stats import write_logits_sums
from tokensel_kernels.machine_code import Instruction, TensorLoop, by_pipe, byte_loop, disassemble, tensor_loops
from tokensel_kernels.shapes import Shape, shape_named
from tokensel_kernels.tiles import interpreting
from tokensel_kernels.vocab_grad import selected_gradients
from tokensel_kernels.vocab_stats import hidden_stats

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = {"sm_80": 108, "sm_90": clocks.PROCESSORS, "sm_100": 148, "gfx942": 304}
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program
ROWS = 8192  # tokens of a step, and of a sequence
UNUSUAL = ("unaligned", "ragged vocabulary")  # begin the options of what is compiled, but not estimated
HEAD_SIZES = (64, 96, 128, 192, 256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_INSTRUCTIONS = {
    "WGMMA": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "MMA": "mma.sync",
    "MFMA": "v_mfma",
    "TMA": "cp.async.bulk.tensor",
}


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one kernel on one tile, of one variant that a launch can choose."""

    kernel: str
    case: str
    arch: str
    element: str
    shape: str  # the model whose call was compiled
    registers: int  # a thread
    spilled: int  # stores to local memory in the machine code; spilled registers on AMD
    shared: int  # bytes a program
    shared_limit: int
    narrow_offsets: int  # products with a stride in 32 bits, where a matrix may hold more than 2^31 elements
    instructions: dict[str, int]  # in the program text: matrix instructions by kind, TMA loads
    # Of the loop that takes the time, on NVIDIA's chips: by pipe, {"step": ..., "around": ...}
    pipes: dict[str, dict[str, int]]
    flattened: bool | None  # the loop goes on to the next tile's loads before this one is done with
    wait: int | None  # products in flight that a step leaves
    serialised: bool  # some loop waits after each matrix instruction
    # On sm_90 in bfloat16 (`clocks`), None elsewhere
    estimate: dict[str, float] | None
    ratio_low: float | None
    ratio_high: float | None


@dataclass(frozen=True)
class _Call:
    """A call of a public function, and the options that tell it from others."""

    options: str
    run: Callable[[], object]


def _calls(shape: Shape, dtype: torch.dtype, every: bool) -> Iterator[_Call]:
    """The calls that launch each option alone and all of them together, or `every` combination."""
    N, V, D = ROWS, shape.vocabulary, shape.hidden
    half = dtype != torch.float32

    def tensor(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=like, device=META)

    x, w, bias = tensor(N, D), tensor(V, D), tensor(V)
    labels, lse, coefficient = tensor(N, like=torch.int64), tensor(N, like=torch.float32), tensor(N, like=torch.float32)
    heads = {"": (None, None), "bias": (bias, None), "softcap": (None, 30.0), "bias, softcap": (bias, 30.0)}
    alone = [("", False), ("bias", False), ("softcap", False), ("", True), ("bias, softcap", True)]
    ends = [alone[0], alone[-1]]
    combinations = [(name, entropy) for name in heads for entropy in (False, True)]
    for models, several in ((2, alone if half else ends), (1, ends if half else [])):
        for name, entropy in combinations if every else several:
            head = {"bias": heads[name][0], "softcap": heads[name][1], "logit_scale": 1.0, "ignore_index": -100}
            of_hidden = functools.partial(hidden_stats, [(x, w)] * models, labels, entropy=entropy, **head)
            logits = [w.new_empty(N, V)] * models
            for wanted, count in (("entropy", 5), ("every statistic", 8)) if entropy else (("", 3),):
                options = ", ".join(filter(None, [("one model", "two models")[models - 1], name, wanted]))
                yield _Call(options, functools.partial(of_hidden, more=count == 8))
                if name in ("", "bias, softcap"):
                    sums = tensor(count, models, N, like=torch.float32)
                    rows = functools.partial(write_logits_sums, logits, labels, sums, label_logit=sums[0], **head)
                    yield _Call(options, rows)
    rows = (labels, coefficient, lse)
    for name, entropy in [(name, False) for name in heads] + [("", True), ("bias, softcap", True)]:
        if not (half or every or name in ("", "bias, softcap")):
            continue
        head = dict(zip(("bias", "softcap"), heads[name], strict=True)) | {"logit_scale": 1.0}
        want = (True, True, head["bias"] is not None)
        terms = tensor(3, N, like=torch.float32) if entropy else None
        options = ", ".join(filter(None, [name, "entropy" * entropy]))
        yield _Call(options, functools.partial(selected_gradients, x, w, *rows, want=want, terms=terms, **head))
        z, dz = tensor(1024, 8192, like=torch.float32), tensor(1024, 8192)
        part = [t[:1024] for t in rows]
        head["bias"] = None if head["bias"] is None else bias[:8192]
        terms = None if terms is None else terms[:, :1024]
        yield _Call(options, functools.partial(write_block_gradient, z, *part, dz, first_column=0, terms=terms, **head))
    position = tensor(1, N, like=torch.int64)
    sinks = tensor(shape.heads, like=torch.float32)
    all_lse = tensor(1, shape.heads, N, like=torch.float32)
    group = shape.heads // shape.key_heads
    plain = {"key_mask": None, "low": None, "prompt_end": None, "window": None, "softcap": None, "sinks": None}
    options = {"key_mask": position > 0, "low": position, "prompt_end": position, "window": 4096}
    options |= {"softcap": 50.0, "sinks": sinks}
    sizes = HEAD_SIZES if half and every else (64, 128, 256) if half else (128,)
    for d in sizes:
        q, k = tensor(1, shape.heads, N, d), tensor(1, shape.key_heads, N, d)
        mass = functools.partial(attention_mass, q, k, position > 0, position > 0, scale=0.1)
        for given in (None, all_lse):
            name = f"head size {d}, group {group}" + ", lse given" * (given is not None)
            yield _Call(name, functools.partial(mass, lse=given, **plain))
            if d == 128:
                yield _Call(f"{name}, all options", functools.partial(mass, lse=given, **options))
    if half:  # rows that begin between two multiples of 16 bytes: no descriptor can read them
        x, w = tensor(N, D - 4), tensor(V, D - 4)
        head = {"bias": None, "softcap": None, "logit_scale": 1.0}
        pair = [(x, w)] * 2
        yield _Call(
            "unaligned", functools.partial(hidden_stats, pair, labels, entropy=False, ignore_index=-100, **head)
        )
        part = (x, w, labels, coefficient, lse)
        yield _Call("unaligned", functools.partial(selected_gradients, *part, want=(True, True, False), **head))
        # a vocabulary whose last block is no whole tile, and no size of it a multiple of 16
        x, w = tensor(N, D), tensor(V + 1, D)
        head = {"softcap": None, "logit_scale": 1.0}
        pair = [(x, w)] * 2
        ragged = functools.partial(hidden_stats, pair, labels, bias=None, ignore_index=-100, **head)
        for number, name in enumerate(("", ", entropy", ", every statistic")):
            yield _Call("ragged vocabulary" + name, functools.partial(ragged, entropy=number > 0, more=number > 1))
        part = (x, w, labels, coefficient, lse)
        ragged = functools.partial(selected_gradients, *part, bias=None, want=(True, True, False), **head)
        yield _Call("ragged vocabulary", ragged)


def _cut(launch: Launch) -> str:
    names = [name for name in ("ROWS", "COLUMNS", "KEYS", "DEPTH", "THREADS", "BLOCK") if name in launch.kwargs]
    return "x".join(str(launch.kwargs[name]) for name in names)


@dataclass(frozen=True)
class _Code:
    """A compiled kernel, taken apart once."""

    registers: int
    spilled: int
    shared: int
    warps: int
    narrow: int
    instructions: dict[str, int]
    loops: list[TensorLoop]
    code: list[Instruction]


def _take_apart(compiled: object) -> _Code:
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    instructions = {name: text.count(code) for name, code in _INSTRUCTIONS.items() if code in text}
    narrow = len(narrow_offsets(compiled.asm["ttir"]))
    code: list[Instruction] = []
    if "cubin" in compiled.asm:
        usage, code = disassemble(compiled.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        # a stack frame is not yet a spill (it may be empty); a store to local memory is
        spilled = sum(i.operation.startswith("STL") for i in code)
    else:
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    warps = compiled.metadata.num_warps
    return _Code(registers, spilled, compiled.metadata.shared, warps, narrow, instructions, tensor_loops(code), code)


def _estimate(launches: list[Launch], code: _Code, shape: Shape) -> clocks.Estimate | None:
    """What the launches of one kernel in a call cost, where there are rules for it."""
    first = launches[0].bound
    N, V, D = ROWS, shape.vocabulary, shape.hidden
    together = clocks.programs_at_once(code.registers, code.shared, code.warps)
    if launches[0].name == "logits_stats" and (loop := byte_loop(code.code)) is not None:
        return clocks.of_bytes(loop, code.warps, first["BLOCKS"] * 16 * first["THREADS"])
    if not code.loops:
        return None
    if launches[0].name == "attention_mass":
        if first["D"] != 128 or shape.head_size != 128:
            return None
        given = first["lse_ptr"] is not None
        cut = (first["ROWS"], first["KEYS"], first["MIXED_KEYS"])
        return clocks.of_attention(code.loops, code.warps, together, cut, shape, N, given)
    rows, columns = first["ROWS"], first["COLUMNS"]
    kept = int(clocks.KEPT * N)
    row_tiles, column_tiles = triton.cdiv(kept, rows), triton.cdiv(D, columns)

    slots = clocks.PROCESSORS * together

    def persistent(tiles: int, depth: int) -> clocks.Work:
        return clocks.Work(tiles, depth, triton.cdiv(tiles, slots) * together, together)

    def product(works: list[clocks.Work], operations: float) -> clocks.Estimate:
        return clocks.of_products(code.loops[0], code.warps, together, (rows, columns), works, operations)

    if launches[0].name == "hidden_stats":
        models = 2 if first["PAIR"] else 1
        works = []
        for launch in launches:
            share, waves = launch.bound["share"] // columns, triton.cdiv(launch.programs, slots) * together
            tiles = launch.programs // launch.bound["splits"] * triton.cdiv(V, columns)
            works.append(clocks.Work(tiles, D, waves * share, waves))
        return product(works, 2.0 * models * N * V * D)
    widths = [launch.bound["width"] for launch in launches]
    operations = 2.0 * kept * V * D
    if launches[0].name == "logits_gradient":
        return product([persistent(row_tiles * triton.cdiv(w, columns), D) for w in widths], operations)
    if launches[0].name == "hidden_gradient":
        return product([persistent(row_tiles * column_tiles, w) for w in widths], operations)
    if launches[0].name == "head_gradient":
        return product([persistent(triton.cdiv(w, rows) * column_tiles, kept) for w in widths], operations)
    return None


def compile_all(arch: str, shape: str = "Llama-3.1-8B", *, every: bool = False) -> Iterator[CompiledKernel]:
    """Compiles what calls on a model's shape would launch on an architecture, each variant once.

    Args:
        every: every combination of options and every head size, not only each alone and all together.

    Raises:
        ValueError: an architecture or shape that is not known, or kernels that were imported for the interpreter.
        RuntimeError: what this version of Triton cannot compile for the architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    sizes = shape_named(shape)
    if interpreting():
        raise ValueError("kernels are interpreted, not compiled, under TRITON_INTERPRET=1; unset it")
    return _compile_calls(arch, shape, sizes, every)


_CODE: dict[int, tuple[object, _Code]] = {}  # of kernels that were compiled already, which Triton hands out again


def _compile_calls(arch: str, shape: str, sizes: Shape, every: bool) -> Iterator[CompiledKernel]:
    seen = set()
    for element, dtype in DTYPES.items():
        for call in _calls(sizes, dtype, every):
            with written_down(arch, PROCESSORS[arch]) as launches:
                call.run()
            for launch in launches:
                compiled = _compile(launch, arch)
                if id(compiled) in seen:
                    continue
                seen.add(id(compiled))
                if id(compiled) not in _CODE:
                    _CODE[id(compiled)] = compiled, _take_apart(compiled)
                code = _CODE[id(compiled)][1]
                alike = [other for other in launches if other.kernel is launch.kernel]
                first = launch is alike[0]
                estimated = first and arch == "sm_90" and element == "bf16" and not call.options.startswith(UNUSUAL)
                estimate = _estimate(alike, code, sizes) if estimated else None
                yield _row(launch, call, code, arch, element, shape, estimate, again=not first)


def _compile(launch: Launch, arch: str) -> object:
    try:
        return launch.compile(ARCHITECTURES[arch])
    except Exception as error:  # whatever a compiler's pass raises: said, and not skipped
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"Triton {triton.__version__} cannot compile {launch.name} ({_cut(launch)}) for {arch}: {reason}"
        ) from error


def _row(
    launch: Launch,
    call: _Call,
    code: _Code,
    arch: str,
    element: str,
    shape: str,
    estimate: clocks.Estimate | None,
    again: bool,
) -> CompiledKernel:
    main = max(code.loops, key=lambda loop: loop.step.get("tensor", 0), default=None)
    pipes = {"step": main.step, "around": main.around} if main else {"around": by_pipe(code.code)}
    if not main and (loop := byte_loop(code.code)) is not None:
        pipes["step"] = loop
    return CompiledKernel(
        kernel=launch.name,
        case=", ".join(part for part in (_cut(launch), call.options, "last block" * again) if part),
        arch=arch,
        element=element,
        shape=shape,
        registers=code.registers,
        spilled=code.spilled,
        shared=code.shared,
        shared_limit=SHARED_LIMIT[arch],
        narrow_offsets=code.narrow,
        instructions=code.instructions,
        pipes=pipes,
        flattened=main.flattened if main else None,
        wait=main.wait if main else None,
        serialised=any(loop.serialised for loop in code.loops),
        estimate=dataclasses.asdict(estimate) if estimate else None,
        ratio_low=estimate.ratio_low if estimate else None,
        ratio_high=estimate.ratio_high if estimate else None,
    )


# In Triton's IR, where every value is assigned once: %name = operation operands : type
_ASSIGNMENT = re.compile(r"^\s*(%[\w$.-]+) = ([\w.]+)\s*(.*)$")
_VALUE = re.compile(r"%[\w$.-]+")
_SAME_VALUE = ("arith.extsi", "tt.splat", "tt.expand_dims", "tt.broadcast")
_STRIDE = re.compile(r"%(\w*stride\w*|S|slab)$")  # S is the stride of what is [B, S], slab of sums


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


def as_row(kernel: CompiledKernel) -> dict:
    """A row for the terminal."""
    instructions = " ".join(f"{name} {count}" for name, count in kernel.instructions.items()) or "-"
    row = {
        name: getattr(kernel, name) for name in ("kernel", "case", "element", "registers", "spilled", "narrow_offsets")
    }
    row |= {
        "shared KiB": f"{kernel.shared / 1024:.0f} of {kernel.shared_limit / 1024:.0f}",
        "instructions": instructions,
    }
    return row | {"serialised": "yes" if kernel.serialised else "no"}


def as_estimate(kernel: CompiledKernel) -> dict:
    """A row of clocks for the terminal, of a kernel that has an estimate."""
    e = kernel.estimate
    if e is None:
        raise ValueError(f"{kernel.kernel} ({kernel.case}) has no estimate")
    return {
        "kernel": kernel.kernel,
        "case": kernel.case,
        "products or bytes": f"{e['main']:,.0f}",
        "beside them": f"{e['beside_low']:,.0f} to {e['beside_high']:,.0f}",
        "fill": f"{e['fill']:,.0f}",
        "waves": f"{e['waves']:.3f}",
        "ratio": f"{kernel.ratio_low:.3f} to {kernel.ratio_high:.3f}",
    }
