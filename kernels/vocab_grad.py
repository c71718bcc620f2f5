"""The backward of the selected cross-entropy on kept rows, a block of the vocabulary at a time.

The forward's lse is known, so a block of logits turns into its gradient in the registers that computed it:
dz = c · (exp(z - lse) - onehot) · dz/du, the one-hot subtracted in float32 before dz is rounded to the inputs' type.
Then dX += dz W_block (float32 buffer) and dW_block = dzᵀ X, each block of dW written once after full-length float32
accumulation. Three products of 2 K V D operations for K kept rows, two with a frozen head. Deterministic: an element of
dX gets exactly one addition a launch, and launches follow one another on the stream.

How many rows are kept stays on the device: kept rows are gathered to the front, and every kernel stops at the count it
reads there, so the host never waits. Products are persistent: as many programs as the chip holds stride over the tiles,
in one flattened loop, so that the next tile's loads run under what is done with the last.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.block_grad import load_terms, logits_gradient, scaled_terms
from tokensel_kernels.gather_rows import gather_rows, scatter_rows
from tokensel_kernels.primitives import exponents, grouped_tile, load_tile, multiply, softcap_kind
from tokensel_kernels.tiles import (
    ProductTile,
    interpreting,
    on_device,
    product_tile,
    tile_source,
)

BLOCK_BYTES = 2**28  # of dz, at most: with 8,192 rows and D = 4,096 the backward holds 448 MiB beside the gradients


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _logits_gradient_kernel(
    x, w, bias_ptr, label_ptr, lse_ptr, coefficient_ptr, terms_ptr, count_ptr, dz,  # pointers
    first_column, N, V, D, width,  # shapes
    x_stride, w_stride, dz_stride,  # strides
    scale, cap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TERMS: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr,  # constants
):  # fmt: skip
    """dz[:, j] of vocabulary columns first_column + j for j < width, of the first `count` rows.

    Zero in the tiles' rows and columns past those: the products that follow may read whole tiles. TAIL says that there
    are such columns.
    """
    HALF: tl.constexpr = COLUMNS // 2
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(count, ROWS)
    column_tiles = tl.cdiv(width, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZE
    ):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        local = column_tile * COLUMNS
        column = first_column + local
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, D, DEPTH):
            a = load_tile(x, row, k, N, D, x_stride, ROWS, DEPTH, TMA)
            b = load_tile(w, column, k, V, D, w_stride, COLUMNS, DEPTH, TMA)
            product = multiply(a, b.T, product, PRECISION)
        rows = row + tl.arange(0, ROWS)
        kept = rows < count
        label = tl.load(label_ptr + rows, mask=kept, other=-1)
        lse = tl.load(lse_ptr + rows, mask=kept, other=float("inf"))
        coefficient = tl.load(coefficient_ptr + rows, mask=kept, other=0.0)
        of_p, of_log_p, of_one = coefficient, coefficient, coefficient
        if TERMS:
            of_p, of_log_p, of_one = load_terms(terms_ptr, rows, N, kept)
        if TMA and not SPECIALIZE:  # in halves, so that what is stored leaves room for the loads
            left, right = _halves(product, ROWS, COLUMNS)
            left = logits_gradient(
                left, column, label, lse, coefficient, of_p, of_log_p, of_one, bias_ptr, V, scale, cap, HAS_BIAS,
                SOFTCAP, TERMS, TAIL, HALF,
            )  # fmt: skip
            dz.store([row, local], left.to(dz.dtype))
            right = logits_gradient(
                right, column + HALF, label, lse, coefficient, of_p, of_log_p, of_one, bias_ptr, V, scale, cap,
                HAS_BIAS, SOFTCAP, TERMS, TAIL, HALF,
            )  # fmt: skip
            dz.store([row, local + HALF], right.to(dz.dtype))
        else:
            whole = logits_gradient(
                product, column, label, lse, coefficient, of_p, of_log_p, of_one, bias_ptr, V, scale, cap, HAS_BIAS,
                SOFTCAP, TERMS, TAIL, COLUMNS,
            )  # fmt: skip
            if TMA:
                dz.store([row, local], whole.to(dz.dtype))
            else:
                at = rows.to(tl.int64)[:, None] * dz_stride + (local + tl.arange(0, COLUMNS))[None, :]
                tl.store(dz + at, whole.to(dz.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit
def _hidden_gradient_kernel(
    dz, w, dx, count_ptr,  # pointers
    first_column, N, V, D, width,  # shapes
    dz_stride, w_stride, dx_stride,  # strides
    REDUCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr,  # constants
):  # fmt: skip
    """dx += dz W_block over `width` vocabulary columns: (K, C) · (C, D) -> (K, D) float32.

    With REDUCE the memory adds, so that dx is not read into registers that the product fills; each of its elements is
    one program's, so there is no order that could vary. Rows past `count` get zeros added.
    """
    QUARTER: tl.constexpr = COLUMNS // 4
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(count, ROWS)
    column_tiles = tl.cdiv(D, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZE
    ):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        column = column_tile * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, width, DEPTH):
            a = load_tile(dz, row, k, N, width, dz_stride, ROWS, DEPTH, TMA)
            b = load_tile(w, first_column + k, column, V, D, w_stride, DEPTH, COLUMNS, TMA)
            total = multiply(a, b, total, PRECISION)
        if REDUCE:  # in quarters, so that what is added leaves room for the loads
            left, right = _halves(total, ROWS, COLUMNS)
            first, second = _halves(left, ROWS, COLUMNS // 2)
            third, fourth = _halves(right, ROWS, COLUMNS // 2)
            dx.atomic_add([row, column], first)
            dx.atomic_add([row, column + QUARTER], second)
            dx.atomic_add([row, column + 2 * QUARTER], third)
            dx.atomic_add([row, column + 3 * QUARTER], fourth)
        else:
            rows = row + tl.arange(0, ROWS)
            columns = column + tl.arange(0, COLUMNS)
            inside = (rows < count)[:, None] & (columns < D)[None, :]
            at = rows.to(tl.int64)[:, None] * dx_stride + columns[None, :]
            tl.store(dx + at, tl.load(dx + at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _head_gradient_kernel(
    dz, x, dw_ptr, count_ptr,  # pointers
    first_column, N, V, D, width,  # shapes
    dz_stride, x_stride, dw_stride,  # strides
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr,  # constants
):  # fmt: skip
    """dW_block = dzᵀ X over the kept rows: (C, K) · (K, D) -> (C, D), written once, in the head's type."""
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(width, ROWS)  # of the block of the vocabulary
    column_tiles = tl.cdiv(D, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZE
    ):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        column = column_tile * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, count, DEPTH):
            a = load_tile(dz, k, row, N, width, dz_stride, DEPTH, ROWS, TMA)
            b = load_tile(x, k, column, N, D, x_stride, DEPTH, COLUMNS, TMA)
            total = multiply(a.T, b, total, PRECISION)
        rows = first_column + row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        real = (rows < min(V, first_column + width))[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * dw_stride + columns[None, :]
        tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=real)


