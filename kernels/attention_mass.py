"""q, k -> each query's attention mass on prompt keys, without an [S, S] matrix.

mass_i = mean over heads of Σ_prompt exp(z_ij) / Σ_visible exp(z_ij). One sweep over the visible keys keeps two running
sums under one maximum: 2 Hq d operations a visible pair, half of an attention forward. With the log-sum-exp that
FlashAttention returned, only prompt columns are computed. Query heads of one key head share the key tile.

What a query sees is three numbers: keys from `low` (its document and window begin there) to itself; keys that count as
prompt end before `prompt_end` (its own turn begins there). Most key tiles are inside these bounds for every row of a
tile, and all prompt or all response: `attention_plan` finds them, and the sweep goes through them without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels import tiles
from tokensel_kernels.attention_plan import (
    FAR,
    FIELDS,
    KINDS,
    MIXED_SHIFT,
    MIXED_SPLIT,
    MIXED_STOP,
    OTHER_SHIFT,
    OTHER_SPLIT,
    OTHER_STOP,
    PROMPT_SHIFT,
    PROMPT_STOP,
    attention_plan,
)
from tokensel_kernels.primitives import LOG2_E, exponents, multiply, softcap_kind, tanh

LOWEST = tl.constexpr(-3e38)  # a pivot below every score, and finite: differences of pivots are never NaN
SMALL_SOFTCAP = 60.0  # exp(±60) times any number of keys is a normal float32: no maximum is needed
MIXED_PARTS = {"none": 2, "small": 2, "large": 4}  # of a tile with masks, which take registers; by softcap


@triton.jit
def _key_tile(
    k_source, k_ptr, batch, key_head, key, S, k_stride_s,
    KEYS: tl.constexpr, FROM: tl.constexpr, DEPTH: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys from `key` on, their numbers from FROM on; zero outside (S, D). WHOLE: all keys exist. (KEYS, DEPTH)

    `k_source` is a descriptor of (B, heads, S, D) with blocks of this size (TMA); `k_ptr` is where the head begins.
    """
    if TMA:
        return tl.reshape(k_source.load([batch, key_head, key, FROM]), [KEYS, DEPTH])
    else:
        j = tl.arange(0, KEYS)
        d = FROM + tl.arange(0, DEPTH)
        at = k_ptr + key.to(tl.int64) * k_stride_s + (j[:, None] * k_stride_s + d[None, :])
        if WHOLE:
            if D % DEPTH == 0 or D == FROM + DEPTH:
                return tl.load(at)
            else:
                return tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(j < S - key)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _score_tile(
    q, q_rest, k_source, k_rest_source, k_ptr, batch, key_head, key, S, k_stride_s, scale, softcap,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr,
    D_REST: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a key tile before their scale; softcapped ones after it, in units of log 2. (ROWS, KEYS)"""
    z = tl.zeros([ROWS, KEYS], tl.float32)
    k = _key_tile(k_source, k_ptr, batch, key_head, key, S, k_stride_s, KEYS, 0, D_MAIN, D, TMA, WHOLE)
    z = multiply(q, k.T, z, PRECISION)
    if D_REST > 0:
        k = _key_tile(k_rest_source, k_ptr, batch, key_head, key, S, k_stride_s, KEYS, D_MAIN, D_REST, D, TMA, WHOLE)
        z = multiply(q_rest, k.T, z, PRECISION)
    if SOFTCAP == "small":  # c tanh(x) = c - 2 c / (1 + exp(2 x)), whose rounding grows with c
        z = softcap - 2.0 * softcap / (1.0 + tl.exp2(z * scale))
    elif SOFTCAP == "large":
        z = softcap * tanh(z * scale)
    return z


@triton.jit
def _sum_whole_tiles(
    lists_ptr, stop, split, shift, next_shift,  # which tiles
    q, q_rest, k_source, k_rest_source, k_ptr, batch, key_head, S, k_stride_s, scale, softcap, pivot, total,
    FIXED_PIVOT: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(pivot, total = Σ 2^(z - pivot)) after key tiles that every row sees whole. (ROWS,) each."""
    by = scale if SOFTCAP == "none" else 1.0
    for t in range(0, stop):
        key = tl.load(lists_ptr + t + tl.where(t < split, shift, next_shift)) * KEYS
        z = _score_tile(
            q, q_rest, k_source, k_rest_source, k_ptr, batch, key_head, key, S, k_stride_s, scale, softcap,
            SOFTCAP, ROWS, KEYS, D, D_MAIN, D_REST, TMA, True, PRECISION,
        )  # fmt: skip
        if FIXED_PIVOT:
            total += tl.sum(tl.exp2(z * by - pivot[:, None]), 1)
        else:
            higher = tl.maximum(pivot, tl.max(z, 1) * by)
            total = total * tl.exp2(pivot - higher) + tl.sum(tl.exp2(z * by - higher[:, None]), 1)
            pivot = higher
    return pivot, total


@triton.jit
def _attention_mass_kernel(
    q_ptr, k_ptr, k_source, k_rest_source, seen_at_ptr, counted_at_ptr, lists_ptr, plan_ptr, query_ptr, low_ptr,
    prompt_end_ptr, lse_ptr, sinks_ptr, mass_ptr,  # pointers
    S, tiles, row_tiles, heads, batches,  # shapes
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,  # strides
    scale, softcap, window, FIXED_PIVOT: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MIXED_KEYS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    """One key head, ROWS rows: the mass of each -> mass_ptr[b, key head, row].

    Row p is query p // GROUP of head p % GROUP. `scale` and `softcap` are in units of log 2. k_source and
    k_rest_source have the first D_MAIN numbers of a key and the D_REST after them. Programs begin with the last rows,
    which see most keys; those of one tile of rows are neighbours.
    """
    key_heads = heads // GROUP
    neighbours = key_heads * batches
    row_tile = row_tiles - 1 - tl.program_id(0) // neighbours
    key_head = tl.program_id(0) % key_heads
    b = tl.program_id(0) % neighbours // key_heads
    batch = b.to(tl.int64)
    plan = plan_ptr + (batch * row_tiles + row_tile) * FIELDS
    p = row_tile * ROWS + tl.arange(0, ROWS)
    i = p // GROUP
    head = key_head * GROUP + p % GROUP
    real = i < S
    mass_ptr += (batch * key_heads + key_head) * S * GROUP
    mixed_stop = tl.load(plan + MIXED_STOP)
    prompt_stop = tl.load(plan + PROMPT_STOP)
    if mixed_stop + prompt_stop == 0:  # a tile of prompt or padding costs nothing
        tl.store(mass_ptr + p, tl.zeros([ROWS], tl.float32), mask=real)
        return

    q_at = q_ptr + batch * q_stride_b + head[:, None].to(tl.int64) * q_stride_h + i[:, None].to(tl.int64) * q_stride_s
    d = tl.arange(0, D_MAIN)
    q = tl.load(q_at + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    q_rest = q
    if D_REST > 0:
        d = D_MAIN + tl.arange(0, D_REST)
        q_rest = tl.load(q_at + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += batch * k_stride_b + key_head.to(tl.int64) * k_stride_h
    low = tl.zeros_like(i)
    if window is not None:
        low = i - window + 1
    if low_ptr is not None:
        low = tl.maximum(low, tl.load(low_ptr + batch * S + i, mask=real, other=0))
    last_prompt = i
    if prompt_end_ptr is not None:
        last_prompt = tl.minimum(i, tl.load(prompt_end_ptr + batch * S + i, mask=real, other=0) - 1)
    LOW: tl.constexpr = window is not None or low_ptr is not None

    total = tl.zeros([ROWS], tl.float32)
    pivot = tl.full([ROWS], 0.0 if FIXED_PIVOT else LOWEST, tl.float32)
    if lse_ptr is not None:  # the denominator is known, so its logarithm is the pivot
        pivot = tl.load(lse_ptr + (batch * heads + head) * S + i, mask=real, other=0.0).to(tl.float32) * LOG2_E
        pivot = tl.where(tl.abs(pivot) < -LOWEST, pivot, -LOWEST)  # a row that sees nothing has no mass
    lists_ptr += batch * KINDS * tiles
    shift = tl.load(plan + PROMPT_SHIFT)
    pivot, total = _sum_whole_tiles(
        lists_ptr, prompt_stop, prompt_stop, shift, shift,
        q, q_rest, k_source, k_rest_source, k_ptr, b, key_head, S, k_stride_s, scale, softcap, pivot, total,
        FIXED_PIVOT, SOFTCAP, ROWS, KEYS, D, D_MAIN, D_REST, TMA, PRECISION,
    )  # fmt: skip
    prompt = total
    if lse_ptr is None:
        before = pivot
        pivot, total = _sum_whole_tiles(
            lists_ptr, tl.load(plan + OTHER_STOP), tl.load(plan + OTHER_SPLIT), tl.load(plan + OTHER_SHIFT),
            tl.load(plan + OTHER_SHIFT + 1),
            q, q_rest, k_source, k_rest_source, k_ptr, b, key_head, S, k_stride_s, scale, softcap, pivot, total,
            FIXED_PIVOT, SOFTCAP, ROWS, KEYS, D, D_MAIN, D_REST, TMA, PRECISION,
        )  # fmt: skip
        prompt *= tl.exp2(before - pivot)

    shift = tl.load(plan + MIXED_SHIFT)
    split_1, shift_1 = tl.load(plan + MIXED_SPLIT), tl.load(plan + MIXED_SHIFT + 1)
    split_2, shift_2 = tl.load(plan + MIXED_SPLIT + 1), tl.load(plan + MIXED_SHIFT + 2)
    split_3, shift_3 = tl.load(plan + MIXED_SPLIT + 2), tl.load(plan + MIXED_SHIFT + 3)
    split_4, shift_4 = tl.load(plan + MIXED_SPLIT + 3), tl.load(plan + MIXED_SHIFT + 4)
    split_5, shift_5 = tl.load(plan + MIXED_SPLIT + 4), tl.load(plan + MIXED_SHIFT + 5)
    PARTS: tl.constexpr = KEYS // MIXED_KEYS
    by = scale if SOFTCAP == "none" else 1.0
    for step in range(0, mixed_stop * PARTS):
        t = step // PARTS
        early = tl.where(t < split_1, shift, tl.where(t < split_2, shift_1, shift_2))
        late = tl.where(t < split_4, shift_3, tl.where(t < split_5, shift_4, shift_5))
        tile = tl.load(lists_ptr + t + tl.where(t < split_3, early, late))
        key = tile * KEYS + step % PARTS * MIXED_KEYS
        j = key + tl.arange(0, MIXED_KEYS)
        counted_at = tl.load(counted_at_ptr + batch * S + j, mask=j < S, other=FAR)
        z = _score_tile(
            q, q_rest, k_source, k_rest_source, k_ptr, b, key_head, key, S, k_stride_s, scale, softcap,
            SOFTCAP, ROWS, MIXED_KEYS, D, D_MAIN, D_REST, False, False, PRECISION,
        )  # fmt: skip
        z = z * by
        if lse_ptr is not None:
            counts = counted_at[None, :] <= last_prompt[:, None]
            if LOW:
                counts = counts & (counted_at[None, :] >= low[:, None])
            prompt += tl.sum(tl.where(counts, tl.exp2(z - pivot[:, None]), 0.0), 1)
        else:
            seen_at = tl.load(seen_at_ptr + batch * S + j, mask=j < S, other=FAR)
            sees = seen_at[None, :] <= i[:, None]
            if LOW:
                sees = sees & (seen_at[None, :] >= low[:, None])
            z = tl.where(sees, z, -float("inf"))
            if not FIXED_PIVOT:
                higher = tl.maximum(pivot, tl.max(z, 1))
                rescale = tl.exp2(pivot - higher)
                total *= rescale
                prompt *= rescale
                pivot = higher
            e = tl.exp2(z - pivot[:, None])
            total += tl.sum(e, 1)
            if prompt_end_ptr is not None:
                prompt += tl.sum(tl.where(counted_at[None, :] <= last_prompt[:, None], e, 0.0), 1)
            else:
                prompt += tl.sum(e * tl.where(counted_at < FAR, 1.0, 0.0)[None, :], 1)

    if lse_ptr is not None:
        total = tl.full([ROWS], 1.0, tl.float32)
    if sinks_ptr is not None:  # a sink only adds to the denominator
        sink = tl.load(sinks_ptr + head, mask=real, other=-float("inf")).to(tl.float32) * LOG2_E
        higher = tl.maximum(pivot, sink)
        total = total * tl.exp2(pivot - higher) + tl.exp2(sink - higher)
        prompt *= tl.exp2(pivot - higher)
    asked = tl.load(query_ptr + batch * S + i, mask=real, other=0) != 0
    mass = tl.where(asked & (total > 0), prompt / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(mass_ptr + p, mass, mask=real)


def _tile(q: Tensor) -> tuple[tiles.AttentionTile, int, int]:
    """(the table's tile, rows, keys): half as many for large heads, of what holds their numbers."""
    family, _ = tiles.chip_family(q.device)
    tile = tiles.TILES[family]["attention"][q.element_size()]
    if q.shape[-1] <= 128:
        return tile, tile.rows, tile.keys
    if family == "gfx942":  # queries, in registers
        return tile, tile.rows // 2, tile.keys
    return tile, tile.rows, max(16, tile.keys // 2)  # keys, of which shared memory has the stages of two programs


def _depths(d: int, tma: bool) -> tuple[int, int]:
    """Powers of two that a head of size d is multiplied in: the second one is 0 where one product is enough."""
    main = max(16, 1 << (d.bit_length() - 1))
    if main >= d:
        return main, 0
    if tma and d <= 128:  # exponentials bound the time, and a second product would wait for the first
        return 2 * main, 0
    return main, max(16, triton.next_power_of_2(d - main))


def _has_descriptors(k: Tensor) -> bool:
    """Whether key tiles are loaded by tensor memory descriptors: the head begins at multiples of 16 bytes."""
    if tiles.chip_family(k.device)[0] not in tiles.CHIPS_WITH["tma"] or k.element_size() != 2 or not k.numel():
        return False
    steps = [stride * k.element_size() for size, stride in zip(k.shape[:3], k.stride()[:3], strict=True) if size > 1]
    return not k.data_ptr() % 16 and all(step > 0 and step % 16 == 0 for step in steps)


def _key_source(k: Tensor, keys: int, depth: int, tma: bool) -> object:
    """What `_key_tile` reads (keys, depth) of k from; None where there is nothing to read."""
    if not tma or not depth:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    # nothing is read along a dimension of one entry, whose stride may be anything
    strides = [stride if size > 1 else 16 for size, stride in zip(k.shape[:3], k.stride()[:3], strict=True)]
    return TensorDescriptor(k, list(k.shape), [*strides, 1], [1, 1, keys, depth])


def attention_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    query_mask: Tensor,
    key_mask: Tensor | None,
    low: Tensor | None,
    prompt_end: Tensor | None,
    *,
    lse: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """Mean over heads of the attention probability on prompt keys.

    Args:
        q: [B, Hq, S, d], k: [B, Hk, S, d], float16, bfloat16 or float32; the last dimension contiguous.
        prompt_mask, query_mask, key_mask: [B, S] bool; no key_mask means no padding.
        low: [B, S], first position that a query sees, never falling along S; None means 0.
        prompt_end: [B, S], where its keys cease to count as prompt, never falling along S; None means never.
        lse: [B, Hq, S] or None. sinks: [Hq] or None.
        window: a query sees the last `window` keys, itself included; None means all from `low` on.
    Returns:
        [B, S] float32; 0 on rows that are not asked for.
    """
    B, Hq, S, d = q.shape
    Hk = k.shape[1]
    if scale < 0:  # the largest score is sought before the scale
        q, scale = -q, -scale
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    masks = [None if m is None else m.contiguous().view(torch.int8) for m in (prompt_mask, query_mask, key_mask)]
    bounds = [None if t is None else t.to(torch.int32).contiguous() for t in (low, prompt_end)]
    group = Hq // Hk
    tile, rows, keys = _tile(q)
    tma = _has_descriptors(k)
    d_main, d_rest = _depths(d, tma)
    sources = [_key_source(k, keys, depth, tma) for depth in (d_main, d_rest)]
    # scores are in units of log 2, so that an exponential is one instruction
    size = softcap_kind(softcap, SMALL_SOFTCAP)
    by, cap = exponents(softcap, scale, size)
    parts = 1 if tma and 192 < d else MIXED_PARTS[size]  # one program a processor has all registers
    row_tiles = triton.cdiv(S * group, rows)
    masses = torch.empty(B, Hk, S, group, dtype=torch.float32, device=q.device)
    window = None if window is None or window >= S else window
    with tiles.on_device(q):
        plan = attention_plan(
            *masks, *bounds, window, only_prompt=lse is not None, group=group, rows=rows, keys=keys
        )  # fmt: skip
        _attention_mass_kernel[(row_tiles * Hk * B,)](
            q, k, *sources, plan.seen_at, plan.counted_at, plan.lists, plan.rows, masks[1], *bounds,
            None if lse is None else lse.contiguous(), None if sinks is None else sinks.contiguous(), masses,
            S, triton.cdiv(S, keys), row_tiles, Hq, B,
            *q.stride()[:3], *k.stride()[:3],
            by, cap, window,
            FIXED_PIVOT=lse is not None or size == "small", SOFTCAP=size, GROUP=group,
            D=d, D_MAIN=d_main, D_REST=d_rest, ROWS=rows, KEYS=keys, MIXED_KEYS=max(16, keys // parts),
            TMA=tma, PRECISION=tile.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return masses.sum((1, 3)) / Hq
