"""The backward of the selected cross-entropy on kept rows, a block of the vocabulary at a time.

The forward's lse is known, so a block of logits turns into its gradient in the registers that computed it:
dz = c · (exp(z - lse) - onehot) · dz/du, the one-hot subtracted in float32 before dz is rounded to the inputs' type.
Then dX += dz W_block (float32 buffer) and dW_block = dzᵀ X, each block of dW written once after full-length float32
accumulation. Three products of 2 K V D operations for K kept rows, two with a frozen head; no atomics, deterministic.

How many rows are kept stays on the device: kept rows are gathered to the front, and every kernel stops at the count it
reads there, so the host never waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.primitives import grouped_tile, head_logits, load_tile, multiply, tile_logits
from tokensel_kernels.tiles import aligned, product_tile, row_columns, tile_source

BLOCK_COLUMNS = 8192  # of the vocabulary: dz of 8,192 kept rows is 128 MiB in bfloat16


@triton.jit
def _gather_rows_kernel(
    x_ptr, order_ptr, count_ptr, out_ptr,  # pointers
    D,  # shapes
    x_stride, out_stride,  # strides
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # constants
):  # fmt: skip
    """out[i] = x[order[i]] for i < count, zeros to the end of the last tile of ROWS; the rest is not written."""
    row = tl.program_id(0)
    count = tl.load(count_ptr)
    if row >= tl.cdiv(count, ROWS) * ROWS:
        return
    source = x_ptr + tl.load(order_ptr + row) * x_stride
    target = out_ptr + row.to(tl.int64) * out_stride
    for column in range(0, D, COLUMNS):
        c = column + tl.arange(0, COLUMNS)
        tl.store(target + c, tl.load(source + c, mask=(c < D) & (row < count), other=0.0), mask=c < D)


@triton.jit
def _logits_gradient(z, columns, label, lse, coefficient, softcap, HAS_SOFTCAP: tl.constexpr):
    """c · (softmax(z) - onehot) · dz/du of a tile, u being the logits before the softcap. (ROWS, COLUMNS)"""
    dz = tl.exp(z - lse[:, None]) - (columns.to(tl.int64)[None, :] == label[:, None]).to(tl.float32)
    if HAS_SOFTCAP:
        slope = z / softcap
        dz *= 1.0 - slope * slope
    return dz * coefficient[:, None]


@triton.jit
def _block_gradient_kernel(
    z_ptr, bias_ptr, label_ptr, lse_ptr, coefficient_ptr, dz_ptr,  # pointers
    first_column, C,  # shapes
    z_stride, dz_stride,  # strides
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,  # constants
):  # fmt: skip
    """dz of a row of C products with the head, columns of the vocabulary from first_column on."""
    row = tl.program_id(0) + tl.arange(0, 1)
    at = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    lse = tl.load(lse_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    for column in range(0, C, COLUMNS):
        c = column + tl.arange(0, COLUMNS)
        z = tl.load(z_ptr + at * z_stride + c, mask=c < C, other=0.0)[None, :]
        z = head_logits(z, bias_ptr, column, C, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, COLUMNS)
        dz = _logits_gradient(z, first_column + c, label, lse, coefficient, softcap, HAS_SOFTCAP)
        tl.store(dz_ptr + at * dz_stride + c[None, :], dz.to(dz_ptr.dtype.element_ty), mask=(c < C)[None, :])


@triton.jit
def _logits_gradient_kernel(
    x, w, bias_ptr, label_ptr, lse_ptr, coefficient_ptr, count_ptr, dz_ptr,  # pointers
    first_column, N, V, D, width,  # shapes
    x_stride, w_stride, dz_stride,  # strides
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    """dz[:, j] of vocabulary columns first_column + j for j < width, of the first `count` rows.

    Zero in the tiles' rows and columns past those: the products that follow may read whole tiles.
    """
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(count, ROWS)
    column_tiles = tl.cdiv(width, COLUMNS)
    if tl.program_id(0) >= row_tiles * column_tiles:
        return
    row_tile, column_tile = grouped_tile(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row = row_tile * ROWS
    column = first_column + column_tile * COLUMNS
    z = tile_logits(
        x, w, bias_ptr,
        row, column, N, V, D,
        x_stride, w_stride,
        logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, ROWS, COLUMNS, DEPTH, TMA, PRECISION,
    )  # fmt: skip
    rows = row + tl.arange(0, ROWS)
    kept = rows < count
    label = tl.load(label_ptr + rows, mask=kept, other=-1)
    lse = tl.load(lse_ptr + rows, mask=kept, other=0.0)
    coefficient = tl.load(coefficient_ptr + rows, mask=kept, other=0.0)
    columns = column + tl.arange(0, COLUMNS)
    dz = _logits_gradient(z, columns, label, lse, coefficient, softcap, HAS_SOFTCAP)
    dz = tl.where(kept[:, None] & (columns < V)[None, :], dz, 0.0)
    at = rows.to(tl.int64)[:, None] * dz_stride + (columns - first_column)[None, :]
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit
def _hidden_gradient_kernel(
    dz, w, dx_ptr, count_ptr,  # pointers
    first_column, N, V, D, width,  # shapes
    dz_stride, w_stride, dx_stride,  # strides
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    """dx += dz W_block over `width` vocabulary columns: (K, C) · (C, D) -> (K, D) float32."""
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(count, ROWS)
    column_tiles = tl.cdiv(D, COLUMNS)
    if tl.program_id(0) >= row_tiles * column_tiles:
        return
    row_tile, column_tile = grouped_tile(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row = row_tile * ROWS
    column = column_tile * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, width, DEPTH):
        a = load_tile(dz, row, k, N, width, dz_stride, ROWS, DEPTH, TMA)
        b = load_tile(w, first_column + k, column, V, D, w_stride, DEPTH, COLUMNS, TMA)
        total = multiply(a, b, total, PRECISION)
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * dx_stride + columns[None, :]
    tl.store(dx_ptr + at, tl.load(dx_ptr + at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _head_gradient_kernel(
    dz, x, dw_ptr, dbias_ptr, count_ptr,  # pointers
    first_column, N, V, D, width,  # shapes
    dz_stride, x_stride, dw_stride,  # strides
    WANT_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    """dW_block = dzᵀ X over the kept rows: (C, K) · (K, D) -> (C, D), written once, in the head's type."""
    # with the bias alone there is one column tile
    column_tiles = tl.cdiv(D, COLUMNS) if dw_ptr is not None else 1
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(width, ROWS), column_tiles, GROUP)
    row = row_tile * ROWS  # of the block of the vocabulary
    column = column_tile * COLUMNS
    count = tl.load(count_ptr)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias = tl.zeros([ROWS], tl.float32)
    for k in range(0, count, DEPTH):
        a = load_tile(dz, k, row, N, width, dz_stride, DEPTH, ROWS, TMA)
        b = load_tile(x, k, column, N, D, x_stride, DEPTH, COLUMNS, TMA)
        total = multiply(a.T, b, total, PRECISION)
        if WANT_BIAS:
            bias += tl.sum(a.to(tl.float32), 0)
    rows = first_column + row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    real = rows < min(V, first_column + width)
    at = rows.to(tl.int64)[:, None] * dw_stride + columns[None, :]
    if dw_ptr is not None:
        tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=real[:, None] & (columns < D)[None, :])
    if WANT_BIAS:
        if column == 0:
            tl.store(dbias_ptr + rows, bias.to(dbias_ptr.dtype.element_ty), mask=real)


