"""Device helpers with names: tiles of a matrix, the head's logits, the online sums of a softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALL_SOFTCAP = 32.0  # of logits, whose statistics have to be as exact as float32 is
NOTHING = tl.constexpr(-1000.0)  # 2^-1000 is 0 in float32, and 0 · 1000² is 0, where 0 · inf is not


@triton.jit
def grouped_tile(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles go through all columns together, so that what they read by
    rows stays in L2 while the columns stream by. Programs from row_tiles · column_tiles on have none."""
    group = program // (GROUP * column_tiles)
    members = min(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    return group * GROUP + within % members, within // members


@triton.jit
def load_tile(source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """source[row : row + ROWS, column : column + COLUMNS]; zero outside (rows, columns). (ROWS, COLUMNS)

    `source` is a tensor-memory descriptor with blocks of this size (TMA), or a pointer to row-major data.
    """
    if TMA:
        return source.load([row, column])
    else:
        r = tl.arange(0, ROWS)
        c = tl.arange(0, COLUMNS)
        # a head of 151,936 rows by 16,384 has more than 2^31 elements: 64 bits to the tile, 32 inside it
        corner = source + tl.cast(row, tl.int64) * stride + column
        inside = (r < rows - row)[:, None] & (c < columns - column)[None, :]
        return tl.load(corner + (r[:, None] * stride + c[None, :]), mask=inside, other=0.0)


@triton.jit
def multiply(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b. `PRECISION` is tl.dot's of float32 inputs, or "widened": to float32 before the product, the
    same numbers (products of half-precision values are exact) where an interpreter has no bfloat16 product."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few ulp in float32; near zero by its series, where (1 - e) / (1 + e) cancels."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    square = a * a
    series = a * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    magnitude = tl.where(a < 0.25, series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def head_logits(
    product, bias_ptr, column, columns, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """softcap · tanh(logit_scale · (product + bias) / softcap), as `ops.reference.head_logits`. (ROWS, COLUMNS)"""
    if HAS_BIAS:
        c = column + tl.arange(0, COLUMNS)
        product += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    z = product * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def log2_logits(
    product, bias_ptr, column, columns, scale, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of logits in units of log2, but for a constant, by as few operations as can be; -inf past the columns.

    With a small softcap, tanh(t) = 1 - 2 / (1 + exp(2 t)) leaves -2 cap / (1 + 2^(product · scale)) and the constant
    cap: no series, and an error that grows with the cap. `scale` and `cap` are those of `exponents`. (ROWS, COLUMNS)
    """
    c = column + tl.arange(0, COLUMNS)
    offset = tl.zeros([COLUMNS], tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32) * scale
    if SOFTCAP == "none":
        edge = tl.where(c < columns, 0.0, -float("inf"))
        return product * scale + (offset + edge)[None, :]
    else:
        x = product * scale + offset[None, :]
        z = cap * tanh(x) if SOFTCAP == "large" else (1.0 / (1.0 + tl.exp2(x))) * (-2.0 * cap)
        return tl.where((c < columns)[None, :], z, -float("inf"))


def softcap_kind(softcap: float | None, small: float = SMALL_SOFTCAP) -> str:
    """How a softcap is computed: "none", "small", by one exponential whose rounding grows with it, or "large"."""
    return "none" if softcap is None else "small" if softcap <= small else "large"


def exponents(softcap: float | None, logit_scale: float, kind: str) -> tuple[float, float]:
    """(scale, cap) that kernels take: from a product to an exponent of 2, or with a large softcap to the argument of
    tanh; and the softcap in units of log 2."""
    if softcap is None:
        return logit_scale * LOG2_E.value, 0.0
    return (2 * LOG2_E.value if kind == "small" else 1.0) * logit_scale / softcap, softcap * LOG2_E.value


@triton.jit
def online_softmax(u, top, total, first, second, square, MOMENTS: tl.constexpr, SQUARE: tl.constexpr):
    """Takes a tile of logits in units of log2 into the running sums of each row, relative to the running maximum `top`:

        total = Σ 2^(u - top),  first = Σ 2^(u - top) (u - top),  second = Σ 2^(u - top) (u - top)²,
        square = Σ 2^(2 (u - top))

    Columns that do not exist are -inf in u. (ROWS, COLUMNS) -> (ROWS,) each.
    """
    new_top = tl.maximum(top, tl.max(u, 1))
    pivot = tl.where(new_top == -float("inf"), 0.0, new_top)  # no column yet: 2^(-inf - 0) = 0, not NaN
    shift = tl.where(top == -float("inf"), 0.0, tl.maximum(top - pivot, NOTHING))
    rescale = tl.where(top == -float("inf"), 0.0, tl.exp2(shift))
    u = u - pivot[:, None]
    e = tl.exp2(u)
    if MOMENTS:
        # (u + shift) replaces u in what was summed before
        second = rescale * (second + 2.0 * shift * first + shift * shift * total)
        first = rescale * (first + shift * total)
        u = tl.maximum(u, NOTHING)
        weighted = e * u
        first += tl.sum(weighted, 1)
        second += tl.sum(weighted * u, 1)
    if SQUARE:
        square = rescale * rescale * square + tl.sum(e * e, 1)
    total = rescale * total + tl.sum(e, 1)
    return new_top, total, first, second, square
