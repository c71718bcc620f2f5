"""NVIDIA machine code, counted by pipe: what a loop around matrix instructions executes in every step, and beside it.

An iteration of a loop takes some of its blocks always and others sometimes. Sums of a nested loop and of a flattened
one, where a tile's epilogue hides behind a branch, are thus told apart in the same way.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import triton

# Which pipe an operation goes through: the first pattern that fits. Sources: NVIDIA's "CUDA Binary Utilities", tables
# of Hopper and Blackwell operations, and its Nsight Compute documentation, "Pipelines".
PIPES = {
    "tensor": r"HGMMA|HMMA|UTC\w*MMA|QGMMA|IGMMA",
    "tma": r"UTMA|UBLKCP|UBLKRED",
    "mufu": r"MUFU|I2F$|I2F\.|F2I|F2F\b|F2F\.",
    "fma": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|IMAD",
    "compare_64": r"ISETP\S*\.EX",
    "shuffle": r"SHFL|REDUX|VOTE",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|FENCE|MEMBAR|ARRIVES|UTCBAR|BSSY|BSYNC|NANOSLEEP",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDT|STT",
    "global": r"LDG|STG|LDGSTS|RED\b|RED\.|REDG|ATOMG|ATOM\b|LD\.|ST\.",
    "local": r"LDL|STL",
    "control": r"BRA|EXIT|RET|CALL|JMP|BRX|NOP|ELECT|ACQBULK|CCTL|ERRBAR|YIELD|LDC|LDCU|S2R|S2UR|PREEXIT|DEPBAR",
    "uniform": r"U[A-Z0-9]+|R2UR",
    "alu": r"",  # whatever is left: compare, select, minimum, shift, logic, conversion, integer addition
}
_PIPES = {name: re.compile(pattern) for name, pattern in PIPES.items()}
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@functools.cache
def _pipe_of(operation: str) -> str:
    return next(name for name, pattern in _PIPES.items() if pattern.match(operation))


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate under which it runs, or ""
    operation: str
    operands: str

    @property
    def pipe(self) -> str:
        return _pipe_of(self.operation)

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        found = _TARGET.search(self.operands) if self.operation.startswith("BRA") else None
        return int(found[1], 16) if found else None


def read(sass: str) -> list[Instruction]:
    """The instructions of what `cuobjdump --dump-sass` prints."""
    return [Instruction(int(a, 16), g or "", op, rest.strip()) for a, g, op, rest in _LINE.findall(sass)]


def disassemble(cubin: bytes) -> tuple[str, list[Instruction]]:
    """(resource usage, instructions) by cuobjdump, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = next(line for line in printed.splitlines() if "REG:" in line)
    return usage, read(printed)


@dataclass
class Block:
    """Instructions that run one after the other."""

    code: list[Instruction]
    successors: list[int] = field(default_factory=list)


