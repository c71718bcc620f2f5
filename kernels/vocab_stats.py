"""Hidden states -> per-token statistics of one or two models, without logits.

Rows that have a label are gathered, a slab at a time. One launch a slab then serves both models: each program owns a
tile of rows and a share of the vocabulary, and keeps tile product and online softmax in registers; nothing of width V
is written. Operations: 2 N V D a model. Bytes: GROUP tiles of rows stay in L2 while the head streams by, so it is read
once for each such group, 2 V D bytes, and the results are a few floats a row and share. A fixed order of merging makes
it deterministic.

Inside, logits are in units of log2, so that a softmax is one exp2 of one multiplication and addition.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.gather_rows import kept_rows
from tokensel_kernels.primitives import (
    LN_2,
    LOG2_E,
    NOTHING,
    exponents,
    grouped_tile,
    head_logits,
    load_tile,
    log2_logits,
    multiply,
    online_softmax,
    softcap_kind,
)
from tokensel_kernels.tiles import GROUP, ProductTile, empty_rows, interpreting, on_device, product_tile, tile_source

FILL = 0.03  # of a tile's time: what a program waits for its first loads, `clocks.FILL` at most hidden sizes


@triton.jit
def _gather_row(
    x_ptr, w_ptr, bias_ptr, out_ptr, target_ptr,  # pointers
    label, V, D,  # shapes
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TARGET: tl.constexpr,
    BLOCK: tl.constexpr,  # constants
):  # fmt: skip
    """out = x; with TARGET also the logit of the label, whose row of the head is w. D elements each."""
    total = tl.zeros([BLOCK], tl.float32)
    for d in range(0, D, BLOCK):
        c = d + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + c, mask=c < D, other=0.0)
        tl.store(out_ptr + c, x, mask=c < D)
        if TARGET:
            w = tl.load(w_ptr + c, mask=(c < D) & (label >= 0), other=0.0)
            total += x.to(tl.float32) * w.to(tl.float32)
    if TARGET:
        product = tl.sum(total, 0) + tl.zeros([1, 1], tl.float32)
        z = head_logits(product, bias_ptr, tl.maximum(label, 0), V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, 1)
        z = tl.where(label >= 0, z, -float("inf"))  # a label outside the vocabulary has no logit
        tl.store(target_ptr + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], z)


@triton.jit
def _gather_slab_kernel(
    x_ptr, w_ptr, history_x_ptr, history_w_ptr, bias_ptr, label_ptr, order_ptr, count_ptr, out_ptr, history_out_ptr,
    index_ptr, stats_ptr,  # pointers
    first, V, D, history_D,  # shapes
    x_stride, w_stride, history_x_stride, history_w_stride, out_stride, history_out_stride, field_stride,
    model_stride,  # strides
    logit_scale, softcap, PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TARGET: tl.constexpr,
    BLOCK: tl.constexpr,  # constants
):  # fmt: skip
    """A slab of the rows that have a label, from the first one on: hidden states, labels and the labels' logits."""
    place = tl.program_id(0)
    if first + place >= tl.load(count_ptr):
        return
    row = tl.load(order_ptr + first + place).to(tl.int64)
    label = tl.load(label_ptr + row)
    label = tl.where((label >= 0) & (label < V), label, -1)
    head_row = tl.maximum(label, 0)
    target_ptr = stats_ptr + field_stride + row
    if tl.program_id(1) == 0:
        tl.store(index_ptr + place, label.to(tl.int32))
        _gather_row(
            x_ptr + row * x_stride, w_ptr + head_row * w_stride, bias_ptr, out_ptr + place.to(tl.int64) * out_stride,
            target_ptr,
            label, V, D,
            logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, TARGET, BLOCK,
        )  # fmt: skip
    if PAIR:
        if tl.program_id(1) == 1:
            _gather_row(
                history_x_ptr + row * history_x_stride, history_w_ptr + head_row * history_w_stride, bias_ptr,
                history_out_ptr + place.to(tl.int64) * history_out_stride, target_ptr + model_stride,
                label, V, history_D,
                logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, TARGET, BLOCK,
            )  # fmt: skip


