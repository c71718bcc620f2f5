"""Cross-entropy over kept tokens (step 7), and the log-probabilities that every other loss is made of.

The forward needs no matrix product: nll = lse - target_logit is known from the statistics. The backward walks over
blocks of the vocabulary, so each block of dW is written once and no logits of width V are held. It costs only the rows
whose upstream gradient is not zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from tokensel.ops import chunked_grad, reference
from tokensel.ops.checks import (
    check_finite,
    check_head,
    check_label_range,
    check_labels,
    check_number,
    check_positive,
    check_same_device,
    check_seen,
    check_shape,
    check_shifted,
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
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor coefficient, Tensor lse, Tensor? terms, "
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
    terms: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want: list[bool],
    impl: str,
) -> list[Tensor]:
    """Those of the gradients in hidden, weight and bias that `want` asks for."""
    head = Head(bias, softcap, logit_scale)
    if impl == "fused":
        from tokensel_kernels.vocab_grad import selected_gradients

        rows = (labels, coefficient, lse)
        gradients = selected_gradients(hidden, weight, *rows, want=want, terms=terms, **head._asdict())
    else:
        walk = chunked_grad.gradients_on_gpu if on_gpu(hidden) else chunked_grad.gradients
        gradients = walk(hidden, weight, labels, coefficient, lse, head, want, terms)
    return [gradient for gradient in gradients if gradient is not None]


class _RowStatistics(torch.autograd.Function):
    """log p of the labels, lse and, where given, entropy and sum of the logits, as functions of hidden states and head.

    (N,) each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        lse: Tensor,
        nll: Tensor,
        entropy: Tensor | None,
        logit_sum: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        impl: str,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy)
        ctx.softcap, ctx.logit_scale, ctx.impl = softcap, logit_scale, impl
        ctx.set_materialize_grads(False)
        return -nll, lse.clone(), *(None if known is None else known.clone() for known in (entropy, logit_sum))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse, entropy = ctx.saved_tensors
        for name, of in zip(("log-probabilities", "lse", "entropies", "logits' sums"), upstream, strict=True):
            check_finite(f"the gradient of the {name}", of)
        of_log_p, of_lse, of_entropy, of_sum = upstream
        coefficient = torch.zeros_like(lse) if of_log_p is None else -of_log_p  # of the nll
        terms = None
        if any(of is not None for of in upstream[1:]):
            of_p, nothing = coefficient, torch.zeros_like(lse)
            if of_lse is not None:
                of_p = of_p + of_lse
            if of_entropy is not None:  # of the entropy H in the logits: -p (log p + H)
                of_p = of_p - torch.where(of_entropy != 0, of_entropy * entropy, 0)  # a row without may be anything
            terms = torch.stack([of_p, *(nothing if of is None else of for of in (of_entropy, of_sum))])
        want = list(ctx.needs_input_grad[:3])
        options = (ctx.softcap, ctx.logit_scale, want, ctx.impl)
        rows = (labels, coefficient, lse, terms)
        gradients = iter(_compute_gradients(hidden, weight, bias, *rows, *options))
        return *(next(gradients) if wanted else None for wanted in want), *[None] * 8


