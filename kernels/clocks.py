"""What a launch costs, in clocks of a Hopper multiprocessor, from its machine code: an estimate, not a measurement.

The rules, and where they come from:

- A multiprocessor multiplies 4,096 dense bfloat16 operations a clock (NVIDIA's H100 white paper: 989 TFLOP/s on 132 of
  them at 1.83 GHz), and has four partitions. A warp belongs to one of them.
- A warp instruction keeps its pipe busy for CLOCKS: 32 lanes through 32 (FMA), 16 (ALU) or 4 (MUFU) a clock (CUDA
  programming guide, throughput of native arithmetic instructions, compute capability 9.0). One is issued a clock.
- A tile takes t clocks of tensor work and v beside it. v is low if all pipes overlap, high if those of fixed latency
  (ALU, FMA, shuffles, shared memory) do not overlap each other; MUFU always runs beside them.
- One program on a multiprocessor takes t + v. Of p that share it, some multiply while others do not: a tile takes the
  larger of max(t, v) and (t + v) / p.
- A program waits FILL clocks for its first loads, once if its loop is flattened and once a tile if it is not.
- A launch takes as long as its waves of programs. Kernels without products are bound by bytes, or by instructions.

What is left out: bytes behind the products, which fit beside them, shared memory's conflicts, the time of a launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokensel_kernels.shapes import Shape

if TYPE_CHECKING:  # which needs Triton
    from tokensel_kernels.machine_code import TensorLoop

CLOCKS = {"alu": 2, "compare_64": 2, "mufu": 8, "fma": 1, "shuffle": 2, "shared": 2}
OPERATIONS = 4096  # a clock
FILL = 1500
BYTES = 18.6  # a clock, one multiprocessor's share: 4.3 TB/s of an H200 over 132 of them at 1.75 GHz
PROCESSORS = 132
# FlashAttention-2's forward, a tile of 128 × 128 at head size 128: 40 % of the tensor units' rate. FlashAttention-3's
# paper (arXiv 2407.08608) gives it 35 % on an H100, so that ratios to it are not flattered.
FLASH_TILE = 5088
KEPT = 0.6  # of the rows, whose gradients are wanted
PROMPT = 0.25  # of a sequence


@dataclass(frozen=True)
class Estimate:
    """Clocks of one multiprocessor a tile, and the whole against what bounds it."""

    main: float  # products of a tile, or the bytes of a step where there are none
    beside_low: float  # everything else of a tile
    beside_high: float
    fill: float  # a tile's share of its program's wait
    waves: float  # time lost to a last wave that is not full, as a factor
    ratio_low: float  # to the products at full rate, to the bytes, or to FlashAttention-2's forward
    ratio_high: float


def beside(pipes: dict[str, int], warps: int) -> tuple[float, float]:
    """(low, high) clocks of instructions that are not products, for warps / 4 of them on a partition."""
    cost = {name: warps / 4 * CLOCKS[name] * pipes.get(name, 0) for name in CLOCKS}
    issued = warps / 4 * sum(n for name, n in pipes.items() if name not in ("uniform", "tensor"))
    alu = cost["alu"] + cost["compare_64"]
    low = max(issued, alu, *cost.values())
    return low, max(low, alu + cost["fma"] + cost["shuffle"] + cost["shared"])


def programs_at_once(registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds: 65,536 registers in units of 8 a thread, 227 KiB of shared memory."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return max(1, min(by_registers, 227 * 1024 // (shared + 1024), 64 // warps))


def _tile(products: float, v: float, programs: int) -> float:
    return max(products, v, (products + v) / programs)


@dataclass(frozen=True)
class Work:
    """One launch of a product: its tiles, and what the busiest multiprocessor does of them."""

    tiles: int
    depth: int  # of the product
    rounds: int  # tiles that the busiest goes through, one after the other or beside each other
    programs: int  # of these rounds, each with a fill of its own


def of_products(
    loop: TensorLoop, warps: int, together: int, tile: tuple[int, int], launches: list[Work], operations: float
) -> Estimate:
    """Products of tiles (rows, columns) against `operations`, those of the exact shape.

    `together` programs share a multiprocessor. The tile that is shown is the first launch's.
    """
    rows, columns = tile
    low, high = beside(loop.around, warps)

    def products(work: Work) -> float:
        return 2.0 * rows * columns * work.depth / OPERATIONS

    ideal = operations / OPERATIONS / PROCESSORS
    fills = FILL * sum(work.programs if loop.flattened else work.rounds for work in launches)
    spent = [fills + sum(work.rounds * _tile(products(work), v, together) for work in launches) for v in (low, high)]
    busiest, mean = (sum(n(work) * work.depth for work in launches) for n in (lambda w: w.rounds, lambda w: w.tiles))
    waves = busiest / (mean / PROCESSORS)
    fill = fills / sum(work.rounds for work in launches)
    return Estimate(products(launches[0]), low, high, fill, waves, spent[0] / ideal, spent[1] / ideal)


def of_bytes(pipes: dict[str, int], warps: int, bytes_read: float) -> Estimate:
    """A step of a loop that reads `bytes_read` bytes and multiplies nothing."""
    main = bytes_read / BYTES
    low, high = beside(pipes, warps)
    return Estimate(main, low, high, 0.0, 1.0, max(1.0, low / main), max(1.0, high / main))


def attention_tiles(S: int, group: int, rows: int, keys: int, only_prompt: bool) -> tuple[int, int, int]:
    """(prompt, other, mixed) key tiles that the row tiles of one key head go through, PROMPT of the sequence first."""
    prompt_keys = int(PROMPT * S)
    counted = [0, 0, 0]
    for row in range(0, S * group, rows):
        first, last = max(row // group, prompt_keys), min((row + rows - 1) // group, S - 1)
        if last < prompt_keys:
            continue
        stop = -(-prompt_keys // keys) if only_prompt else last // keys + 1
        whole = min((first + 1) // keys, stop)
        prompt = min(whole, prompt_keys // keys)
        other = max(0, whole - -(-prompt_keys // keys)) if not only_prompt else 0
        counted[0] += prompt
        counted[1] += other
        counted[2] += stop - prompt - other
    return counted[0], counted[1], counted[2]


def of_attention(
    loops: list[TensorLoop], warps: int, programs: int, tile: tuple[int, int, int], shape: Shape, S: int, lse: bool
) -> Estimate:  # fmt: skip
    """Against FlashAttention-2's causal forward.

    Args:
        loops: over prompt, other (without an lse) and mixed tiles. tile: rows, keys, keys at once of a mixed tile.
    """
    rows, keys, mixed_keys = tile
    group = shape.heads // shape.key_heads
    prompt, other, mixed = attention_tiles(S, group, rows, keys, lse)
    products = 2.0 * rows * keys * shape.head_size / OPERATIONS
    kinds = [prompt, mixed] if lse else [prompt, other, mixed]
    flash = FLASH_TILE * (-(-S // 128) * (-(-S // 128) + 1) / 2) * group
    ratios = []
    for which in (0, 1):
        total = 0.0
        for n, loop in zip(kinds, loops, strict=True):
            parts = keys // mixed_keys if loop is loops[-1] else 1
            total += n * parts * _tile(products / parts, beside(loop.step, warps)[which], programs)
        ratios.append((total + math.ceil(S * group / rows) * (1 - PROMPT) * FILL / programs) / flash)
    low, high = beside(loops[0].step, warps)
    return Estimate(products, low, high, FILL / programs, 1.0, ratios[0], ratios[1])