@triton.jit
def _sweep_vocabulary(
    x, w, bias_ptr, index_ptr, order_ptr, label_logit_ptr, sums_ptr,  # pointers
    row, start, stop, slab, kept, V, D,  # shapes
    x_stride, w_stride, field_stride,  # strides
    scale, cap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, MOMENTS: tl.constexpr, MORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    """Sums of ROWS gathered rows over the columns [start, stop) of one model's vocabulary.

    The slab's first `kept` rows were gathered, from where `order_ptr` says.
    """
    rows = row + tl.arange(0, ROWS)
    label = tl.load(index_ptr + rows, mask=rows < slab, other=-1)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    target = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    logits = tl.zeros([ROWS], tl.float32)
    above = tl.zeros([ROWS], tl.float32)
    label_logit = tl.zeros([ROWS], tl.float32)
    if MORE:
        source = tl.load(order_ptr + rows, mask=rows < kept, other=0)
        label_logit = tl.load(label_logit_ptr + source, mask=rows < kept, other=0.0) * LOG2_E
    # flattened: the next tile's loads run under this one's epilogue. A branch on the product would serialise it
    for column in tl.range(start, stop, COLUMNS, flatten=TMA, warp_specialize=SPECIALIZE):
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, D, DEPTH):
            a = load_tile(x, row, k, slab, D, x_stride, ROWS, DEPTH, TMA)
            b = load_tile(w, column, k, V, D, w_stride, COLUMNS, DEPTH, TMA)
            product = multiply(a, b.T, product, PRECISION)
        u = log2_logits(product, bias_ptr, column, V, scale, cap, HAS_BIAS, SOFTCAP, COLUMNS)
        if MOMENTS:  # from the tile itself, so that the label's logit can be told to be the largest
            c = (column + tl.arange(0, COLUMNS))[None, :]
            hit = c == label[:, None]
            target += tl.sum(tl.where(hit, u, 0.0), 1)
        if SPECIALIZE:  # its warps hand nothing on from tile to tile, so that each has sums of its own
            top = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            top, total, _, _, _ = online_softmax(u, top, total, total, total, total, False, False)
            at = sums_ptr + tl.cast(column // COLUMNS, tl.int64) * slab + rows
            tl.store(at, top, mask=rows < slab)
            tl.store(at + field_stride, total, mask=rows < slab)
        else:
            top, total, first, second, square = online_softmax(u, top, total, first, second, square, MOMENTS, MORE)
        if MORE:  # after the softmax, whose registers are free again
            z = u + cap if SOFTCAP == "small" else u  # before the sum, which would cancel
            logits += tl.sum(tl.where(c < V, z, 0.0), 1)
            above += tl.sum((z > label_logit[:, None]).to(tl.float32), 1)
    if not SPECIALIZE:
        tl.store(sums_ptr + rows, top, mask=rows < slab)
        tl.store(sums_ptr + field_stride + rows, total, mask=rows < slab)
    if MOMENTS:
        inside = (label >= start) & (label < stop)
        tl.store(sums_ptr + 2 * field_stride + rows, tl.where(inside, target, -float("inf")), mask=rows < slab)
        tl.store(sums_ptr + 3 * field_stride + rows, first, mask=rows < slab)
        tl.store(sums_ptr + 4 * field_stride + rows, second, mask=rows < slab)
    if MORE:
        own = target + cap if SOFTCAP == "small" else target
        above -= (inside & (own > label_logit)).to(tl.float32)  # the label was counted where rounding put it higher
        tl.store(sums_ptr + 5 * field_stride + rows, square, mask=rows < slab)
        tl.store(sums_ptr + 6 * field_stride + rows, logits, mask=rows < slab)
        tl.store(sums_ptr + 7 * field_stride + rows, above, mask=rows < slab)


@triton.jit
def _hidden_stats_kernel(
    x, w, history_x, history_w, bias_ptr, index_ptr, count_ptr, order_ptr, label_logit_ptr, sums_ptr,  # pointers
    first_row, slab, V, D, history_D, share, splits,  # shapes
    x_stride, w_stride, history_x_stride, history_w_stride, label_logit_stride, field_stride,  # strides
    scale, cap, PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, MOMENTS: tl.constexpr,
    MORE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    MODELS: tl.constexpr = 2 if PAIR else 1
    # the two models' tiles of the same rows are neighbours, so that a shared head's tile is used twice
    tile, split = grouped_tile(tl.program_id(0), tl.cdiv(slab, ROWS) * MODELS, splits, GROUP)
    row = tile // MODELS * ROWS
    count = tl.load(count_ptr)
    if first_row + row >= count:
        return
    kept = count - first_row
    start = split * share
    stop = min(start + share, V)
    model = tile % MODELS
    shares = tl.cdiv(V, COLUMNS) if SPECIALIZE else splits
    out = sums_ptr + (model * shares + (0 if SPECIALIZE else split)).to(tl.int64) * slab
    if MORE:
        order_ptr += first_row
    if model == 0:
        _sweep_vocabulary(
            x, w, bias_ptr, index_ptr, order_ptr, label_logit_ptr, out,
            row, start, stop, slab, kept, V, D,
            x_stride, w_stride, field_stride,
            scale, cap, HAS_BIAS, SOFTCAP, MOMENTS, MORE, ROWS, COLUMNS, DEPTH, TMA, SPECIALIZE, PRECISION,
        )  # fmt: skip
    if PAIR:
        if model == 1:
            if MORE:
                label_logit_ptr += label_logit_stride
            _sweep_vocabulary(
                history_x, history_w, bias_ptr, index_ptr, order_ptr, label_logit_ptr, out,
                row, start, stop, slab, kept, V, history_D,
                history_x_stride, history_w_stride, field_stride,
                scale, cap, HAS_BIAS, SOFTCAP, MOMENTS, MORE, ROWS, COLUMNS, DEPTH, TMA, SPECIALIZE, PRECISION,
            )  # fmt: skip


@triton.jit
def _merge_shares_kernel(
    sums_ptr, order_ptr, count_ptr, stats_ptr,  # pointers
    first_row, slab, shares,  # shapes
    sums_stride, field_stride, model_stride,  # strides
    constant, MOMENTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, SHARES: tl.constexpr,  # constants
):  # fmt: skip
    """Statistics of ROWS rows of one model, in nats, from sums over shares of the vocabulary, SHARES at a time."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (place < slab) & (first_row + place < tl.load(count_ptr))
    model = tl.program_id(1).to(tl.int64)
    sums_ptr += model * shares * slab
    top = tl.full([ROWS], -float("inf"), tl.float32)
    target = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    logits = tl.zeros([ROWS], tl.float32)
    above = tl.zeros([ROWS], tl.float32)
    for first_share in range(0, shares, SHARES):
        share = first_share + tl.arange(0, SHARES)
        at = sums_ptr + share.to(tl.int64)[:, None] * slab + place[None, :]  # (SHARES, ROWS)
        inside = (share < shares)[:, None] & mask[None, :]
        share_top = tl.load(at, mask=inside, other=-float("inf"))
        share_total = tl.load(at + sums_stride, mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(share_top, 0))
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        # as in `online_softmax`, once for what was summed before and once for each share
        shift = tl.where(top == -float("inf"), 0.0, tl.maximum(top - pivot, NOTHING))
        share_shift = tl.where(share_top == -float("inf"), 0.0, tl.maximum(share_top - pivot[None, :], NOTHING))
        old, new = tl.exp2(shift), tl.exp2(share_shift)
        if MOMENTS:
            share_target = tl.load(at + 2 * sums_stride, mask=inside, other=-float("inf"))
            target = tl.maximum(target, tl.max(share_target, 0))
            share_first = tl.load(at + 3 * sums_stride, mask=inside, other=0.0)
            share_second = tl.load(at + 4 * sums_stride, mask=inside, other=0.0)
            share_second += 2.0 * share_shift * share_first + share_shift * share_shift * share_total
            second = old * (second + 2.0 * shift * first + shift * shift * total) + tl.sum(new * share_second, 0)
            first = old * (first + shift * total) + tl.sum(new * (share_first + share_shift * share_total), 0)
        if MORE:
            share_square = tl.load(at + 5 * sums_stride, mask=inside, other=0.0)
            square = old * old * square + tl.sum(new * new * share_square, 0)
            logits += tl.sum(tl.load(at + 6 * sums_stride, mask=inside, other=0.0), 0)
            above += tl.sum(tl.load(at + 7 * sums_stride, mask=inside, other=0.0), 0)
        total = old * total + tl.sum(new * share_total, 0)
        top = new_top
    row = tl.load(order_ptr + first_row + place, mask=mask, other=0).to(tl.int64)
    out = stats_ptr + model * model_stride + row
    lse = (top + tl.log2(total) + constant) * LN_2
    if MOMENTS:
        mean = first / total
        tl.store(out + field_stride, (target + constant) * LN_2, mask=mask)
        tl.store(out + 2 * field_stride, (tl.log2(total) - mean) * LN_2, mask=mask)
        tl.store(out + 3 * field_stride, (second / total - mean * mean) * (LN_2 * LN_2), mask=mask)
        tl.store(out + 4 * field_stride, (top + constant) * LN_2, mask=mask)
    else:  # the label's logit is another sum of the same products, and no likelihood is above 1
        label_logit = tl.load(out + field_stride, mask=mask, other=0.0)
        tl.store(out + field_stride, tl.minimum(label_logit, lse), mask=mask)
    if MORE:
        tl.store(out + 5 * field_stride, (2.0 * tl.log2(total) - tl.log2(square)) * LN_2, mask=mask)
        tl.store(out + 6 * field_stride, logits * LN_2, mask=mask)
        tl.store(out + 7 * field_stride, above, mask=mask)
    tl.store(out, lse, mask=mask)


def vocabulary_share(row_tiles: int, column_tiles: int, processors: int) -> int:
    """Column tiles that a program sweeps, for the least time: whole waves of programs, each with a fill of its own."""

    def time(share: int) -> tuple[float, int]:
        programs = row_tiles * triton.cdiv(column_tiles, share)
        return triton.cdiv(programs, processors) * (share + FILL), -share

    return min(range(1, column_tiles + 1), key=time)


def _slab_rows(N: int, tile: ProductTile) -> int:
    """Rows that are gathered and swept together: as many tiles as stay in L2, for each model."""
    return min(triton.cdiv(N, tile.rows), GROUP) * tile.rows


def hidden_stats(
    models: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    more: bool = False,
    label_logit: Tensor | None = None,
) -> Tensor:
    """Statistics of one or two models on the same labels.

    Args:
        models: (hidden [N, D], weight [V, D]) of each, float16, bfloat16 or float32; D may differ.
        labels: [N] int64; rows that equal `ignore_index` are not read.
        bias: [V] or None.
        label_logit: [models, N] float32, the label's logit in the whole vocabulary; needed for the rank alone.
    Returns:
        [fields, models, N] float32, the fields of TokenStats: lse, target logit and, with `entropy`, entropy, variance
        of log p, largest logit; with `more` these and Rényi-2 entropy, sum of the logits, rank of `label_logit`. A
        label outside the vocabulary has the target logit -inf, an ignored row the lse, too.
    """
    (x, w), (history_x, history_w) = models[0], models[-1]
    N, V = len(x), len(w)
    D, history_D = x.shape[1], history_x.shape[1]
    device, MODELS = labels.device, len(models)
    entropy = entropy or more
    fields = 8 if more else 5 if entropy else 2
    stats = torch.full((fields, MODELS, N), -torch.inf, dtype=torch.float32, device=device)
    stats[2:4].zero_()
    stats[5:].zero_()
    if not N:
        return stats
    if more and label_logit is None:  # nothing exceeds it
        label_logit = torch.full((MODELS, N), torch.inf, dtype=torch.float32, device=device)
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    x, w, history_x, history_w = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, w, history_x, history_w))
    plain = softcap is None and not entropy
    tile = product_tile(x, "stats" if plain else "full_stats", w, history_w)
    kind = softcap_kind(softcap)
    # tanh takes registers; so do a ragged vocabulary's masks where a thread has a whole row, and eight sums beside more
    ragged = V % 16 != 0
    crowded = ragged or bias is not None or softcap is not None or x.dtype == torch.float32
    if kind == "large" or (tile.specialize and ragged) or (more and crowded):
        tile = dataclasses.replace(tile, columns=tile.columns // 2, specialize=False)
    slab = _slab_rows(N, tile)
    row_tiles, column_tiles = slab // tile.rows * MODELS, triton.cdiv(V, tile.columns)
    share = vocabulary_share(row_tiles, column_tiles, tile.processors) * tile.columns
    splits = triton.cdiv(V, share)
    gathered = [empty_rows(slab, d, x) for d in (D, history_D)[:MODELS]]
    index = torch.empty(slab, dtype=torch.int32, device=device)
    specialize = tile.specialize and not entropy
    shares = column_tiles if specialize else splits
    sums = torch.empty(fields, MODELS, shares, slab, dtype=torch.float32, device=device)
    out, history_out = gathered[0], gathered[-1]
    sources = [tile_source(t, tile.rows, tile.depth, tile) for t in (out, history_out)]
    heads = [tile_source(t, tile.columns, tile.depth, tile) for t in (w, history_w)]
    scale, cap = exponents(softcap, logit_scale, kind)
    head = {"PAIR": MODELS == 2, "HAS_BIAS": bias is not None}
    order, count = kept_rows(labels != ignore_index)
    with on_device(x):
        for first in range(0, N, slab):
            _gather_slab_kernel[(min(slab, N - first), MODELS)](
                x, w, history_x, history_w, bias, labels, order, count, out, history_out, index, stats,
                first, V, D, history_D,
                *(t.stride(0) for t in (x, w, history_x, history_w, out, history_out)), *stats.stride()[:2],
                logit_scale, softcap or 1.0, **head, HAS_SOFTCAP=softcap is not None, TARGET=not entropy,
                BLOCK=128 if interpreting() else 1024, num_warps=4,
            )  # fmt: skip
            _hidden_stats_kernel[(row_tiles * splits,)](
                sources[0], heads[0], sources[1], heads[1], bias, index, count, order if more else None,
                label_logit, sums,
                first, slab, V, D, history_D, share, splits,
                *(t.stride(0) for t in (out, w, history_out, history_w)), label_logit.stride(0) if more else None,
                sums.stride(0),
                scale, cap, **head, SOFTCAP=kind, MOMENTS=entropy, MORE=more, SPECIALIZE=specialize,
                **tile.constants(),
            )  # fmt: skip
            _merge_shares_kernel[(triton.cdiv(slab, 32), MODELS)](
                sums, order, count, stats,
                first, slab, shares,
                sums.stride(0), *stats.stride()[:2],
                cap if kind == "small" else 0.0, MOMENTS=entropy, MORE=more, ROWS=32, SHARES=16, num_warps=4,
            )  # fmt: skip
    return stats
