"""Shapes of the blocks of logits that a GPU's library multiplies into its L2 cache, so that they never reach memory."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from tokensel_kernels.clocks import BYTES, OPERATIONS

TILE = (128, 256)  # rows and columns of a program of the library's product, for most shapes on most chips
CACHE_SHARE = 2 / 3  # of L2 for logits; what is left is for the inputs that stream by
LAUNCHES = 0.1  # what a block costs beside its product, in waves: two launches of some microseconds
SUM_ROWS = 37  # rows a processor whose float32 sums are read and written in the time of a wave (4.3 TB/s, an H200)
NEAR = 1.01  # of the shapes that cost at most this many times the best, the one that reads its inputs least is taken
# Assumed by the estimate: bytes a clock and processor from L2 (as reported of an H100, 5.5 TB/s) or, where a block does
# not stay there, from memory; clocks between two launches of which one waits for the other, from 1 to 4 microseconds.
CACHE_RATE, MEMORY_RATE = 24.0, BYTES
GAP = (1750, 7000)


class Chip(NamedTuple):
    processors: int
    cache_bytes: int  # L2


@functools.lru_cache
def chip_of(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.L2_cache_size)


def resident_block(
    rows: int, columns: int, most_bytes: float, chip: Chip, *, most_columns: int | None = None, sums: bool = False
) -> tuple[int, int] | None:
    """(rows, columns) of the float32 blocks of logits that cost least and stay in the cache, or None if no tile fits.

    A wave of programs takes as long as one of them. So the blocks of all logits (rows, columns) cost their waves,
    rounded up, and what stands beside each. A block is never less than a wave, whatever the cache holds: some chips
    have another cache behind a small L2.

    Args:
        most_bytes: upper limit.
        most_columns: of a block, where more is held of each column than its logits.
        sums: a float32 sum of each row is read and written once a block of columns, as the gradient in hidden states.
    """
    tile_bytes = 4 * TILE[0] * TILE[1]
    most = min(most_bytes, max(CACHE_SHARE * chip.cache_bytes, chip.processors * tile_bytes))
    whole = -(-rows // TILE[0]), -(-columns // TILE[1])
    widest = whole[1] if most_columns is None else min(whole[1], max(1, most_columns // TILE[1]))
    sweep = rows / (SUM_ROWS * chip.processors) if sums else 0.0
    block = _cheapest(whole, widest, int(most // tile_bytes), chip.processors, sweep, TILE)
    return block and (block[0] * TILE[0], block[1] * TILE[1])


def estimated_ratio(
    rows: int, columns: int, depth: int, chip: Chip, block: tuple[int, int], kept: float | None = None
) -> tuple[float, float]:
    """(low, high) time of such blocks over that of the matrix products that are needed, at full rate.

    Args:
        depth: hidden size.
        kept: None for statistics: one product, read once. For gradients the share of rows that have one: three
            products of all rows, where those of kept rows are needed; the gradient of a block is written, too.
    """
    heights, widths = _parts(rows, block[0]), _parts(columns, block[1])
    waves, blocks = 0, 0
    for n, r in heights:
        for m, c in widths:
            waves += n * m * math.ceil(-(-r // TILE[0]) * -(-c // TILE[1]) / chip.processors)
            blocks += n * m
    one = 2.0 * rows * columns * depth / OPERATIONS / chip.processors  # clocks
    logits = 4.0 * rows * columns / chip.processors  # bytes
    product = waves * 2.0 * TILE[0] * TILE[1] * depth / OPERATIONS
    sweeps = sum(m for m, _ in widths)
    ratios = []
    for rate, gap, hidden in ((CACHE_RATE, GAP[0], True), (MEMORY_RATE, GAP[1], False)):
        clocks, needed = product + logits / rate + 2 * blocks * gap, one
        if kept is not None:
            sums = 0.0 if hidden else 8.0 * rows * depth * sweeps / chip.processors / MEMORY_RATE
            clocks += 2 * one + logits / 2 / MEMORY_RATE + sums + 2 * sweeps * gap
            needed = 3 * kept * one
        ratios.append(clocks / needed)
    return ratios[0], ratios[1]


@functools.lru_cache(maxsize=256)
def _cheapest(
    whole: tuple[int, int], widest: int, most: int, processors: int, sweep: float, tile: tuple[int, int]
) -> tuple[int, int] | None:
    """(row tiles, column tiles) of a block of at most `most` tiles; a sweep of a block of columns costs `sweep`."""

    def cost(shape: tuple[int, int]) -> float:
        r, c = shape
        blocks = [(n * m, a * b) for n, a in _parts(whole[0], r) for m, b in _parts(whole[1], c)]
        return sum(n * (math.ceil(tiles / processors) + LAUNCHES) for n, tiles in blocks) + sweep * -(-whole[1] // c)

    costs: dict[tuple[int, int], float] = {}
    for r in {-(-whole[0] // n) for n in range(1, whole[0] + 1)}:  # blocks of rows as even as they can be
        if r <= most:
            full = (waves * processors // r for waves in range(1, most // processors + 1))
            c = min(widest, most // r)
            even = -(-whole[1] // -(-whole[1] // c))
            costs |= {(r, c): cost((r, c)) for c in {even, c, *full} if 1 <= c <= min(widest, most // r)}
    near = [shape for shape, value in costs.items() if value <= NEAR * min(costs.values())]
    return min(near, key=lambda shape: (shape[0] * tile[0] + shape[1] * tile[1], shape), default=None)


def _parts(whole: int, part: int) -> list[tuple[int, int]]:
    """(how many, how large) the parts of a whole are: the last one may be smaller."""
    return [(n, size) for n, size in ((whole // part, part), (1, whole % part)) if n and size]
