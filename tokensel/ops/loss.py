"""Cross-entropy over kept tokens (step 7), with a backward that costs only the kept rows.

The forward needs no matrix product: nll = lse - target_logit is known from the statistics. The backward walks over
blocks of the vocabulary, so each block of dW is written once and no logits of width V are held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokensel.ops import chunked, reference
from tokensel.ops.checks import (
    check_head,
    check_label_range,
    check_labels,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
    resolve_impl,
)
from tokensel.ops.chunked import Head
from tokensel.ops.operators import custom_operator
from tokensel.ops.products import on_gpu
from tokensel.ops.stats import token_stats
from tokensel.ops.token_stats import TokenStats
from tokensel.ops.vocab_parallel import local_head


def _empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    want: list[bool] = rest[-2]
    inputs = zip((hidden, weight, bias), want, strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, wanted in inputs if wanted and t is not None]


@custom_operator(
    "selected_gradients",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor coefficient, Tensor lse, "
    "float? softcap, float logit_scale, bool[] want, str impl) -> Tensor[]",
    fake=_empty_gradients,
)
def _compute_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    softcap: float | None,
    logit_scale: float,
    want: list[bool],
    impl: str,
) -> list[Tensor]:
    """Those of the gradients in hidden, weight and bias that `want` asks for."""
    head = Head(bias, softcap, logit_scale)
    if impl == "fused":
        from tokensel_kernels.vocab_grad import selected_gradients

        gradients = selected_gradients(hidden, weight, labels, coefficient, lse, want=want, **head._asdict())
    else:
        walk = chunked.gradients_on_gpu if on_gpu(hidden) else chunked.gradients
        gradients = walk(hidden, weight, labels, coefficient, lse, head, want)
    return [gradient for gradient in gradients if gradient is not None]


class _SelectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        coefficient: Tensor,
        lse: Tensor,
        nll: Tensor,
        softcap: float | None,
        logit_scale: float,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels, coefficient, lse)
        ctx.softcap, ctx.logit_scale, ctx.impl = softcap, logit_scale, impl
        return torch.where(coefficient != 0, coefficient * nll, 0).sum()  # a dropped row may be anything

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, coefficient, lse = ctx.saved_tensors
        upstream = coefficient * grad  # (N,)
        want = list(ctx.needs_input_grad[:3])
        options = (ctx.softcap, ctx.logit_scale, want, ctx.impl)
        gradients = iter(_compute_gradients(hidden, weight, bias, labels, upstream, lse, *options))
        return *(next(gradients) if wanted else None for wanted in want), *[None] * 7


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
        stats: TokenStats of the same hidden, weight and labels, which were checked with them. Given, the forward does
            no matrix product.
        denominator: number or scalar tensor; None means `Σ |keep|`, the number kept for a boolean mask.
        ignore_index: label of rows that are not part of the loss.
        impl: "auto", "chunked", "fused" or "reference".
    Returns:
        Scalar, float32 (float64 for float64 input). With nothing kept: 0, with zero gradients.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given.
    """
    whole = (hidden, weight, bias)
    hidden, weight, bias, shard = local_head(*whole)
    check_head(hidden, weight, bias)
    asked, impl = impl, resolve_impl(impl, hidden, shard, "gradient")
    check_labels(labels, hidden.shape[:-1])
    check_positive("softcap", softcap)
    check_shape("keep", check_tensor("keep", keep), tuple(labels.shape), "one entry a label")
    check_same_device(hidden=hidden, labels=labels, keep=keep)
    if not (keep.dtype == torch.bool or keep.is_floating_point()):
        raise TypeError(f"keep must be bool or floating-point weights; got {keep.dtype}")
    if stats is None and impl != "reference":
        stats = token_stats(
            *whole[:2],
            labels,
            bias=whole[2],
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            impl=asked,
        )
    if stats is None:
        check_label_range(labels, whole[1].shape[0], ignore_index)
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
        if stats is None or impl == "reference":
            rows = coefficient != 0
            logits = reference.head_logits(x[rows], weight, bias, softcap, logit_scale)
            return reference.selected_loss(logits, y[rows], coefficient[rows])
        y = y if shard is None else shard.labels(y, ignore_index)
        per_row = (y, coefficient, stats.lse.reshape(-1), stats.nll.reshape(-1))  # (N,) each
        apply: Any = _SelectedCrossEntropy.apply  # autograd gives it no types
        loss: Tensor = apply(x, weight, bias, *per_row, softcap, float(logit_scale), impl)
        return loss