@triton.jit
def _bias_gradient_kernel(
    dz_ptr, dbias_ptr, count_ptr,  # pointers
    width,  # shapes
    dz_stride,  # strides
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # constants
):  # fmt: skip
    """dbias_block = Σ dz over the kept rows, a program for each COLUMNS of the block."""
    count = tl.load(count_ptr)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(0, count, ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = (rows < count)[:, None] & (columns < width)[None, :]
        at = rows.to(tl.int64)[:, None] * dz_stride + columns[None, :]
        total += tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dbias_ptr + columns, tl.sum(total, 0).to(dbias_ptr.dtype.element_ty), mask=columns < width)


def programs_of(tile: ProductTile) -> int:
    """Programs that a chip holds at once: eight warps fill a processor's registers, at up to 255 a thread."""
    return tile.processors * max(1, 8 // tile.warps)


@functools.lru_cache
def block_columns(N: int, V: int, D: int, tile: ProductTile, plain: ProductTile, most_bytes: int, size: int) -> int:
    """How many columns of the vocabulary a block has: few enough for `most_bytes`, in whole waves of programs.

    The host does not know how many of the N rows are kept. So each width, from the widest to half of it, is weighed by
    what its waves take for a quarter of the rows, all of them, and shares between; a wave that is not full takes as
    long as one that is. 128 by 256 on 132 processors: 33 column tiles are whole waves for every fourth row tile, and
    their 66 row tiles of dW for every second column tile.

    Args:
        tile, plain: of the logits' gradient and of the products after it. size: of an element, in bytes.
    """

    counts = [-(-N * share // 16) for share in range(4, 17)]
    row_tiles = [-(-kept // tile.rows) for kept in counts]
    programs, plain_programs, plain_columns = programs_of(tile), programs_of(plain), -(-D // plain.columns)

    def cost(width: int) -> int:  # whole waves in products of elements, each by the depth of its own product
        total = 0
        for block, times in ((width, V // width), (V % width, 1)):
            columns, plain_rows = -(-block // tile.columns), -(-block // plain.rows)
            waves = sum(-(-rows * columns // programs) for rows in row_tiles)
            plain_waves = -(-plain_rows * plain_columns // plain_programs)
            gradient = waves * programs * tile.rows * tile.columns * D
            total += times * (gradient + plain_waves * plain_programs * plain.rows * plain.columns * sum(counts))
        return total

    most = max(1, min(triton.cdiv(V, tile.columns), most_bytes // (N * size * tile.columns)))
    widths = [tiles * tile.columns for tiles in range(most, most // 2, -1)]
    return min(widths, key=cost)  # the widest of equals


def _memory_adds(tile: ProductTile) -> bool:
    """Whether a float32 tile can be added to memory by the unit that moves tiles; the interpreter has none."""
    return tile.tma and not interpreting()


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
    terms: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden, weight and bias, as far as `want` asks for them, of what has the gradient in the logits
    coefficient · (p - onehot), Σ coefficient · nll; with terms p (terms[0] - terms[1] log p) + terms[2] - coefficient ·
    onehot.

    Args:
        hidden: [N, D], weight: [V, D], bias: [V] or None, of one type: float16, bfloat16 or float32.
        labels: [N] int64. coefficient: [N] float32. lse: [N] float32 of the same logits.
        terms: [3, N] float32 or None. A row of which all these are 0 is not read.
    """
    N, D = hidden.shape
    V = len(weight)
    want_hidden, want_weight, want_bias = want
    if not N:  # a descriptor of no rows cannot be made
        return tuple(
            torch.zeros_like(t) if wanted else None for t, wanted in zip((hidden, weight, bias), want, strict=True)
        )
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tile, plain = product_tile(hidden, "gradient", weight), product_tile(hidden, "matmul", weight)
    kind = softcap_kind(softcap)
    if kind == "large" or terms is not None:  # whose tanh, or other factor, takes registers
        tile = dataclasses.replace(tile, columns=tile.columns // 2)
    width = block_columns(N, V, D, tile, plain, BLOCK_BYTES, hidden.element_size())

    specialize = tile.specialize and softcap is None and terms is None  # Triton 3.7.1 finds no warps for more
    dz = torch.empty(N, width, dtype=hidden.dtype, device=hidden.device)
    dx = None
    if want_hidden:  # rows at multiples of 16 bytes
        dx = torch.zeros(N, triton.cdiv(D, 4) * 4, dtype=torch.float32, device=hidden.device)[:, :D]
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    db = torch.empty_like(bias) if want_bias else None
    with on_device(hidden):
        scaled = None if terms is None else scaled_terms(terms, logit_scale)
        kept = gather_rows(hidden, labels, coefficient, lse, V, logit_scale, tile.rows, scaled)
        x, count = kept.x, kept.count
        # the same matrices, cut as each kernel reads them
        x_by_row, w_by_row = (tile_source(m, n, tile.depth, tile) for m, n in ((x, tile.rows), (weight, tile.columns)))
        dz_written = tile_source(dz, tile.rows, tile.columns if specialize else tile.columns // 2, tile)
        dz_by_row, dz_by_column = (
            tile_source(dz, *s, plain) for s in ((plain.rows, plain.depth), (plain.depth, plain.rows))
        )
        w_by_column, x_by_column = (tile_source(m, plain.depth, plain.columns, plain) for m in (weight, x))
        reduce = want_hidden and _memory_adds(plain)
        dx_added = tile_source(dx, plain.rows, plain.columns // 4, plain) if reduce else dx
        for first in range(0, V, width):
            block = min(width, V - first)
            row_tiles, columns = triton.cdiv(N, plain.rows), triton.cdiv(D, plain.columns)
            tiles = triton.cdiv(N, tile.rows) * triton.cdiv(block, tile.columns)
            _logits_gradient_kernel[(min(programs_of(tile), tiles),)](
                x_by_row, w_by_row, bias, kept.label, kept.lse, kept.coefficient, kept.terms, count, dz_written,
                first, N, V, D, block,
                x.stride(0), weight.stride(0), dz.stride(0),
                *exponents(softcap, logit_scale, kind), HAS_BIAS=bias is not None, SOFTCAP=kind,
                TERMS=terms is not None, TAIL=block % tile.columns != 0, SPECIALIZE=specialize, **tile.constants(),
            )  # fmt: skip
            if want_hidden:
                _hidden_gradient_kernel[(min(programs_of(plain), row_tiles * columns),)](
                    dz_by_row, w_by_column, dx_added, count,
                    first, N, V, D, block,
                    dz.stride(0), weight.stride(0), dx.stride(0),
                    REDUCE=reduce, SPECIALIZE=plain.specialize, **plain.constants(),
                )  # fmt: skip
            if want_weight:
                _head_gradient_kernel[(min(programs_of(plain), triton.cdiv(block, plain.rows) * columns),)](
                    dz_by_column, x_by_column, dw, count,
                    first, N, V, D, block,
                    dz.stride(0), x.stride(0), dw.stride(0),
                    SPECIALIZE=plain.specialize, **plain.constants(),
                )  # fmt: skip
            if want_bias:
                _bias_gradient_kernel[(triton.cdiv(block, 64),)](
                    dz, db[first:], count,
                    block,
                    dz.stride(0),
                    ROWS=64, COLUMNS=64, num_warps=8,
                )  # fmt: skip
        if want_hidden:
            dx = scatter_rows(dx, kept.place, hidden)
    return dx, dw, db
