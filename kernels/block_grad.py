"""A block of products with the head to the gradient of the logits, by one formula wherever the products are.

In registers behind a product of our own (`vocab_grad`), or read once where the library's product has written them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.primitives import LN_2, LOG2_E, NOTHING, exponents, softcap_kind, tanh
from tokensel_kernels.tiles import on_device, row_columns


@triton.jit
def logits_gradient(
    product, column, label, lse, coefficient, of_p, of_log_p, of_one, bias_ptr, columns, scale, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TERMS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """c · (p - onehot) · dz/du of a tile of products, u being the logits before the softcap and p their softmax; with
    TERMS (p · (of_p - of_log_p · log2 p) + of_one - c · onehot) · dz/du. (ROWS, COLUMNS)

    Args:
        column: of the tile in the bias and among the labels; with TAIL those from `columns` on give zero.
        lse, scale, cap: in units of log 2, as `exponents` gives the last two. Where the coefficient is 0, lse is inf.
    """
    c = tl.arange(0, COLUMNS)
    if HAS_BIAS:
        product += tl.load(bias_ptr + column + c, mask=c < columns - column, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP == "small":
        # tanh(y) = 1 - 2 r with r = 1 / (1 + exp(2 y)), the reciprocal as a squared rsqrt: one operation of its unit
        root = tl.rsqrt(1.0 + tl.exp2(product * scale))
        r = root * root
        log_p = r * (-2.0 * cap) - (lse - cap)[:, None]
    elif SOFTCAP == "large":
        t = tanh(product * scale)
        log_p = t * cap - lse[:, None]
    else:
        log_p = product * scale - lse[:, None]
    p = tl.exp2(log_p)
    if TAIL:
        p = tl.where((c < columns - column)[None, :], p, 0.0)
    onehot = tl.where(c[None, :] == (label - column)[:, None], coefficient[:, None], 0.0)
    if TERMS:  # where p is 0, so is p log p
        flat = of_one[:, None]
        if TAIL:
            flat = tl.where((c < columns - column)[None, :], flat, 0.0)
        dz = p * (of_p[:, None] - of_log_p[:, None] * tl.maximum(log_p, NOTHING)) + flat - onehot
    else:
        dz = p * coefficient[:, None] - onehot
    if SOFTCAP == "small":
        dz *= 4.0 * (r - r * r)
    if SOFTCAP == "large":
        dz *= 1.0 - t * t
    return dz


def scaled_terms(terms: Tensor, logit_scale: float) -> Tensor:
    """The coefficients of p, p log2 p and 1 in the gradient of what the scale multiplies. [3, N] -> [3, N]"""
    factors = (logit_scale, logit_scale * LN_2.value, logit_scale)
    return torch.stack([term * factor for term, factor in zip(terms, factors, strict=True)])


@triton.jit
def load_terms(terms_ptr, rows, stride, mask):
    """The coefficients of p, p log2 p and 1, of rows of (3, stride) float32; 0 where the mask is."""
    of_p = tl.load(terms_ptr + rows, mask=mask, other=0.0)
    of_log_p = tl.load(terms_ptr + stride + rows, mask=mask, other=0.0)
    of_one = tl.load(terms_ptr + 2 * stride + rows, mask=mask, other=0.0)
    return of_p, of_log_p, of_one


@triton.jit
def _block_gradient_kernel(
    z_ptr, bias_ptr, label_ptr, lse_ptr, coefficient_ptr, terms_ptr, dz_ptr,  # pointers
    first_column, C,  # shapes
    z_stride, terms_stride, dz_stride,  # strides
    scale, cap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TERMS: tl.constexpr,
    COLUMNS: tl.constexpr,  # constants
):  # fmt: skip
    """dz of a row of C products with the head, columns of the vocabulary from first_column on."""
    row = tl.program_id(0) + tl.arange(0, 1)
    at = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row) - first_column
    label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
    lse = tl.load(lse_ptr + row) * LOG2_E
    coefficient = tl.load(coefficient_ptr + row)
    of_p, of_log_p, of_one = coefficient, coefficient, coefficient
    if TERMS:
        of_p, of_log_p, of_one = load_terms(terms_ptr, row, terms_stride, row >= 0)
    for column in range(0, C, COLUMNS):
        c = column + tl.arange(0, COLUMNS)
        z = tl.load(z_ptr + at * z_stride + c, mask=c < C, other=0.0)[None, :]
        dz = logits_gradient(
            z, column, label, lse, coefficient, of_p, of_log_p, of_one, bias_ptr, C, scale, cap, HAS_BIAS, SOFTCAP,
            TERMS, False, COLUMNS,
        )  # fmt: skip
        tl.store(dz_ptr + at * dz_stride + c[None, :], dz.to(dz_ptr.dtype.element_ty), mask=(c < C)[None, :])


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
    terms: Tensor | None = None,
) -> None:
    """Gradient in the products of hidden states with a block of the head: of the logits, coefficient · (p - onehot), or
    with terms p (terms[0] - terms[1] log p) + terms[2] - coefficient · onehot.

    Args:
        z: [K, C] float32 products with vocabulary rows from `first_column` on, last dimension contiguous.
        labels: [K] int64 in the whole vocabulary. coefficient, lse: [K] float32. bias: [C] or None.
        terms: [3, K] float32 or None.
        dz: [K, C] to write, in the type of the products that follow; last dimension contiguous.
    """
    K, C = z.shape
    kind = softcap_kind(softcap)
    scaled = None if terms is None else scaled_terms(terms, logit_scale)
    with on_device(z):
        _block_gradient_kernel[(K,)](
            z, bias, labels, lse, coefficient * logit_scale, scaled, dz,
            first_column, C,
            z.stride(0), K, dz.stride(0),
            *exponents(softcap, logit_scale, kind), HAS_BIAS=bias is not None,
            SOFTCAP=kind, TERMS=terms is not None, COLUMNS=row_columns(z), num_warps=8,
        )  # fmt: skip
