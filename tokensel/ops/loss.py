"""Cross-entropy over kept tokens (step 7), with a backward that costs only the kept rows.

The forward needs no matrix product: nll = lse - target_logit is known from the statistics. The backward walks over
blocks of the vocabulary, so each block of dW is written once and no logits of width V are held.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokensel.ops import reference
from tokensel.ops.checks import (
    check_head,
    check_labels,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
    resolve_impl,
)
from tokensel.ops.products import add_product, exact_products, gradient_product_dtype, on_gpu, product
from tokensel.ops.stats import (
    GPU_COLUMNS,
    SMALLEST_EXPONENT,
    TokenStats,
    logits_block,
    token_stats,
    vocabulary_blocks,
    widened,
)
from tokensel.parallel import local_head

_WORKSPACE_MIB = 256


class _SelectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, coefficient, lse, nll, softcap, logit_scale, impl):
        ctx.save_for_backward(hidden, weight, bias, labels, coefficient, lse)
        ctx.softcap, ctx.logit_scale, ctx.impl = softcap, logit_scale, impl
        return torch.where(coefficient != 0, coefficient * nll, 0).sum()  # a dropped row may be anything

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, labels, coefficient, lse = ctx.saved_tensors
        upstream = coefficient * grad  # (N,)
        want = list(ctx.needs_input_grad[:3])
        # torch.compile sees one operator; eager code needs none, and can be looked into
        compute = torch.ops.tokensel.selected_gradients if torch.compiler.is_compiling() else _compute_gradients
        found = iter(compute(hidden, weight, bias, labels, upstream, lse, ctx.softcap, ctx.logit_scale, want, ctx.impl))
        return *(next(found) if wanted else None for wanted in want), *[None] * 7


def _compute_gradients(hidden, weight, bias, labels, coefficient, lse, softcap, logit_scale, want, impl):
    """Those of the gradients in hidden, weight and bias that `want` asks for."""
    chunked = _gpu_chunked_gradients if on_gpu(hidden) else _chunked_gradients
    backward = _fused_gradients if impl == "fused" else chunked
    found = backward(hidden, weight, bias, labels, coefficient, lse, softcap, logit_scale, want)
    return [gradient for gradient in found if gradient is not None]


_gradients_operator = torch.library.custom_op(
    "tokensel::selected_gradients",
    _compute_gradients,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor coefficient, Tensor lse, "
    "float? softcap, float logit_scale, bool[] want, str impl) -> Tensor[]",
)


@_gradients_operator.register_fake
def _(hidden, weight, bias, labels, coefficient, lse, softcap, logit_scale, want, impl):
    inputs = zip((hidden, weight, bias), want, strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, wanted in inputs if wanted]


def _fused_gradients(hidden, weight, bias, labels, coefficient, lse, softcap, logit_scale, want):
    from tokensel_kernels.vocab_grad import selected_gradients

    options = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    return selected_gradients(hidden, weight, labels, coefficient, lse, want=want, **options)


def _gpu_chunked_gradients(hidden, weight, bias, labels, coefficient, lse, softcap, logit_scale, want):
    """The library's products, and a kernel that turns a block of them into its gradient. The host waits once, for the
    number of kept rows."""
    from tokensel_kernels.vocab_grad import write_block_gradient

    want_hidden, want_weight, want_bias = want
    V, D = weight.shape
    kept = coefficient.nonzero()[:, 0]
    K = len(kept)
    R, C = vocabulary_blocks(K, V, _WORKSPACE_MIB, columns=GPU_COLUMNS)
    workspace = torch.empty(R, C, dtype=torch.float32, device=hidden.device)
    gradient = torch.empty(K, C, dtype=hidden.dtype, device=hidden.device)
    x, y, c, log_z = (t[kept] for t in (hidden, labels, coefficient, lse))
    d_x = torch.zeros(K, D, dtype=torch.float32, device=hidden.device) if want_hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    d_bias = torch.empty_like(bias) if want_bias else None
    for start in range(0, V, C):
        w = weight[start : start + C]  # (C, D)
        block = slice(start, start + len(w))
        dz = gradient[:, : len(w)]  # (K, C)
        options = {"bias": None if bias is None else bias[block].contiguous()}
        options |= {"first_column": start, "softcap": softcap, "logit_scale": logit_scale}
        for first in range(0, K, R):
            rows = slice(first, min(first + R, K))
            z = product(x[rows], w.T, workspace[: len(x[rows]), : len(w)])  # (R, C)
            write_block_gradient(z, y[rows], c[rows], log_z[rows], dz[rows], **options)
        if want_hidden:
            add_product(d_x, dz, w)
        if want_weight:
            torch.mm(dz.T, x, out=d_weight[block])  # accumulated in float32, rounded once
        if want_bias:
            d_bias[block] = dz.sum(0, dtype=torch.float32)
    if want_hidden:
        d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        d_hidden[kept] = d_x.to(hidden.dtype)
    return d_hidden if want_hidden else None, d_weight, d_bias


def _chunked_gradients(hidden, weight, bias, labels, coefficient, lse, softcap, logit_scale, want):
    want_hidden, want_weight, want_bias = want
    dtype = lse.dtype
    V, D = weight.shape
    kept = coefficient.nonzero()[:, 0]
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
    d_bias = torch.zeros_like(bias, dtype=dtype) if want_bias else None
    if len(kept) == 0 or not (want_hidden or want_weight or want_bias):
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if want_weight else None
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype)
    R, C = vocabulary_blocks(len(kept), V, _WORKSPACE_MIB)
    narrow = gradient_product_dtype(hidden.dtype)
    workspace = torch.empty(R * C, dtype=dtype, device=hidden.device)
    rounded = torch.empty(R * C if narrow != dtype else 0, dtype=narrow, device=hidden.device)
    wide, wide_gradient = torch.empty(2, C, D, dtype=dtype, device=hidden.device)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    x = hidden[kept]  # (K, D)
    x, wide_x = x.to(narrow), x.to(dtype)
    y, log_z = labels[kept], lse[kept]
    upstream = coefficient[kept] * logit_scale  # (K,)
    d_x = torch.zeros_like(wide_x) if want_hidden else None
    # dW is summed over the blocks of rows in its own place if that is wide enough for their number
    in_place = weight.dtype == (narrow if len(kept) <= R else dtype)
    with exact_products(hidden.dtype):
        for start in range(0, V, C):
            wide_w = widened(weight[start : start + C], wide)  # (C, D)
            w = wide_w if narrow == dtype else weight[start : start + C]
            b = None if bias is None else bias[start : start + C].to(dtype)
            if want_weight:
                dw = d_weight[start : start + C] if in_place else wide_gradient[: len(w)]
            for first in range(0, len(kept), R):
                rows = slice(first, first + R)
                shape = len(x[rows]), len(w)
                out = workspace[: math.prod(shape)].view(shape)
                z = logits_block(wide_x[rows], wide_w, b, softcap, logit_scale, out)
                dz = _logits_gradient(z, y[rows] - start, log_z[rows], upstream[rows], softcap)  # (R, C)
                if want_bias:
                    d_bias[start : start + C] += dz.sum(0)
                if narrow != dtype:
                    dz = rounded[: math.prod(shape)].view(shape).copy_(dz)
                if want_hidden:
                    add_product(d_x[rows], dz, w)
                if want_weight:
                    add_product(dw, dz.T, x[rows], beta=min(first, 1))
            if want_weight and not in_place:
                d_weight[start : start + C] = dw
    if want_hidden:
        d_hidden[kept] = d_x.to(hidden.dtype)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype)


def _logits_gradient(z: Tensor, labels: Tensor, lse: Tensor, upstream: Tensor, softcap: float | None) -> Tensor:
    """upstream · (softmax(z) - onehot) · dz/du in place, u being the logits before the softcap. z (R, C)."""
    slope = None if softcap is None else 1 - (z / softcap) ** 2
    z.sub_(lse[:, None]).clamp_(min=SMALLEST_EXPONENT).exp_()
    inside = ((labels >= 0) & (labels < z.shape[1])).nonzero()[:, 0]
    z[inside, labels[inside]] -= 1
    z *= upstream[:, None]
    return z if slope is None else z.mul_(slope)


def selected_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    keep: Tensor,
    *,
    stats: TokenStats | None = None,
    denominator: Tensor | float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor:
    """Σ keep · nll / denominator, differentiable in `hidden`, `weight` and `bias`.

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...] int64; bias: [V]; softcap, logit_scale: as in `token_stats`,
            which also says how a head that is sharded over ranks is given: it gets the gradient of its own rows, and
            `hidden` the sum over ranks.
        keep: [...] bool, or real weights (also negative; constants for the gradient). Ignored rows never count.
        stats: TokenStats of the same hidden, weight and labels. Given, the forward does no matrix product.
        denominator: number or scalar tensor; None means Σ |keep|, the number kept for a boolean mask.
        ignore_index: label of rows that are not part of the loss.
        impl: "auto", "chunked", "fused" or "reference".
    Returns:
        Scalar, float32 (float64 for float64 input). With nothing kept: 0, with zero gradients.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was found.
    """
    whole = (hidden, weight, bias)
    hidden, weight, bias, shard = local_head(*whole)
    check_head(hidden, weight, bias)
    impl = resolve_impl(impl, hidden, shard)
    check_labels(labels, hidden.shape[:-1], whole[1].shape[0], ignore_index)
    check_positive("softcap", softcap)
    check_shape("keep", check_tensor("keep", keep), tuple(labels.shape), "one entry a label")
    check_same_device(hidden=hidden, labels=labels, keep=keep)
    if not (keep.dtype == torch.bool or keep.is_floating_point()):
        raise TypeError(f"keep must be bool or floating-point weights; got {keep.dtype}")
    if stats is None:
        if impl != "reference":
            stats = token_stats(
                *whole[:2],
                labels,
                bias=whole[2],
                softcap=softcap,
                logit_scale=logit_scale,
                ignore_index=ignore_index,
                impl=impl,
            )
    else:
        check_shape("stats.lse", stats.lse, tuple(labels.shape), "one entry a label")
        check_same_device(**{"hidden": hidden, "stats.lse": stats.lse})

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    coefficient = torch.where(y != ignore_index, keep.detach().reshape(-1).to(dtype), 0)
    if denominator is None:
        denominator = coefficient.abs().sum()
    elif not isinstance(denominator, Tensor):
        denominator = torch.full((), denominator, dtype=dtype, device=hidden.device)  # a copy would make the host wait
    elif denominator.numel() != 1:
        raise ValueError(f"denominator must be a number or a scalar tensor; got shape {list(denominator.shape)}")
    coefficient = torch.where(denominator != 0, coefficient / denominator, 0)
    with torch.autocast(hidden.device.type, enabled=False):  # or it would round what is float32 on purpose
        if impl == "reference":
            rows = coefficient != 0
            logits = reference.head_logits(x[rows], weight, bias, softcap, logit_scale)
            return reference.selected_loss(logits, y[rows], coefficient[rows])
        y = y if shard is None else shard.labels(y, ignore_index)
        known = (y, coefficient, stats.lse.reshape(-1), stats.nll.reshape(-1))
        return _SelectedCrossEntropy.apply(x, weight, bias, *known, softcap, float(logit_scale), impl)
