"""Gradients of the rows that have one, by blocks of the vocabulary; statistics by the same blocks are in `chunked`.

The lse is known, so that a block of logits turns into its gradient at once, and each block of dW is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokensel.ops.chunked import SMALLEST_EXPONENT, Head, gpu_block, in_float32, logits_block, vocabulary_blocks
from tokensel.ops.products import add_product, exact_products, gradient_product_dtype, product

WORKSPACE_MIB = 256.0  # of the blocks

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # in hidden, weight and bias, where wanted


def gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    head: Head,
    want: Sequence[bool],
    terms: Tensor | None = None,
) -> Gradients:
    """Gradients by dz = coefficient · (p - onehot), or with terms dz = p (terms[0] - terms[1] log p) + terms[2] -
    coefficient · onehot. hidden (N, D), weight (V, D); labels, coefficient and lse (N,), terms (3, N)."""
    kept = kept_rows(coefficient, terms).nonzero()[:, 0]
    y, log_z = labels[kept], lse[kept]
    upstream = coefficient[kept] * head.logit_scale  # (K,)
    of_p = None if terms is None else terms[:, kept] * head.logit_scale  # (3, K)

    def gradient_of(z: Tensor, rows: slice, start: int) -> Tensor:
        some = None if of_p is None else of_p[:, rows]
        return _logits_gradient(z, y[rows] - start, log_z[rows], upstream[rows], head.softcap, some)

    return gradients_by(gradient_of, hidden, weight, kept, head, want, lse.dtype)


def gradients_by(
    gradient_of: Callable[[Tensor, slice, int], Tensor],
    hidden: Tensor,
    weight: Tensor,
    kept: Tensor,
    head: Head,
    want: Sequence[bool],
    dtype: torch.dtype,
) -> Gradients:
    """Gradients by blocks of the logits of some rows. hidden (N, D), weight (V, D), kept (K,) int64.

    Args:
        gradient_of: (block of logits (R, C), which it may overwrite, of `kept`'s rows in a slice, the first column of
            the vocabulary) -> gradient of the products that the logits are made of, (R, C).
        dtype: of the logits.
    """
    want_hidden, want_weight, want_bias = want
    V, D = weight.shape
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
    d_bias = torch.zeros(V, dtype=dtype, device=hidden.device) if want_bias else None
    if len(kept) == 0 or not (want_hidden or want_weight or want_bias):
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if want_weight else None
        return d_hidden, d_weight, _as_bias(d_bias, head)
    R, C = vocabulary_blocks(len(kept), V, WORKSPACE_MIB)
    narrow = gradient_product_dtype(hidden.dtype)
    workspace = torch.empty(R * C, dtype=dtype, device=hidden.device)
    rounded = torch.empty(R * C if narrow != dtype else 0, dtype=narrow, device=hidden.device)
    head_copy, gradient_copy = torch.empty(2, C, D, dtype=dtype, device=hidden.device)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    x = hidden[kept]  # (K, D)
    x, exact_x = x.to(narrow), x.to(dtype)
    d_x = torch.zeros_like(exact_x) if want_hidden else None
    # dW is summed over the blocks of rows in its own place if that is wide enough for their number
    in_place = weight.dtype == (narrow if len(kept) <= R else dtype)
    with exact_products(hidden.dtype):
        for start in range(0, V, C):
            exact_w = in_float32(weight[start : start + C], head_copy)  # (C, D)
            w = exact_w if narrow == dtype else weight[start : start + C]
            bias = None if head.bias is None else head.bias[start : start + C].to(dtype)
            if d_weight is not None:
                dw = d_weight[start : start + C] if in_place else gradient_copy[: len(w)]
            for first in range(0, len(kept), R):
                rows = slice(first, first + R)
                shape = len(x[rows]), len(w)
                out = workspace[: math.prod(shape)].view(shape)
                dz = gradient_of(logits_block(exact_x[rows], exact_w, head._replace(bias=bias), out), rows, start)
                if d_bias is not None:
                    d_bias[start : start + C] += dz.sum(0)
                if narrow != dtype:
                    dz = rounded[: math.prod(shape)].view(shape).copy_(dz)
                if d_x is not None:
                    add_product(d_x[rows], dz, w)
                if d_weight is not None:
                    add_product(dw, dz.T, x[rows], beta=min(first, 1))
            if d_weight is not None and not in_place:
                d_weight[start : start + C] = dw
    if d_hidden is not None and d_x is not None:
        d_hidden[kept] = d_x.to(hidden.dtype)
    return d_hidden, d_weight, _as_bias(d_bias, head)


def _as_bias(gradient: Tensor | None, head: Head) -> Tensor | None:
    return None if gradient is None or head.bias is None else gradient.to(head.bias.dtype)


def kept_rows(coefficient: Tensor, terms: Tensor | None) -> Tensor:
    """Whether a row has a gradient at all: (N,), (3, N) -> (N,) bool."""
    return coefficient != 0 if terms is None else (coefficient != 0) | (terms != 0).any(0)


def _logits_gradient(
    z: Tensor, labels: Tensor, lse: Tensor, upstream: Tensor, softcap: float | None, terms: Tensor | None
) -> Tensor:
    """`gradients`' dz times dz/du in place, u being the logits before the softcap. z (R, C), terms (3, R)."""
    slope = None if softcap is None else 1 - (z / softcap) ** 2
    log_p = z.sub_(lse[:, None]).clamp_(min=SMALLEST_EXPONENT)
    inside = ((labels >= 0) & (labels < z.shape[1])).nonzero()[:, 0]
    at = inside, labels[inside]
    if terms is None:
        log_p.exp_()[at] -= 1
        z *= upstream[:, None]
    else:
        of_p, of_log_p, of_one = terms[:, :, None]  # (R, 1) each
        factor = torch.addcmul(of_p, of_log_p, log_p, value=-1)
        log_p.exp_().mul_(factor).add_(of_one)
        z[at] -= upstream[inside]
    return z if slope is None else z.mul_(slope)