def blocks_of(code: list[Instruction]) -> list[Block]:
    """The blocks of a program and where each may go on."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0, len(code)}
    for i, instruction in enumerate(code):
        if instruction.target is not None:
            starts |= {place[instruction.target], i + 1}
        elif instruction.operation == "EXIT" and not instruction.guard:
            starts.add(i + 1)
    order = sorted(starts)
    number = {start: n for n, start in enumerate(order)}
    blocks = [Block(code[start:end]) for start, end in itertools.pairwise(order)]
    for n, block in enumerate(blocks):
        last = block.code[-1]
        # a branch on a uniform predicate has it among its operands: BRA.U UP0, 0x...
        always = not last.guard and not re.match(r"!?U?P\w+,", last.operands)
        if last.target is not None:
            block.successors.append(number[place[last.target]])
        ends = last.operation == "EXIT" and not last.guard
        if not ends and not (last.target is not None and always) and n + 1 < len(blocks):
            block.successors.append(n + 1)
    return blocks


def _reached(blocks: list[Block], start: int, within: set[int], without: int | None = None) -> set[int]:
    """Blocks that can be reached from `start`, itself included, by staying inside and off `without`."""
    found: set[int] = set()
    todo = [start]
    while todo:
        n = todo.pop()
        if n != without and n in within and n not in found:
            found.add(n)
            todo += blocks[n].successors
    return found


@dataclass(frozen=True)
class Loop:
    """A loop: its first block, all of them, and those that every iteration goes through."""

    head: int
    blocks: frozenset[int]
    always: frozenset[int]


def loops_of(blocks: list[Block]) -> list[Loop]:
    """Natural loops, the smallest first; those that begin at one block are one."""
    everything = set(range(len(blocks)))
    reachable = _reached(blocks, 0, everything)  # none of an empty program
    before: dict[int, set[int]] = {n: set() for n in reachable}
    for n in reachable:
        for successor in blocks[n].successors:
            before[successor].add(n)
    loops = []
    for head in sorted(reachable):
        dominated = reachable - _reached(blocks, 0, everything, without=head)
        tails = before[head] & dominated
        if not tails:
            continue
        inside, todo = {head}, list(tails)
        while todo:
            n = todo.pop()
            if n not in inside:
                inside.add(n)
                todo += before[n]
        always = {n for n in inside if n == head or not _reached(blocks, head, inside, without=n) & tails}
        loops.append(Loop(head, frozenset(inside), frozenset(always)))
    return sorted(loops, key=lambda loop: len(loop.blocks))


def by_pipe(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many go through each pipe; those that none go through are left out."""
    counted = Counter(instruction.pipe for instruction in instructions)
    return {name: counted[name] for name in PIPES if counted[name]}


@dataclass(frozen=True)
class TensorLoop:
    """The innermost loop around matrix instructions: one step of a product, and what a tile costs beside its steps."""

    step: dict[str, int]  # by pipe, in every step
    around: dict[str, int]  # by pipe, once a tile: the rest of the loop around it, or a flattened loop's branch
    flattened: bool  # the rest is inside the loop
    wait: int | None  # matrix instructions in flight that a step leaves; None where there is no such wait
    serialised: bool  # the assembler waits after each matrix instruction


def tensor_loops(code: list[Instruction]) -> list[TensorLoop]:
    """One of each loop around matrix instructions, in the program's order."""
    blocks = blocks_of(code)
    loops = loops_of(blocks)
    loops_found: dict[int, TensorLoop] = {}
    for n, block in enumerate(blocks):
        holders = [loop for loop in loops if n in loop.blocks]
        if not holders or not any(i.pipe == "tensor" for i in block.code):
            continue
        inner = holders[0]
        if inner.head in loops_found:
            continue
        step = [i for b in sorted(inner.always) for i in blocks[b].code]
        rest = inner.blocks - inner.always
        flattened = sum(len(blocks[b].code) for b in rest) > len(step) // 4
        if not flattened:
            step = [i for b in sorted(inner.blocks) for i in blocks[b].code]
            outer = next((loop for loop in holders[1:] if loop.blocks > inner.blocks), None)
            rest = outer.blocks - inner.blocks if outer else frozenset()
        around = [i for b in sorted(rest) for i in blocks[b].code]
        products = sum(i.pipe == "tensor" for i in step)
        arrivals = sum(i.operation.startswith("WARPGROUP.ARRIVE") for i in step)
        waits = [i.operands for i in step if i.operation.startswith("WARPGROUP.DEPBAR")]
        depths = [int(found[1], 16) for w in waits if (found := re.search(r"0x([0-9a-f]+)", w))]
        serialised = arrivals > max(1, products / 4)
        loops_found[inner.head] = TensorLoop(
            by_pipe(step), by_pipe(around), flattened, min(depths, default=None), serialised
        )
    return [loops_found[head] for head in sorted(loops_found)]


def byte_loop(code: list[Instruction]) -> dict[str, int] | None:
    """One step, by pipe, of the innermost loop that reads most from memory, where nothing is multiplied by tiles."""
    blocks = blocks_of(code)
    steps = []
    loops = loops_of(blocks)
    for loop in loops:
        if not any(other.blocks < loop.blocks for other in loops):
            steps.append(by_pipe(i for b in sorted(loop.blocks) for i in blocks[b].code))
    return max(steps, key=lambda step: step.get("global", 0), default=None)
