"""Hidden states or logits -> per-token statistics of one or two models.

From hidden states, one launch serves both models. Each program owns a tile of rows and a share of the vocabulary: tile
product, online softmax, target logit, all in registers; nothing of width V is written. Operations: 2 N V D a model.
Bytes: a group of row tiles stays in L2 while the head streams by, so the head is read once a group, 2 V D bytes, and
the results are a few floats a row and share. A fixed order of merging makes it deterministic.

The contrast of two models, (1 + beta) z - beta z_old, is formed in the same registers: without a softcap one
accumulator takes both products, 2 N V (D + D_old) operations.

From logits, each is read once: N V elements a model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.primitives import add_product, grouped_tile, head_logits, store_sums, take_logits, tile_logits
from tokensel_kernels.tiles import aligned, product_tile, row_columns, tile_source


@triton.jit
def _sweep_vocabulary(
    x,
    w,
    bias_ptr,
    label_ptr,
    sums_ptr,
    row,
    start,
    stop,
    N,
    V,
    D,
    x_stride,
    w_stride,
    field_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
            x, w, bias_ptr, row, column, N, V, D, x_stride, w_stride, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
        )  # fmt: skip
        columns = column + tl.arange(0, COLUMNS)
        top, total, target, first, second = take_logits(
            z, columns, stop, label, top, total, target, first, second, MOMENTS
        )
    store_sums(sums_ptr, rows, rows < N, field_stride, top, total, target, first, second, MOMENTS)


@triton.jit
def _hidden_stats_kernel(
    x,
    w,
    old_x,
    old_w,
    bias_ptr,
    label_ptr,
    sums_ptr,
    N,
    V,
    D,
    old_D,
    share,
    splits,
    x_stride,
    w_stride,
    old_x_stride,
    old_w_stride,
    field_stride,
    logit_scale,
    softcap,
    ignore_index,
    PAIR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
            x_stride, w_stride, field_stride, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, MOMENTS, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
        )  # fmt: skip
    if PAIR:
        if model == 1:
            _sweep_vocabulary(
                old_x, old_w, bias_ptr, label_ptr, out,
                row, start, stop, N, V, old_D,
                old_x_stride, old_w_stride, field_stride, logit_scale, softcap,
                HAS_BIAS, HAS_SOFTCAP, MOMENTS, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
            )  # fmt: skip


@triton.jit
def _contrast_stats_kernel(
    x,
    w,
    old_x,
    old_w,
    bias_ptr,
    label_ptr,
    sums_ptr,
    N,
    V,
    D,
    old_D,
    share,
    splits,
    x_stride,
    w_stride,
    old_x_stride,
    old_w_stride,
    field_stride,
    beta,
    logit_scale,
    softcap,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Statistics of softmax((1 + beta) z - beta z_old) of a tile of rows over a share of the vocabulary."""
    row_tile, split = grouped_tile(tl.program_id(0), tl.cdiv(N, ROWS), splits, GROUP)
    row = row_tile * ROWS
    rows = row + tl.arange(0, ROWS)
    label = tl.load(label_ptr + rows, mask=rows < N, other=ignore_index)
    if tl.sum((label != ignore_index).to(tl.int32)) == 0:
        return
    start = split * share
    stop = min(start + share, V)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    target = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    for column in range(start, stop, COLUMNS):
        z = add_product(
            tl.zeros([ROWS, COLUMNS], tl.float32), old_x, old_w, row, column, N, V, old_D, old_x_stride, old_w_stride,
            ROWS, COLUMNS, DEPTH, TMA, PRECISION,
        )  # fmt: skip
        if HAS_SOFTCAP:  # which is not linear: each model's logits stand alone
            z = head_logits(z, bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, True, COLUMNS)
            z = (1.0 + beta) * tile_logits(
                x, w, bias_ptr, row, column, N, V, D, x_stride, w_stride, logit_scale, softcap,
                HAS_BIAS, True, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
            ) - beta * z  # fmt: skip
        else:  # (1 + beta) (x w - beta / (1 + beta) old_x old_w) + bias
            z = (1.0 + beta) * add_product(
                z * (-beta / (1.0 + beta)), x, w, row, column, N, V, D, x_stride, w_stride,
                ROWS, COLUMNS, DEPTH, TMA, PRECISION,
            )  # fmt: skip
            z = head_logits(z, bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, False, COLUMNS)
        columns = column + tl.arange(0, COLUMNS)
        top, total, target, first, second = take_logits(
            z, columns, stop, label, top, total, target, first, second, MOMENTS
        )
    out = sums_ptr + split.to(tl.int64) * N
    store_sums(out, rows, rows < N, field_stride, top, total, target, first, second, MOMENTS)


