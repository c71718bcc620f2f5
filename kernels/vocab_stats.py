"""Hidden states -> per-token statistics of one or two models.

One launch serves both models. Each program owns a tile of rows and a share of the vocabulary: tile
product, online softmax, target logit, all in registers; nothing of width V is written. Operations: 2 N V D a model.
Bytes: a group of row tiles stays in L2 while the head streams by, so the head is read once a group, 2 V D bytes, and
the results are a few floats a row and share. A fixed order of merging makes it deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.primitives import grouped_tile, store_sums, take_logits, tile_logits
from tokensel_kernels.tiles import aligned, product_tile, tile_source


@triton.jit
def _sweep_vocabulary(
    x, w, bias_ptr, label_ptr, sums_ptr,  # pointers
    row, start, stop, N, V, D,  # shapes
    x_stride, w_stride, field_stride,  # strides
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    """Statistics of ROWS rows over the columns [start, stop) of one model's vocabulary."""
    rows = row + tl.arange(0, ROWS)
    label = tl.load(label_ptr + rows, mask=rows < N, other=-1)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    target = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    for column in range(start, stop, COLUMNS):
        z = tile_logits(
            x, w, bias_ptr,
            row, column, N, V, D,
            x_stride, w_stride,
            logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
        )  # fmt: skip
        columns = column + tl.arange(0, COLUMNS)
        top, total, target, first, second = take_logits(
            z, columns, stop, label, top, total, target, first, second, ENTROPY
        )
    store_sums(sums_ptr, rows, rows < N, field_stride, top, total, target, first, second, ENTROPY)


@triton.jit
def _hidden_stats_kernel(
    x, w, history_x, history_w, bias_ptr, label_ptr, sums_ptr,  # pointers
    N, V, D, history_D, share, splits,  # shapes
    x_stride, w_stride, history_x_stride, history_w_stride, field_stride,  # strides
    logit_scale, softcap, ignore_index, PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    MODELS: tl.constexpr = 2 if PAIR else 1
    # the two models' tiles of the same rows are neighbours, so that a shared head's tile is used twice
    tile, split = grouped_tile(tl.program_id(0), tl.cdiv(N, ROWS) * MODELS, splits, GROUP)
    row = tile // MODELS * ROWS
    rows = row + tl.arange(0, ROWS)
    label = tl.load(label_ptr + rows, mask=rows < N, other=ignore_index)
    if tl.sum((label != ignore_index).to(tl.int32)) == 0:  # a tile of prompt costs nothing
        return
    start = split * share
    stop = min(start + share, V)
    model = tile % MODELS
    out = sums_ptr + (model * splits + split).to(tl.int64) * N
    if model == 0:
        _sweep_vocabulary(
            x, w, bias_ptr, label_ptr, out,
            row, start, stop, N, V, D,
            x_stride, w_stride, field_stride,
            logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, ENTROPY, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
        )  # fmt: skip
    if PAIR:
        if model == 1:
            _sweep_vocabulary(
                history_x, history_w, bias_ptr, label_ptr, out,
                row, start, stop, N, V, history_D,
                history_x_stride, history_w_stride, field_stride,
                logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, ENTROPY, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
            )  # fmt: skip


def vocabulary_splits(row_tiles: int, column_tiles: int, processors: int) -> int:
    """Into how many shares the vocabulary is split: for eight waves of programs, so that the last one costs little."""
    return max(1, min(column_tiles, triton.cdiv(8 * processors, row_tiles)))


def hidden_sums(
    models: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
) -> Tensor:
    """Sums of one or two models over shares of the vocabulary, from which statistics follow.

    Args:
        models: (hidden [N, D], weight [V, D]) of each, float16, bfloat16 or float32; D may differ.
        labels: [N] int64; rows that equal `ignore_index` may be left unwritten.
        bias: [V] or None.
    Returns:
        [fields, models, splits, N] float32 sums over each share as `online_softmax` defines them: top, total, target
        logit (-inf where the label is in another share) and, with `entropy`, first and second.
    """
    (x, w), (history_x, history_w) = models[0], models[-1]
    N, V = len(x), len(w)
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    fields = 5 if entropy else 3
    if not N:
        return torch.empty(fields, len(models), 1, 0, dtype=torch.float32, device=labels.device)
    plain = bias is None and softcap is None and not entropy
    tile = product_tile(x, "stats" if plain else "full_stats")
    x, w, history_x, history_w = (aligned(t) for t in (x, w, history_x, history_w))
    strides = [t.stride(0) for t in (x, w, history_x, history_w)]
    x, history_x = (tile_source(t, tile.rows, tile.depth, tile) for t in (x, history_x))
    w, history_w = (tile_source(t, tile.columns, tile.depth, tile) for t in (w, history_w))
    row_tiles = triton.cdiv(N, tile.rows) * len(models)
    splits = vocabulary_splits(row_tiles, triton.cdiv(V, tile.columns), tile.processors)
    share = triton.cdiv(triton.cdiv(V, tile.columns), splits) * tile.columns
    splits = triton.cdiv(V, share)
    sums = torch.empty(fields, len(models), splits, N, dtype=torch.float32, device=labels.device)
    shapes = (N, V, models[0][0].shape[1], models[-1][0].shape[1], share, splits)
    head = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None, "ENTROPY": entropy}
    _hidden_stats_kernel[(row_tiles * splits,)](
        x, w, history_x, history_w, bias, labels, sums,
        *shapes,
        *strides, sums.stride(0),
        logit_scale, softcap or 1.0, ignore_index, PAIR=len(models) == 2, **head, **tile.constants(),
    )  # fmt: skip
    return sums