def selected_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ coefficient · nll in hidden, weight and bias, as far as `want` asks for them.

    Args:
        hidden: [N, D], weight: [V, D], bias: [V] or None, of one type: float16, bfloat16 or float32.
        labels: [N] int64. coefficient: [N] float32, 0 = row not read. lse: [N] float32 of the same logits.
    """
    N, D = hidden.shape
    V = len(weight)
    want_hidden, want_weight, want_bias = want
    if not N:  # a descriptor of no rows cannot be made
        return tuple(
            torch.zeros_like(t) if wanted else None for t, wanted in zip((hidden, weight, bias), want, strict=True)
        )
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    weight, bias = aligned(weight), None if bias is None else bias.contiguous()
    tile, plain = product_tile(hidden, "gradient"), product_tile(hidden, "matmul")
    dropped = coefficient == 0
    order = torch.argsort(dropped, stable=True)  # kept rows first, in their order
    count = (~dropped).sum(dtype=torch.int32)
    compact = aligned(torch.empty(N, D, dtype=hidden.dtype, device=hidden.device))
    _gather_rows_kernel[(N,)](
        hidden, order, count, compact,
        D,
        hidden.stride(0), compact.stride(0),
        ROWS=tile.rows, COLUMNS=1024, num_warps=4,
    )  # fmt: skip
    y, log_z, c = labels[order], lse[order], coefficient[order] * logit_scale
    width = min(BLOCK_COLUMNS, triton.cdiv(V, tile.columns) * tile.columns)
    dz = torch.empty(N, width, dtype=hidden.dtype, device=hidden.device)
    dx = torch.zeros(N, D, dtype=torch.float32, device=hidden.device) if want_hidden else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    db = torch.empty_like(bias) if want_bias else None
    # the same matrices, cut as each kernel reads them
    x, w = (tile_source(m, n, tile.depth, tile) for m, n in ((compact, tile.rows), (weight, tile.columns)))
    dz_by_depth = tile_source(dz, plain.rows, plain.depth, plain)
    w_by_depth = tile_source(weight, plain.depth, plain.columns, plain)
    dz_by_row = tile_source(dz, plain.depth, plain.rows, plain)
    x_by_row = tile_source(compact, plain.depth, plain.columns, plain)
    for first in range(0, V, width):
        block = min(width, V - first)
        _logits_gradient_kernel[(triton.cdiv(N, tile.rows) * triton.cdiv(block, tile.columns),)](
            x, w, bias, y, log_z, c, count, dz,
            first, N, V, D, block,
            compact.stride(0), weight.stride(0), dz.stride(0),
            logit_scale, softcap or 1.0, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, **tile.constants(),
        )  # fmt: skip
        columns = triton.cdiv(D, plain.columns)
        if want_hidden:
            _hidden_gradient_kernel[(triton.cdiv(N, plain.rows) * columns,)](
                dz_by_depth, w_by_depth, dx, count,
                first, N, V, D, block,
                dz.stride(0), weight.stride(0), dx.stride(0),
                **plain.constants(),
            )  # fmt: skip
        if want_weight or want_bias:
            _head_gradient_kernel[(triton.cdiv(block, plain.rows) * (columns if want_weight else 1),)](
                dz_by_row, x_by_row, dw, db, count,
                first, N, V, D, block,
                dz.stride(0), compact.stride(0), dw.stride(0) if want_weight else 0,
                WANT_BIAS=want_bias, **plain.constants(),
            )  # fmt: skip
    if want_hidden:
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        gradient[order] = dx.to(hidden.dtype)  # every row: those that were dropped are zero
        dx = gradient
    return dx, dw, db


def write_block_gradient(
    z: Tensor,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    dz: Tensor,
    *,
    first_column: int,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Gradient of Σ coefficient · nll in the products of hidden states with a block of the head.

    Args:
        z: [K, C] float32 products with vocabulary rows from `first_column` on, last dimension contiguous.
        labels: [K] int64 in the whole vocabulary. coefficient, lse: [K] float32. bias: [C] or None.
        dz: [K, C] to write, in the type of the products that follow; last dimension contiguous.
    """
    K, C = z.shape
    _block_gradient_kernel[(K,)](
        z, bias, labels, lse, coefficient * logit_scale, dz,
        first_column, C,
        z.stride(0), dz.stride(0),
        logit_scale, softcap or 1.0, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        COLUMNS=row_columns(z), num_warps=8,
    )  # fmt: skip