def _row_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, stats: TokenStats, head: Head, impl: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(log p, lse, entropy, sum of the logits) of rows whose statistics are known, with their gradients.

    hidden (N, D), weight (V, D), labels (N,); None where the statistics have none.
    """
    known = (stats.lse, stats.nll, stats.entropy, stats.logit_sum)
    of_rows = [None if of is None else of.reshape(-1) for of in known]
    apply: Any = _RowStatistics.apply  # autograd gives it no types
    results: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = apply(
        hidden, weight, head.bias, labels, *of_rows, head.softcap, head.logit_scale, impl
    )
    return results


def _check_stats(stats: TokenStats, labels: Tensor, ignore_index: int, keep: Tensor | None = None) -> None:
    """Statistics for each of the labels [...]."""
    if not isinstance(stats, TokenStats):
        raise TypeError(f"stats must be TokenStats of one model; got {type(stats).__name__}")
    check_shape("stats.lse", stats.lse, tuple(labels.shape), "one entry a label")
    check_same_device(**{"labels": labels, "stats.lse": stats.lse})
    check_seen(stats.lse, labels, ignore_index, keep)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    stats: TokenStats | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    shift: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """log p of every label under `softmax(head(hidden) / temperature)`, and entropies, differentiable, without logits.

    What preference and policy-gradient losses are made of. The backward recomputes the logits of rows whose upstream
    gradient is not zero, and of these alone (impl "chunked" on a GPU multiplies the others, too, as zeros).

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...] int64 or int32; bias: [V]; softcap, logit_scale, ignore_index,
            impl: as in `token_stats`, which also says how a head that is sharded over ranks is given: it gets the
            gradient of its own rows, and `hidden` the sum over ranks.
        stats: TokenStats of the same rows, labels, head and temperature, with their entropy if it is asked for; of
            others the gradients are wrong. Given, the forward does no matrix product.
        entropy: also the entropy of each row's softmax.
        temperature: divides the logits, after the softcap.
        shift: labels [..., S] are aligned with the tokens: entry t is token t itself, which row t - 1 predicts, and so
            are the results. Nothing predicts the first.
    Returns:
        (log p in nats, entropy in nats or None), float32 (float64 for float64 input) of the shape of `labels`; 0, and
        without gradient, where a label is `ignore_index`.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given. On a CPU the backward raises where an
            upstream gradient is not finite.
    """
    if shift:
        if stats is not None:
            raise ValueError("stats are of rows, and shift=True takes labels of tokens; shift them first")
        check_shifted(labels)
        labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if stats is None:
        stats = token_stats(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            entropy=entropy,
            ignore_index=ignore_index,
            impl=impl,
        )
    elif entropy and stats.entropy is None:
        raise ValueError("stats have no entropy; make them with entropy=True")
    check_number("temperature", temperature)
    check_positive("temperature", temperature)
    check_positive("softcap", softcap)
    hidden, weight, bias, shard = local_head(hidden, weight, bias)
    hidden = check_head(hidden, weight, bias)
    _check_stats(stats, check_labels(labels, hidden.shape[:-1]), ignore_index)
    impl = resolve_impl(impl, hidden, shard, "gradient", weight)
    head = Head(bias, softcap, float(logit_scale)).tempered(temperature)
    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    valid = y != ignore_index
    with torch.autocast(hidden.device.type, enabled=False):  # or it would round what is float32 on purpose
        if impl == "reference":
            of_valid = reference.logprobs(reference.head_logits(x[valid], weight, *head), y[valid])
            nothing, at = torch.zeros_like(stats.lse), valid.view(labels.shape)
            results = [nothing.masked_scatter(at, values) for values in of_valid]
        else:
            y = y if shard is None else shard.labels(y, ignore_index)
            some = TokenStats(stats.lse, stats.target_logit, entropy=stats.entropy if entropy else None)
            log_p, _, entropies, _ = _row_statistics(x, weight, y, some, head, impl)
            of_rows = [log_p] if entropies is None else [log_p, entropies]
            results = [torch.where(valid, values, 0).view(labels.shape) for values in of_rows]
    if shift:
        results = [pad(values, (1, 0))[..., :-1] for values in results]
    return results[0], results[1] if entropy else None


def selected_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    keep: Tensor,
    *,
    stats: TokenStats | None = None,
    denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor:
    """Σ keep · loss / denominator, differentiable in `hidden`, `weight` and `bias`; the loss of a row is its nll.

    With label smoothing ε and a z-loss of c it is (1 - ε) nll + ε (mean nll of all V tokens) + c lse²
    (arXiv 1512.00567, sec. 7; arXiv 2204.02311, sec. 5).

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...] int64 or int32; bias: [V]; softcap, logit_scale: as in
            `token_stats`, which also says how a head that is sharded over ranks is given: it gets the gradient of its
            own rows, and `hidden` the sum over ranks.
        keep: [...] bool, or real weights (also negative; constants for the gradient): `class_weight[labels]` weighs
            classes. Ignored rows never count.
        stats: TokenStats of the same hidden, weight and labels, which were checked with them. Given, the forward does
            no matrix product. Smoothing needs their `logit_sum`.
        denominator: number or scalar tensor; None means `Σ |keep|`, the number kept for a boolean mask.
        label_smoothing: ε, in [0, 1). The statistics are then chunked where impl is "auto".
        z_loss: c, not negative.
        reduction: "sum", or "none" for keep · loss / denominator of each row, where a denominator of None is 1.
        ignore_index: label of rows that are not part of the loss.
        impl: "auto", "chunked", "fused" or "reference".
    Returns:
        Scalar, or [...] for "none"; float32 (float64 for float64 input). With nothing kept: 0, with zero gradients.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given.
    """
    whole = (hidden, weight, bias)
    hidden, weight, bias, shard = local_head(*whole)
    hidden = check_head(hidden, weight, bias)
    asked, impl = impl, resolve_impl(impl, hidden, shard, "gradient", weight)
    labels = check_labels(labels, hidden.shape[:-1])
    check_positive("softcap", softcap)
    for name, value, most in (("label_smoothing", label_smoothing, 1.0), ("z_loss", z_loss, math.inf)):
        check_number(name, value)
        if not 0 <= value < most:
            raise ValueError(f"{name} must be in [0, {most:g}); got {value}")
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none'; got {reduction!r}")
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
            logit_sum=label_smoothing > 0,
            ignore_index=ignore_index,
            impl=asked,
        )
    check_label_range(labels, whole[1].shape[0], ignore_index)
    if keep.is_floating_point():
        check_finite("keep", keep.masked_fill(labels == ignore_index, 0))
    if stats is not None:
        _check_stats(stats, labels, ignore_index, keep)
        if label_smoothing and stats.logit_sum is None:
            raise ValueError("label_smoothing needs stats.logit_sum; make the statistics with logit_sum=True")

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    x, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    coefficient = torch.where(y != ignore_index, keep.detach().reshape(-1).to(dtype), 0)
    if denominator is None:
        denominator = coefficient.abs().sum() if reduction == "sum" else 1.0
    if not isinstance(denominator, Tensor):
        check_number("denominator", denominator)
        denominator = torch.full((), denominator, dtype=dtype, device=hidden.device)  # a copy would make the host wait
    elif denominator.numel() != 1:
        raise ValueError(f"denominator must be a number or a scalar tensor; got shape {list(denominator.shape)}")
    coefficient = torch.where(denominator != 0, coefficient / denominator, 0)
    head = Head(bias, softcap, float(logit_scale))
    rows = coefficient != 0
    with torch.autocast(hidden.device.type, enabled=False):  # or it would round what is float32 on purpose
        if stats is None or impl == "reference":
            logits = reference.head_logits(x[rows], weight, *head)
            of_kept = reference.losses(logits, y[rows], label_smoothing, z_loss) * coefficient[rows]
            losses = torch.zeros_like(coefficient).masked_scatter(rows, of_kept)
        else:
            y = y if shard is None else shard.labels(y, ignore_index)
            logit_sum = stats.logit_sum if label_smoothing else None
            some = TokenStats(stats.lse, stats.target_logit, logit_sum=logit_sum)
            log_p, lse, _, logit_sum = _row_statistics(x, weight, y, some, head, impl)
            log_p = torch.where(rows, log_p, 0)  # a dropped row may be anything
            losses = -coefficient * log_p
            if label_smoothing or z_loss:
                lse = torch.where(rows, lse, 0)
                losses = losses + coefficient * z_loss * lse.square()
            if logit_sum is not None:
                mean = torch.where(rows, logit_sum, 0) / whole[1].shape[0]
                losses = losses + coefficient * label_smoothing * (log_p + lse - mean)
        return losses.sum() if reduction == "sum" else losses.view(labels.shape)