@triton.jit
def _sweep_row(
    z_ptr, old_z_ptr, bias_ptr, label, sums_ptr, row, V, field_stride, beta, logit_scale, softcap,
    CONTRAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MOMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Statistics of one row of logits, or of the contrast of two."""
    top = tl.full([1], -float("inf"), tl.float32)
    target = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    first = tl.zeros([1], tl.float32)
    second = tl.zeros([1], tl.float32)
    for column in range(0, V, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = columns < V
        z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        z = head_logits(z, bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, COLUMNS)
        if CONTRAST:
            old = tl.load(old_z_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            old = head_logits(old, bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, COLUMNS)
            z = (1.0 + beta) * z - beta * old
        top, total, target, first, second = take_logits(
            z, columns, V, label + tl.zeros([1], tl.int64), top, total, target, first, second, MOMENTS
        )
    one = row + tl.zeros([1], tl.int32)
    store_sums(sums_ptr, one, one >= 0, field_stride, top, total, target, first, second, MOMENTS)


@triton.jit
def _logits_stats_kernel(
    z_ptr,
    old_z_ptr,
    bias_ptr,
    label_ptr,
    sums_ptr,
    first_column,
    V,
    z_stride,
    old_z_stride,
    field_stride,
    model_stride,
    beta,
    logit_scale,
    softcap,
    ignore_index,
    PAIR: tl.constexpr,
    CONTRAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(label_ptr + row)
    if label == ignore_index:
        return
    label -= first_column
    at = row.to(tl.int64)
    z_ptr += at * z_stride
    old_z_ptr += at * old_z_stride
    _sweep_row(
        z_ptr, old_z_ptr, bias_ptr, label, sums_ptr, row, V, field_stride, beta, logit_scale, softcap,
        CONTRAST, HAS_BIAS, HAS_SOFTCAP, MOMENTS, COLUMNS,
    )  # fmt: skip
    if PAIR:
        _sweep_row(
            old_z_ptr, old_z_ptr, bias_ptr, label, sums_ptr + model_stride, row, V, field_stride, beta, logit_scale,
            softcap, False, HAS_BIAS, HAS_SOFTCAP, MOMENTS, COLUMNS,
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
    moments: bool,
    ignore_index: int,
    contrast: float | None = None,
) -> Tensor:
    """Sums of one or two models, or of their contrast, over shares of the vocabulary, from which statistics follow.

    Args:
        models: (hidden [N, D], weight [V, D]) of each, float16, bfloat16 or float32; D may differ.
        labels: [N] int64; rows that equal `ignore_index` may be left unwritten.
        bias: [V] or None.
        contrast: beta of (1 + beta) z - beta z_old, for which two models count as one; None means each for itself.
    Returns:
        [fields, models, splits, N] float32 sums over each share as `online_softmax` defines them: top, total, target
        logit (-inf where the label is in another share) and, with `moments`, first and second.
    """
    (x, w), (old_x, old_w) = models[0], models[-1]
    N, V = len(x), len(w)
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    fields = 5 if moments else 3
    results = 1 if contrast is not None else len(models)
    if not N:
        return torch.empty(fields, results, 1, 0, dtype=torch.float32, device=labels.device)
    plain = bias is None and softcap is None and not moments
    tile = product_tile(x, "stats" if plain else "full_stats" if contrast is None else "full_contrast")
    x, w, old_x, old_w = (aligned(t) for t in (x, w, old_x, old_w))
    strides = [t.stride(0) for t in (x, w, old_x, old_w)]
    x, old_x = (tile_source(t, tile.rows, tile.depth, tile) for t in (x, old_x))
    w, old_w = (tile_source(t, tile.columns, tile.depth, tile) for t in (w, old_w))
    row_tiles = triton.cdiv(N, tile.rows) * results
    splits = vocabulary_splits(row_tiles, triton.cdiv(V, tile.columns), tile.processors)
    share = triton.cdiv(triton.cdiv(V, tile.columns), splits) * tile.columns
    splits = triton.cdiv(V, share)
    sums = torch.empty(fields, results, splits, N, dtype=torch.float32, device=labels.device)
    shapes = (N, V, models[0][0].shape[1], models[-1][0].shape[1], share, splits)
    head = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None, "MOMENTS": moments}
    if contrast is not None:
        _contrast_stats_kernel[(row_tiles * splits,)](
            x, w, old_x, old_w, bias, labels, sums, *shapes, *strides, sums.stride(0),
            float(contrast), logit_scale, softcap or 1.0, ignore_index, **head, **tile.constants(),
        )  # fmt: skip
    else:
        _hidden_stats_kernel[(row_tiles * splits,)](
            x, w, old_x, old_w, bias, labels, sums, *shapes, *strides, sums.stride(0),
            logit_scale, softcap or 1.0, ignore_index, PAIR=len(models) == 2, **head, **tile.constants(),
        )  # fmt: skip
    return sums


def write_logits_sums(
    logits: list[Tensor],
    labels: Tensor,
    sums: Tensor,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int,
    contrast: float | None = None,
) -> None:
    """Sums of one or two models' logits, or of their contrast, over a share of the vocabulary, each read once.

    Args:
        logits: [N, C] of each model, any floating dtype: vocabulary columns from `first_column` on.
        labels: [N] int64 in the whole vocabulary.
        sums: [fields, models, N] float32 to write, the last dimension contiguous: one share of what `hidden_sums`
            gives. Rows to ignore are left as they are.
        bias: [C] or None.
        contrast: as in `hidden_sums`.
    """
    N, C = logits[0].shape
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    z, old_z = (t if t.stride(-1) == 1 else t.contiguous() for t in (logits[0], logits[-1]))
    pair = len(logits) == 2 and contrast is None
    if N:
        _logits_stats_kernel[(N,)](
            z, old_z, bias, labels, sums,
            first_column, C, z.stride(0), old_z.stride(0), sums.stride(0), sums.stride(1),
            float(contrast or 0.0), logit_scale, softcap or 1.0, ignore_index,
            PAIR=pair, CONTRAST=contrast is not None,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, MOMENTS=len(sums) == 5,
            COLUMNS=row_columns(z), num_warps=8,
        )  # fmt: skip
