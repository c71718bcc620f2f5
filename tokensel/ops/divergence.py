"""How far two models' next-token distributions are from each other, row by row and without logits; for distillation.

Two sweeps over blocks of the vocabulary: the first finds both normalisers, the second adds up what is made of both
probabilities. The backward is a third, into the student, which pays for the rows with an upstream gradient alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokensel.ops import reference
from tokensel.ops.checks import (
    check_finite,
    check_head,
    check_number,
    check_positive,
    check_same_device,
    check_same_vocabulary,
    check_shape,
    check_tensor,
)
from tokensel.ops.chunked import Head, hidden_stats, logits_block, vocabulary_blocks
from tokensel.ops.chunked_grad import WORKSPACE_MIB, gradients_by
from tokensel.ops.products import exact_products
from tokensel.ops.vocab_parallel import is_dtensor

KINDS = ("forward_kl", "reverse_kl", "jsd", "tv")


class HeadOptions(TypedDict, total=False):
    """What becomes of a product with a model's head, as `token_stats` takes it."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float


class _Model(NamedTuple):
    """Rows of a model whose normaliser is known."""

    hidden: Tensor  # (K, D), of the logits' type
    weight: Tensor  # (V, D)
    head: Head
    lse: Tensor  # (K,)

    def log_p(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """log p of a block, written into `out`. (R, C)"""
        w, bias = self.weight[columns].to(out.dtype), self.head.bias
        head = self.head if bias is None else self.head._replace(bias=bias[columns].to(out.dtype))
        return logits_block(self.hidden[rows], w, head, out).sub_(self.lse[rows, None])


def _model(hidden: Tensor, weight: Tensor, head: Head) -> _Model:
    """The first sweep. hidden (K, D), weight (V, D)."""
    some_label = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    stats = hidden_stats([(hidden, weight)], some_label, head, (), -100, WORKSPACE_MIB)
    return _Model(hidden.to(stats.lse.dtype), weight, head, stats.lse)


def _compare(student: _Model, teacher: _Model, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The second sweep: (divergence, mean under p of its slope in p), (K,) each."""
    K, V = len(student.hidden), len(student.weight)
    dtype = student.lse.dtype
    divergence, mean_slope = torch.zeros(2, K, dtype=dtype, device=student.hidden.device)
    R, C = vocabulary_blocks(K, V, WORKSPACE_MIB, models=2)
    spaces = torch.empty(2, R * C, dtype=dtype, device=student.hidden.device)
    for first in range(0, K, R):
        rows = slice(first, min(first + R, K))
        for start in range(0, V, C):
            columns = slice(start, min(start + C, V))
            shape = rows.stop - rows.start, columns.stop - columns.start
            log_p, log_q = (
                model.log_p(rows, columns, space[: math.prod(shape)].view(shape))
                for model, space in zip((student, teacher), spaces, strict=True)
            )
            terms, slope = reference.divergence_terms(log_p, log_q, kind, beta)
            divergence[rows] += terms.sum(1)
            if slope is not None:
                mean_slope[rows] += (log_p.exp() * slope).sum(1)
    return divergence, mean_slope


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        heads: tuple[Head, Head],
        kind: str,
        beta: float,
    ) -> Tensor:
        with exact_products(hidden.dtype):
            student, teacher = _model(hidden, weight, heads[0]), _model(teacher_hidden, teacher_weight, heads[1])
            divergence, mean_slope = _compare(student, teacher, kind, beta)
        kept = (hidden, weight, bias, teacher_hidden, teacher_weight, student.lse, teacher.lse, mean_slope)
        ctx.save_for_backward(*kept)
        ctx.heads, ctx.kind, ctx.beta = heads, kind, beta
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _, teacher_hidden, teacher_weight, lse, teacher_lse, mean_slope = ctx.saved_tensors
        check_finite("the gradient of the divergence", upstream)
        head, teacher_head = ctx.heads
        kept = upstream.nonzero()[:, 0]
        dtype = lse.dtype
        teacher = _Model(teacher_hidden[kept].to(dtype), teacher_weight, teacher_head, teacher_lse[kept])
        lse, mean_slope, scale = lse[kept], mean_slope[kept], upstream[kept] * head.logit_scale

        def gradient_of(z: Tensor, rows: slice, start: int) -> Tensor:
            bend = None if head.softcap is None else 1 - (z / head.softcap) ** 2
            log_p = z.sub_(lse[rows, None])
            log_q = teacher.log_p(rows, slice(start, start + z.shape[1]), torch.empty_like(z))
            _, slope = reference.divergence_terms(log_p, log_q, ctx.kind, ctx.beta)
            if slope is None:  # of KL(q, p): p - q
                dz = log_p.exp_().sub_(log_q.exp_())
            else:
                dz = log_p.exp_().mul_(slope.sub_(mean_slope[rows, None]))
            dz *= scale[rows, None]
            return dz if bend is None else dz.mul_(bend)

        want = ctx.needs_input_grad[:3]
        return *gradients_by(gradient_of, hidden, weight, kept, head, want, dtype), *[None] * 5


def token_divergence(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_head: HeadOptions | None = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution p from the teacher's q, differentiable in the student alone.

    What distillation minimises, and anchors to a base model are made of; without [N, V] logits of either. The backward
    costs nothing for rows whose upstream gradient is zero.

    Args:
        student: (hidden [..., D], weight [V, D]).
        teacher: (hidden [..., D'], weight [V, D']) of the same dtype, constants; D' may differ, V may not.
        mask: [...] bool, the rows that count.
        kind: "forward_kl", KL(q, p); "reverse_kl", KL(p, q); "jsd", beta KL(q, m) + (1 - beta) KL(p, m) of the mixture
            m = beta q + (1 - beta) p (generalised Jensen-Shannon, arXiv 2306.13649, eq. 1); "tv", `Σ |p - q| / 2`.
        beta: of "jsd", in (0, 1).
        temperature: divides the logits of both.
        bias, softcap, logit_scale: of the student's head, as in `token_stats`. teacher_head: the same of the teacher's;
            None = the student's softcap and scale, without a bias.
        impl: "auto", "chunked" (plain PyTorch on every device) or "reference".
    Returns:
        [...] nats ("tv": in [0, 1]), float32 (float64 for float64 input); 0 where the mask is False.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given.
    """
    hidden, weight = student
    teacher_hidden, teacher_weight = (t.detach() for t in teacher)
    check_head(hidden, weight, bias)
    given: HeadOptions = {"softcap": softcap, "logit_scale": logit_scale} if teacher_head is None else teacher_head
    if unknown := sorted(given.keys() - HeadOptions.__annotations__.keys()):
        raise ValueError(f"teacher_head has no {unknown[0]!r}; it takes bias, softcap and logit_scale")
    if is_dtensor(weight) or is_dtensor(teacher_weight):
        raise TypeError("weight is a DTensor; divergences of a head that is sharded over ranks are not supported")
    check_head(teacher_hidden, teacher_weight, given.get("bias"))
    if hidden.dtype != teacher_hidden.dtype:
        raise TypeError(f"student is {hidden.dtype} but teacher is {teacher_hidden.dtype}; cast one of them")
    check_same_vocabulary(student=weight, teacher=teacher_weight)
    shape = tuple(hidden.shape[:-1])
    check_shape("teacher hidden", teacher_hidden, (*shape, teacher_hidden.shape[-1]), "a row for each of the student's")
    check_shape("mask", check_tensor("mask", mask), shape, "one entry a row")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool; got {mask.dtype}")
    check_same_device(hidden=hidden, mask=mask, **{"teacher hidden": teacher_hidden})
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    for name, value in (("beta", beta), ("temperature", temperature)):
        check_number(name, value)
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1); got {beta}")
    check_positive("temperature", temperature)
    check_positive("softcap", softcap)
    check_positive("teacher_head['softcap']", given.get("softcap"))
    if impl not in ("auto", "chunked", "reference"):
        raise ValueError(f"impl must be one of auto, chunked, reference; got {impl!r}")
    heads = (
        Head(bias, softcap, float(logit_scale)).tempered(temperature),
        Head(given.get("bias"), given.get("softcap"), float(given.get("logit_scale", 1.0))).tempered(temperature),
    )
    x, y = hidden[mask], teacher_hidden[mask]  # (K, D), (K, D')
    with torch.autocast(hidden.device.type, enabled=False):  # or it would round what is float32 on purpose
        if impl == "reference":
            z, teacher_z = (
                reference.head_logits(x, weight, *heads[0]),
                reference.head_logits(y, teacher_weight, *heads[1]),
            )
            of_rows = reference.divergence_terms(z.log_softmax(-1), teacher_z.log_softmax(-1), kind, beta)[0].sum(-1)
        else:
            apply: Any = _TokenDivergence.apply  # autograd gives it no types
            of_rows = apply(x, weight, bias, y, teacher_weight, heads, kind, float(beta))
    return torch.zeros(shape, dtype=of_rows.dtype, device=hidden.device).masked_scatter(mask, of_rows)
