"""Which tiles of keys each tile of attention rows goes through, and how: decided on the device before the sweep.

A tile of keys is of one kind, all prompt or all other tokens, or mixed. Where every row of a tile of rows sees all of
its keys and agrees about them, a tile of one kind needs no mask. Those are listed kind by kind, and a plan of each tile
of rows holds ranges of the lists, so that the sweep is a few loops without a branch. O(S) memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROMPT, OTHER, MIXED, KINDS = (tl.constexpr(n) for n in range(4))  # the lists of key tiles
FAR = tl.constexpr(2**30)  # where a key is that nobody sees: behind every query
# Fields of a plan. A range of steps t is made of pieces of the lists: from `split` of a piece on, t + shift is the
# place in the lists (B, KINDS · key tiles).
PROMPT_STOP, PROMPT_SHIFT = tl.constexpr(0), tl.constexpr(1)
OTHER_STOP, OTHER_SPLIT, OTHER_SHIFT = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)  # two pieces
MIXED_STOP, MIXED_SPLIT, MIXED_SHIFT = tl.constexpr(6), tl.constexpr(7), tl.constexpr(12)  # six pieces
FIELDS = tl.constexpr(32)  # 18 of them used: a plan is a line of the cache
TILES_AT_ONCE = 32


class Plan(NamedTuple):
    """What the pre-pass tells the sweep, int32."""

    seen_at: Tensor | None  # (B, S): each key's position, or FAR where it is padding; None if only prompt keys matter
    counted_at: Tensor  # (B, S): the same of prompt keys
    lists: Tensor  # (B, KINDS, key tiles): tiles of each kind, going up
    rows: Tensor  # (B, row tiles, FIELDS)


@triton.jit
def _key_tiles_kernel(
    prompt_ptr, key_ptr, seen_at_ptr, counted_at_ptr, lists_ptr, before_ptr,  # pointers
    S, tiles,  # shapes
    ONLY_PROMPT: tl.constexpr, KEYS: tl.constexpr, AT_ONCE: tl.constexpr,  # constants
):  # fmt: skip
    """One batch row: where its keys are, its key tiles by kind, and how many of a kind are before each tile.

    ONLY_PROMPT: tiles without a prompt key are in no list.
    """
    batch = tl.program_id(0).to(tl.int64)
    lists_ptr += batch * KINDS * tiles
    before_ptr += batch * KINDS * (tiles + 1)
    prompts, others, mixes = 0, 0, 0  # tiles so far
    for first in range(0, tiles, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        j = tile[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
        present = j < S
        if key_ptr is not None:
            present = tl.load(key_ptr + batch * S + j, mask=present, other=0) != 0
        counted = present & (tl.load(prompt_ptr + batch * S + j, mask=j < S, other=0) != 0)
        tl.store(counted_at_ptr + batch * S + j, tl.where(counted, j, FAR), mask=j < S)
        if not ONLY_PROMPT:
            tl.store(seen_at_ptr + batch * S + j, tl.where(present, j, FAR), mask=j < S)
        seen_keys = tl.sum(present.to(tl.int32), 1)
        prompt_keys = tl.sum(counted.to(tl.int32), 1)
        prompt = (prompt_keys == KEYS).to(tl.int32)
        if ONLY_PROMPT:
            other = tl.zeros_like(prompt)
            mixed = (prompt_keys > 0).to(tl.int32) - prompt
        else:
            other = ((seen_keys == KEYS) & (prompt_keys == 0)).to(tl.int32)
            mixed = (seen_keys > 0).to(tl.int32) - prompt - other
        prompts = _list_kind(PROMPT, prompt, prompts, tile, tiles, lists_ptr, before_ptr)
        others = _list_kind(OTHER, other, others, tile, tiles, lists_ptr, before_ptr)
        mixes = _list_kind(MIXED, mixed, mixes, tile, tiles, lists_ptr, before_ptr)
    tl.store(before_ptr + PROMPT * (tiles + 1) + tiles, prompts)
    tl.store(before_ptr + OTHER * (tiles + 1) + tiles, others)
    tl.store(before_ptr + MIXED * (tiles + 1) + tiles, mixes)


@triton.jit
def _list_kind(kind, member, so_far, tile, tiles, lists_ptr, before_ptr):
    """Appends the tiles that are members (1 or 0) to the list of a kind; how many it has then."""
    before = so_far + tl.cumsum(member, 0) - member
    tl.store(before_ptr + kind * (tiles + 1) + tile, before, mask=tile < tiles)
    tl.store(lists_ptr + kind * tiles + before, tile, mask=(tile < tiles) & (member > 0))
    return so_far + tl.sum(member, 0)


@triton.jit
def _row_plan_kernel(
    query_ptr, low_ptr, prompt_end_ptr, before_ptr, plan_ptr,  # pointers
    S, tiles, row_tiles,  # shapes
    window, ONLY_PROMPT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr, AT_ONCE: tl.constexpr,  # constants
):  # fmt: skip
    """AT_ONCE tiles of rows: their plans. A tile of rows has no more than QUERIES queries."""
    batch = tl.program_id(1).to(tl.int64)
    row_tile = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    i = (row_tile * ROWS // GROUP)[:, None] + tl.arange(0, QUERIES)[None, :]
    inside = (i < S) & (i <= ((row_tile * ROWS + ROWS - 1) // GROUP)[:, None])
    asked = tl.load(query_ptr + batch * S + i, mask=inside, other=0) != 0
    first = tl.min(tl.where(asked, i, S), 1)
    last = tl.max(tl.where(asked, i, -1), 1)
    # neither bound ever falls, so the first and the last query have the extremes
    first_low, last_low = tl.zeros_like(first), tl.zeros_like(first)
    if window is not None:
        first_low, last_low = tl.maximum(first - window + 1, 0), tl.maximum(last - window + 1, 0)
    if low_ptr is not None:
        first_low = tl.maximum(first_low, tl.load(low_ptr + batch * S + first, mask=first < S, other=0))
        last_low = tl.maximum(last_low, tl.load(low_ptr + batch * S + last, mask=last >= 0, other=0))
    first_end, last_end = first_low + FAR, first_low + FAR
    if prompt_end_ptr is not None:
        first_end = tl.load(prompt_end_ptr + batch * S + first, mask=first < S, other=0)
        last_end = tl.load(prompt_end_ptr + batch * S + last, mask=last >= 0, other=0)

    # key tiles: some row sees [begin, stop), every row all of [left, right); prompt keys count for every row before
    # `agreed`, for none from `over` on
    stop = (last + KEYS) // KEYS
    if ONLY_PROMPT:
        stop = tl.minimum(stop, tl.cdiv(last_end, KEYS))
    begin = tl.minimum(first_low // KEYS, stop)
    left = tl.minimum(tl.maximum(tl.cdiv(last_low, KEYS), begin), stop)
    right = tl.minimum(tl.maximum((first + 1) // KEYS, left), stop)
    agreed = tl.minimum(tl.maximum(first_end // KEYS, left), right)
    over = tl.minimum(tl.maximum(tl.cdiv(last_end, KEYS), agreed), right)

    before = before_ptr + batch * KINDS * (tiles + 1)
    plan = plan_ptr + (batch * row_tiles + row_tile) * FIELDS
    mask = row_tile < row_tiles
    p0, p1, p2 = tl.load(before + begin), tl.load(before + left), tl.load(before + agreed)
    p3, p4, p5 = tl.load(before + over), tl.load(before + right), tl.load(before + stop)
    tl.store(plan + PROMPT_STOP, p2 - p1, mask=mask)
    tl.store(plan + PROMPT_SHIFT, p1, mask=mask)
    before += tiles + 1
    o0, o1 = tl.load(before + begin), tl.load(before + left)
    o2, o3 = tl.load(before + right), tl.load(before + stop)
    before += tiles + 1
    m0, m1 = tl.load(before + begin), tl.load(before + stop)
    tl.store(plan + OTHER_STOP, o2 - o1 + p4 - p3, mask=mask)
    tl.store(plan + OTHER_SHIFT, tiles + o1, mask=mask)
    tl.store(plan + OTHER_SPLIT, o2 - o1, mask=mask)
    tl.store(plan + OTHER_SHIFT + 1, p3 - (o2 - o1), mask=mask)
    steps = _piece(plan, 0, tl.zeros_like(first), p0, p1, mask)
    steps = _piece(plan, 1, steps, p2, p3, mask)
    steps = _piece(plan, 2, steps, p4, p5, mask)
    steps = _piece(plan, 3, steps, tiles + o0, tiles + o1, mask)
    steps = _piece(plan, 4, steps, tiles + o2, tiles + o3, mask)
    steps = _piece(plan, 5, steps, 2 * tiles + m0, 2 * tiles + m1, mask)
    tl.store(plan + MIXED_STOP, steps, mask=mask)


@triton.jit
def _piece(plan, n: tl.constexpr, steps, start, stop, mask):
    """Adds lists[start : stop] to the mixed steps; how many they are then."""
    if n > 0:
        tl.store(plan + MIXED_SPLIT + (n - 1), steps, mask=mask)
    tl.store(plan + MIXED_SHIFT + n, start - steps, mask=mask)
    return steps + stop - start


def attention_plan(
    prompt_mask: Tensor,
    query_mask: Tensor,
    key_mask: Tensor | None,
    low: Tensor | None,
    prompt_end: Tensor | None,
    window: int | None,
    *,
    only_prompt: bool,
    group: int,
    rows: int,
    keys: int,
) -> Plan:
    """The plan of tiles of `rows` rows, `group` heads of one query after the other, over tiles of `keys` keys.

    Args:
        prompt_mask, query_mask, key_mask: [B, S] int8, 0 or 1; contiguous, as all that follow.
        low, prompt_end: [B, S] int32 that never fall along S, or None.
        only_prompt: keys that are no prompt need not be visited.
    """
    B, S = prompt_mask.shape
    tiles, row_tiles = triton.cdiv(S, keys), triton.cdiv(S * group, rows)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=prompt_mask.device)

    seen_at = None if only_prompt else numbers(B, S)
    counted_at, lists = numbers(B, S), numbers(B, KINDS.value, tiles)
    before, plan = numbers(B, KINDS.value, tiles + 1), numbers(B, row_tiles, FIELDS.value)
    _key_tiles_kernel[(B,)](
        prompt_mask, key_mask, seen_at, counted_at, lists, before,
        S, tiles,
        ONLY_PROMPT=only_prompt, KEYS=keys, AT_ONCE=TILES_AT_ONCE, num_warps=8,
    )  # fmt: skip
    queries = triton.next_power_of_2(triton.cdiv(rows - 1, group) + 1)
    _row_plan_kernel[(triton.cdiv(row_tiles, TILES_AT_ONCE), B)](
        query_mask, low, prompt_end, before, plan,
        S, tiles, row_tiles,
        window, ONLY_PROMPT=only_prompt, GROUP=group, ROWS=rows, KEYS=keys,
        QUERIES=queries, AT_ONCE=TILES_AT_ONCE, num_warps=8,
    )  # fmt: skip
    return Plan(seen_at, counted_at, lists, plan)
