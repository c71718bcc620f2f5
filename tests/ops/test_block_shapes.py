"""Blocks of logits that stay in a GPU's cache and fill whole waves of its processors."""

from __future__ import annotations

import itertools
import math

import pytest

from tokensel.ops import block_shapes
from tokensel.ops.block_shapes import TILE, Chip, estimated_ratio, resident_block

MIB = 2**20
H100, A100, B200 = Chip(132, 50 * MIB), Chip(108, 40 * MIB), Chip(148, 126 * MIB)
MI300X = Chip(304, 4 * MIB)  # whose large cache is not its L2


def waves(rows, columns, block, processors):
    """(waves of all blocks, waves that the tiles would take if they were one product)."""

    def parts(whole, part):
        return [min(part, whole - first) for first in range(0, whole, part)]

    def tiles(r, c):
        return -(-r // TILE[0]) * -(-c // TILE[1])

    blocks = itertools.product(parts(rows, block[0]), parts(columns, block[1]))
    return sum(math.ceil(tiles(r, c) / processors) for r, c in blocks), tiles(rows, columns) / processors


def test_an_h100_takes_two_full_waves():
    assert resident_block(8192, 128256, 256 * MIB, H100) == (1024, 8448)  # 8 x 33 tiles are 2 x 132
    assert 1024 * 8448 * 4 == 33 * MIB


@pytest.mark.parametrize("chip", [H100, A100, B200, MI300X], ids=lambda chip: f"{chip.processors} processors")
@pytest.mark.parametrize("rows, columns", [(8192, 128256), (8192, 152064), (8192, 256000), (4096, 128256), (1, 50257)])
@pytest.mark.parametrize("sums", [False, True])
def test_blocks_stay_in_the_cache_and_waste_little(rows, columns, chip, sums):
    block = resident_block(rows, columns, 256 * MIB, chip, sums=sums)
    assert not block[0] % TILE[0] and not block[1] % TILE[1]
    assert block[0] < rows + TILE[0] and block[1] < columns + TILE[1]
    wave = chip.processors * TILE[0] * TILE[1] * 4
    assert 4 * block[0] * block[1] <= max(2 / 3 * chip.cache_bytes, wave)
    taken, least = waves(rows, columns, block, chip.processors)
    assert taken <= 1.06 * math.ceil(least) + 1


@pytest.mark.parametrize("mib", [0.125, 1, 8, 1000])
def test_the_workspace_is_an_upper_limit(mib):
    R, C = resident_block(8192, 128256, mib * MIB, H100)
    assert 4 * R * C <= min(mib * MIB, 2 / 3 * H100.cache_bytes)
    assert resident_block(8192, 128256, TILE[0] * TILE[1] * 4 - 1, H100) is None


def test_of_each_column_more_may_be_held_than_its_logits():
    for most in (100, 256, 5000, 20_000):
        _, C = resident_block(8192, 128256, 256 * MIB, H100, most_columns=most, sums=True)
        assert C <= max(most, TILE[1])


def test_sums_that_are_read_and_written_for_each_block_of_columns_make_it_wide():
    narrow, wide = (resident_block(2048, 128256, 256 * MIB, H100, sums=sums)[1] for sums in (False, True))
    assert wide > 2 * narrow


def test_rows_of_one_number_of_tiles_share_one_search():
    block_shapes._cheapest.cache_clear()
    for rows in range(8065, 8193):
        resident_block(rows, 128256, 256 * MIB, H100)
    assert block_shapes._cheapest.cache_info().misses == 1


def test_the_estimate_is_its_parts():
    """8,192 rows of Llama-3.1-8B on an H100, worked out by hand."""
    low, high = estimated_ratio(8192, 128256, 4096, H100, (1024, 8448))
    needed = 64 * 501 / 132 * 65_536  # tiles a processor, clocks a tile
    products = (15 * 2 + 1) * 8 * 65_536  # the last block has a wave
    logits = 8192 * 128256 * 4 / 132
    assert low == pytest.approx((products + logits / 24 + 2 * 128 * 1750) / needed, rel=1e-3)
    assert high == pytest.approx((products + logits / 18.6 + 2 * 128 * 7000) / needed, rel=1e-3)
    assert 1.10 < low < 1.16 < high < 1.27


def test_gradients_of_dropped_rows_are_paid_for():
    block = resident_block(8192, 128256, 256 * MIB, H100, sums=True)
    every, some = (estimated_ratio(8192, 128256, 4096, H100, block, kept) for kept in (1.0, 0.6))
    assert some[0] == pytest.approx(every[0] / 0.6) and some[1] == pytest.approx(every[1] / 0.6)
    assert 1.0 < every[0] < every[1] < 1.2


def test_a_block_of_half_a_wave_takes_twice_the_time():
    whole, half = (estimated_ratio(8192, 135168, 4096, H100, shape)[0] for shape in ((1024, 8448), (1024, 2048)))
    assert whole < 1.2 and half > 2.0