def gradient_limits(N: int, element_size: int) -> tuple[float, int]:
    """(MiB of a block's logits, columns of a block): its gradient takes two thirds of the workspace, they the rest."""
    return WORKSPACE_MIB / 3, int(WORKSPACE_MIB * 2**20 * 2 / 3) // (max(N, 1) * element_size)


def gradients_on_gpu(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    head: Head,
    want: Sequence[bool],
    terms: Tensor | None = None,
) -> Gradients:
    """`gradients` by the library's products, and a kernel that turns a block of them into its gradient.

    The host does not know how many rows are kept, and the library has no product whose size is on the device and whose
    result is float32 (`torch._grouped_mm` gives its inputs' type). So dropped rows are multiplied, too, as zeros:
    3 · 2 N V D operations whatever is kept. impl="fused" stops at the kept rows.
    """
    from tokensel_kernels.block_grad import write_block_gradient

    want_hidden, want_weight, want_bias = want
    (N, D), V = hidden.shape, weight.shape[0]
    mib, most_columns = gradient_limits(N, hidden.element_size())
    R, C = gpu_block(N, V, hidden, mib, most_columns=most_columns)
    workspace = torch.empty(R, C, dtype=torch.float32, device=hidden.device)
    gradient = torch.empty(N, C, dtype=hidden.dtype, device=hidden.device)
    # a dropped row may be anything; 0 · NaN would be NaN, and exp(z - inf) is 0
    dropped = ~kept_rows(coefficient, terms)
    x, log_z = hidden.masked_fill(dropped[:, None], 0), lse.masked_fill(dropped, torch.inf)
    d_x = torch.zeros(N, D, dtype=torch.float32, device=hidden.device) if want_hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    d_bias = torch.empty_like(head.bias) if want_bias and head.bias is not None else None
    parts = [slice(first, min(first + R, N)) for first in range(0, N, R)]
    of_p = [None] * len(parts) if terms is None else [terms[:, rows] for rows in parts]
    cut = [
        (rows, x[rows], [t[rows] for t in (labels, coefficient, log_z)], some)
        for rows, some in zip(parts, of_p, strict=True)
    ]
    for start in range(0, V, C):
        block = slice(start, min(start + C, V))
        w = weight[block]  # (C, D)
        dz = gradient[:, : len(w)]  # (N, C)
        bias = None if head.bias is None else head.bias[block].contiguous()
        options = {"bias": bias, "first_column": start, "softcap": head.softcap, "logit_scale": head.logit_scale}
        for rows, some_x, of_rows, some in cut:
            z = product(some_x, w.T, workspace[: len(some_x), : len(w)])  # (R, C)
            write_block_gradient(z, *of_rows, dz[rows], terms=some, **options)
        if d_x is not None:
            add_product(d_x, dz, w)
        if d_weight is not None:
            same = dz.dtype == d_weight.dtype
            dw = torch.mm(dz.T, x, out=d_weight[block] if same else None)  # accumulated in float32, rounded once
            if not same:
                d_weight[block] = dw
        if d_bias is not None:
            d_bias[block] = dz.sum(0, dtype=torch.float32)
    return None if d_x is None else d_x.to(hidden.dtype), d_weight, d_bias
