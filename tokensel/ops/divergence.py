"""How far two models' next-token distributions are from each other, row by row and without logits; for distillation.

A KL divergence takes one sweep over blocks of both models' logits, joined by its chain rule. The others need both
normalisers first: a sweep for them, and one that adds up what is made of both probabilities. The backward is one more,
into the student, which pays for the rows with an upstream gradient alone. A teacher that was recorded as its top k is
compared with by the student's log-probabilities at these.
"""

from __future__ import annotations

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
    may_read_values,
)
from tokensel.ops.chunked import SMALLEST_EXPONENT, Head, hidden_stats
from tokensel.ops.chunked_grad import WORKSPACE_MIB, gradients_by
from tokensel.ops.logits_blocks import LogitsBlocks, Model, row_pieces, sweep
from tokensel.ops.logprobs import (
    NOWHERE,
    TopLogprobs,
    check_id_range,
    check_ids,
    check_impl,
    check_mask,
    logprobs_at_and_elsewhere,
    repeats,
)
from tokensel.ops.token_stats import TokenStats
from tokensel.ops.vocab_parallel import VocabShard, local_head

KINDS = ("forward_kl", "reverse_kl", "jsd", "tv")


class HeadOptions(TypedDict, total=False):
    """What becomes of a product with a model's head, as `token_stats` takes it."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float


class _Known(NamedTuple):
    """What the backward needs of a divergence: (K,) each."""

    lse: Tensor  # of the student
    teacher_lse: Tensor
    mean_slope: Tensor  # mean under p of the divergence's slope in p


def _block_kl(a: Tensor, b: Tensor, *, impossible: bool) -> Tensor:
    """[KL(a, b), lse of a, lse of b] of the distributions within a block of logits, which is overwritten: (3, R).

    impossible: whether a logit may be -inf.
    """
    both_lse = []
    for z in (a, b):
        top = z.amax(1)
        torch.log_softmax(z, 1, out=z)
        both_lse.append(torch.where(top.isfinite(), top - z.amax(1), top))
    a.clamp_(min=SMALLEST_EXPONENT)
    over = torch.sub(a, b, out=b)
    if impossible:  # for either: what is -inf twice has no part
        over.masked_fill_(a == SMALLEST_EXPONENT, 0)
    return torch.stack([torch.linalg.vecdot(a.exp_(), over), *both_lse])


def _joined_kl(parts: Tensor) -> Tensor:
    """The same over a vocabulary from those of its parts, by the chain rule KL = Σ A (KL of a part + log A - log B), A
    and B being a part's probabilities. (parts, 3, R) -> (3, R)"""
    kl, lse_a, lse_b = parts.unbind(1)
    log_a, log_b = lse_a.log_softmax(0), lse_b.log_softmax(0)
    over = torch.where(log_b == -torch.inf, 0, kl) + log_a - log_b  # no number where b can say nothing, else infinite
    kl = (log_a.exp() * torch.where(log_a == -torch.inf, 0, over)).sum(0)
    return torch.stack([kl, lse_a.logsumexp(0), lse_b.logsumexp(0)])


def _kl(a: Model, b: Model, dtype: torch.dtype, shard: VocabShard | None) -> Tensor:
    """[KL(a, b), lse of a, lse of b], (3, K), by one sweep."""
    found = a.hidden.new_empty(3, len(a.hidden), dtype=dtype)
    parts: list[Tensor] = []
    impossible = a.head.bias is not None or b.head.bias is not None
    for rows, columns, logits in sweep([a, b], dtype, WORKSPACE_MIB):
        parts.append(_block_kl(*logits, impossible=impossible))
        if columns.stop == len(a.weight):
            found[:, rows] = _joined_kl(torch.stack(parts))
            parts = []
    return found if shard is None else _joined_kl(torch.stack(shard.gather(found)))


def _lse(model: Model, dtype: torch.dtype, shard: VocabShard | None) -> Tensor:
    some_label = torch.zeros(len(model.hidden), dtype=torch.int64, device=model.hidden.device)
    lse = hidden_stats([model[:2]], some_label, model.head, (), -100, WORKSPACE_MIB).lse.to(dtype)
    return lse if shard is None else torch.stack(shard.gather(lse)).logsumexp(0)


def _compare(models: tuple[Model, Model], lse: tuple[Tensor, Tensor], kind: str, beta: float, *, slope: bool) -> Tensor:
    """[divergence, mean under p of its slope in p if that is asked for, else 0], (2, K), by one sweep."""
    sums = torch.zeros(2, *lse[0].shape, dtype=lse[0].dtype, device=lse[0].device)
    for rows, columns, logits in sweep(models, lse[0].dtype, WORKSPACE_MIB):
        size = row_pieces(columns.stop - columns.start)
        for i, (z, y) in enumerate(zip(*(block.split(size) for block in logits), strict=True)):
            piece = slice(rows.start + i * size, rows.start + i * size + len(z))
            log_p, log_q = z.sub_(lse[0][piece, None]), y.sub_(lse[1][piece, None])
            terms, slopes = reference.divergence_terms(log_p, log_q, kind, beta)
            sums[0, piece] += terms.sum(1)
            if slope and slopes is not None:
                sums[1, piece] += torch.linalg.vecdot(log_p.exp_(), slopes)
    return sums


def _divergence(
    student: Model,
    teacher: Model,
    kind: str,
    beta: float,
    lse: tuple[Tensor, Tensor] | None,
    shard: VocabShard | None,
    *,
    slope: bool,
) -> tuple[Tensor, _Known]:
    """The divergence (K,), and what its gradient is made of; its mean slope only if `slope`."""
    dtype = torch.promote_types(student.hidden.dtype, torch.float32)
    is_kl = kind.endswith("kl")  # whose mean slope is the reverse divergence itself, or not needed
    if is_kl and lse is None:
        if kind == "forward_kl":
            kl, teacher_lse, student_lse = _kl(teacher, student, dtype, shard)
        else:
            kl, student_lse, teacher_lse = _kl(student, teacher, dtype, shard)
        return kl, _Known(student_lse, teacher_lse, kl)
    if lse is None:
        lse = _lse(student, dtype, shard), _lse(teacher, dtype, shard)
    sums = _compare((student, teacher), lse, kind, beta, slope=slope and not is_kl)
    if shard is not None:
        sums = torch.stack(shard.gather(sums)).sum(0)
    return sums[0], _Known(*lse, sums[0] if is_kl else sums[1])


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        divergence: Tensor,
        known: _Known,
        head: Head,
        teacher: Model,
        kind: str,
        beta: float,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, *known, *teacher[:2], teacher.head.bias)
        ctx.heads, ctx.kind, ctx.beta = (head, teacher.head), kind, beta
        return divergence.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, teacher_lse, mean_slope, teacher_hidden, teacher_weight, its_bias = ctx.saved_tensors
        check_finite("the gradient of the divergence", upstream)
        # biases that have changed since are noticed
        head, teacher_head = (of._replace(bias=b) for of, b in zip(ctx.heads, (bias, its_bias), strict=True))
        kept = upstream.nonzero()[:, 0]
        of_teacher = LogitsBlocks(Model(teacher_hidden[kept], teacher_weight, teacher_head), lse.dtype)
        lse, teacher_lse, mean_slope = lse[kept], teacher_lse[kept], mean_slope[kept]
        scale = upstream[kept] * head.logit_scale

        def gradient_of(z: Tensor, rows: slice, start: int) -> Tensor:
            bend = None if head.softcap is None else 1 - (z / head.softcap) ** 2
            y = of_teacher(rows, slice(start, start + z.shape[1]))
            log_p, log_q = z.sub_(lse[rows, None]), y.sub_(teacher_lse[rows, None])
            if ctx.kind == "forward_kl":
                dz = log_p.clamp_(min=SMALLEST_EXPONENT).exp_().sub_(log_q.clamp_(min=SMALLEST_EXPONENT).exp_())
            else:
                size = row_pieces(z.shape[1])
                blocks = (log_p.split(size), log_q.split(size), mean_slope[rows, None].split(size))
                for piece, of_q, mean in zip(*blocks, strict=True):
                    _, slope = reference.divergence_terms(piece, of_q, ctx.kind, ctx.beta)
                    assert slope is not None  # only KL(q, p) has none
                    piece.exp_().mul_(slope.sub_(mean))
                dz = log_p
            dz *= scale[rows, None]
            return dz if bend is None else dz.mul_(bend)

        want = ctx.needs_input_grad[:3]
        return *gradients_by(gradient_of, hidden, weight, kept, head, want, lse.dtype), *[None] * 6


def _of_top(log_p: Tensor, elsewhere: Tensor, log_q: Tensor, kind: str, beta: float, add_tail: bool) -> Tensor:
    """Divergence over K tokens from log-probabilities (K, n) and (K,), differentiable in the first two. -> (K,)"""
    rounding = torch.finfo(log_q.dtype).eps
    log_q = log_q.to(log_p.dtype)
    if add_tail:
        tail = (1 - log_q.exp().sum(1)).clamp(min=0)
        if kind == "reverse_kl":  # infinite where the teacher's is 0, which a rounded sum cannot tell from little
            tail = tail.clamp(min=rounding)
        tail = torch.where(elsewhere == -torch.inf, 0, tail)  # a rounding, too, where every token is named
        log_p, log_q = torch.cat([log_p, elsewhere[:, None]], 1), torch.cat([log_q, tail.log()[:, None]], 1)
    else:
        log_p, log_q = (x - x.logsumexp(1, keepdim=True) for x in (log_p, log_q))
    return reference.divergence_terms(log_p, log_q, kind, beta)[0].sum(1)


def token_divergence(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | TopLogprobs,
    mask: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    stats: tuple[TokenStats, TokenStats] | None = None,
    add_tail: bool = True,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_head: HeadOptions | None = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution p from the teacher's q, differentiable in the student alone.

    What distillation minimises, and anchors to a base model are made of; without [N, V] logits of either. The backward
    costs nothing for rows whose upstream gradient is zero.

    Of a recorded teacher only q of its K tokens S is known. With `add_tail` all others are one token more, of q_rest =
    1 - Σ_S q and p_rest = 1 - Σ_S p, and the sums below go over K + 1 tokens: KL(q, p) is `Σ_S q (log q - log p) +
    q_rest (log q_rest - log p_rest)`. None is more than its sum over the vocabulary (TRL's `loss_add_tail`, SDPO).
    Without `add_tail`, q and p are q / Σ_S q and p / Σ_S p (NeMo-RL, Axolotl): what p has elsewhere does not count.
    verl's `Σ_S q (log q - log p)` may be negative, and is no divergence; `logprobs_at` gives its log p.

    Products with a head: the forward makes the logits of both models once for a KL divergence or with `stats`, else
    twice. The backward makes them again, and two products more for the student's gradients (one with a frozen head). Of
    a recorded teacher, which has no head, it is one product, and three in the backward.

    Args:
        student: (hidden [..., D], weight [V, D]). A head that is sharded over ranks is given as in `token_stats`.
        teacher: constants. Either (hidden [..., D'], weight [V, D']), where D' and the dtype may differ, V may not, and
            both heads are sharded or none; or what was recorded of it, TopLogprobs(logp [..., K], ids [..., K]), at the
            same temperature. Entries with a logp of -inf hold no token.
        mask: [...] bool, the rows that count.
        kind: "forward_kl", KL(q, p); "reverse_kl", KL(p, q); "jsd", beta KL(q, m) + (1 - beta) KL(p, m) of the mixture
            m = beta q + (1 - beta) p (generalised Jensen-Shannon, arXiv 2306.13649, eq. 1); "tv", `Σ |p - q| / 2`.
        beta: of "jsd", in (0, 1).
        temperature: divides the logits of both models; not what was recorded.
        stats: TokenStats of the student and of the teacher for the same rows, heads and temperature, whose `lse` are
            taken; of others the result is wrong.
        add_tail: of a recorded teacher. q_rest is what a rounded sum leaves of 1: a q_rest of 1e-5 is known to a few
            percent. For "reverse_kl" it is at least the rounding of what was recorded, 1.2e-7 for float32, and
            half-precision records are refused; it is 0 where the student can say no other token.
        bias, softcap, logit_scale: of the student's head, as in `token_stats`. teacher_head: the same of the teacher's;
            None = the student's softcap and scale, without a bias.
        impl: "auto", "chunked" (plain PyTorch on every device) or "reference".
    Returns:
        [...] nats ("tv": in [0, 1]), float32 (float64 if an input is); 0 where the mask is False.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given.
    """
    for name, pair in (("student", student), ("teacher", teacher)):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"{name} must be (hidden, weight); got {type(pair).__name__}")
    if stats is not None and not (isinstance(stats, (tuple, list)) and all(isinstance(of, TokenStats) for of in stats)):
        raise TypeError("stats must be (TokenStats of the student, TokenStats of the teacher)")
    hidden, weight, local_bias, shard = local_head(*student, bias)
    hidden = check_head(hidden, weight, local_bias)
    check_impl(impl, shard)
    check_mask(mask, tuple(hidden.shape[:-1]))
    check_same_device(hidden=hidden, mask=mask)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    for name, value in (("beta", beta), ("temperature", temperature)):
        check_number(name, value)
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1); got {beta}")
    check_positive("temperature", temperature)
    check_positive("softcap", softcap)
    head = Head(local_bias, softcap, float(logit_scale)).tempered(temperature)
    rows = Model(hidden[mask], weight, head)  # (K, D)
    V, how = student[1].shape[0], (kind, float(beta))
    with torch.autocast(hidden.device.type, enabled=False):  # or it would round what is float32 on purpose
        if isinstance(teacher, TopLogprobs):
            if stats is not None or teacher_head is not None:
                raise ValueError("stats and teacher_head belong to a teacher of hidden states; a recorded one has none")
            logp, ids = _recorded_rows(teacher, mask, V)
            if kind == "reverse_kl" and add_tail and logp.dtype.itemsize < 4:
                raise ValueError(
                    f"teacher.logp are {logp.dtype}, too coarse for the tail of kind='reverse_kl', 1 less their sum; "
                    "record float32, or take add_tail=False or another kind"
                )
            log_p, elsewhere = logprobs_at_and_elsewhere(rows, ids, shard, impl)
            of_rows = _of_top(log_p, elsewhere, logp, *how, add_tail)
        else:
            if not add_tail:
                raise ValueError("add_tail=False belongs to a recorded teacher, TopLogprobs; this one has no tail")
            if not teacher[1].is_floating_point():
                raise TypeError("teacher must be (hidden, weight), or TopLogprobs(logp, ids) where it was recorded")
            check_same_vocabulary(student=student[1], teacher=teacher[1])
            same: HeadOptions = {"softcap": softcap, "logit_scale": logit_scale}
            options = same if teacher_head is None else teacher_head
            of_teacher = _teacher_rows(teacher, mask, options, temperature, shard)
            wide = torch.promote_types(rows.hidden.dtype, of_teacher.hidden.dtype)
            rows, of_teacher = (model._replace(hidden=model.hidden.to(wide)) for model in (rows, of_teacher))
            lse = None if stats is None else _known_lse(stats, mask, torch.promote_types(wide, torch.float32))
            if impl == "reference":
                log_p, log_q = (model.logits().log_softmax(-1) for model in (rows, of_teacher))
                of_rows = reference.divergence_terms(log_p, log_q, *how)[0].sum(-1)
            else:
                of_rows = _of_live(rows, of_teacher, *how, lse, shard)
    return torch.zeros(mask.shape, dtype=of_rows.dtype, device=hidden.device).masked_scatter(mask, of_rows)


def _of_live(
    student: Model,
    teacher: Model,
    kind: str,
    beta: float,
    lse: tuple[Tensor, Tensor] | None,
    shard: VocabShard | None,
) -> Tensor:
    """Divergence from a teacher of hidden states, differentiable in the student. -> (K,)"""
    inputs = *student[:2], student.head.bias
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    with torch.no_grad():
        divergence, known = _divergence(student, teacher, kind, beta, lse, shard, slope=trained)
    apply: Any = _TokenDivergence.apply  # autograd gives it no types
    of_rows: Tensor = apply(*inputs, divergence, known, student.head, teacher, kind, beta) if trained else divergence
    return of_rows


def _teacher_rows(
    teacher: tuple[Tensor, Tensor], mask: Tensor, options: HeadOptions, temperature: float, shard: VocabShard | None
) -> Model:
    if unknown := sorted(options.keys() - HeadOptions.__annotations__.keys()):
        raise ValueError(f"teacher_head has no {unknown[0]!r}; it takes bias, softcap and logit_scale")
    check_positive("teacher_head['softcap']", options.get("softcap"))
    hidden, weight, bias, its_shard = local_head(*teacher, options.get("bias"))
    if its_shard != shard:
        raise ValueError("student and teacher weight must be sharded over the same ranks, or neither; shard both alike")
    hidden = check_head(hidden, weight, bias)
    check_shape("teacher hidden", hidden, (*mask.shape, hidden.shape[-1]), "a row for each of the student's")
    check_same_device(mask=mask, **{"teacher hidden": hidden})
    head = Head(bias, options.get("softcap"), float(options.get("logit_scale", 1.0))).tempered(temperature)
    return Model(hidden.detach()[mask], weight.detach(), head)


def _recorded_rows(teacher: TopLogprobs, mask: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities, ids) of the rows that count, NOWHERE for an entry without a token. -> (K, n) each"""
    logp, ids = teacher
    check_ids("teacher.ids", ids, tuple(mask.shape))
    check_shape("teacher.logp", check_tensor("teacher.logp", logp, floating=True), ids.shape, "one for each of its ids")
    check_same_device(mask=mask, **{"teacher.logp": logp, "teacher.ids": ids})
    if ids.shape[-1] > vocabulary:
        raise ValueError(f"teacher.ids have {ids.shape[-1]} tokens a row, but student weight has {vocabulary} rows")
    logp, ids = logp.detach()[mask], ids[mask].long()
    there = logp != -torch.inf
    check_id_range("teacher.ids", torch.where(there, ids, 0), vocabulary)
    if may_read_values(logp):
        total = logp.double().exp().sum(1)
        if not bool((right := (total > 0) & (total < 1.05)).all()):  # half-precision records are off by a percent
            row = int((~right).nonzero()[0, 0])
            raise ValueError(
                f"teacher.logp sum up to a probability of {float(total[row]):.3g} in row {row} of those that count; "
                "they must be log-probabilities over the whole vocabulary"
            )
        if bool((twice := repeats(ids) & there).any()):
            row, entry = twice.nonzero()[0].tolist()
            raise ValueError(f"teacher.ids name token {int(ids[row, entry])} twice in row {row} of those that count")
    return logp, torch.where(there, ids, NOWHERE)


def _known_lse(stats: tuple[TokenStats, TokenStats], mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    both = []
    for name, of in zip(("student", "teacher"), stats, strict=True):
        check_shape(f"lse of the {name}'s stats", of.lse, mask.shape, "one entry a row")
        check_same_device(mask=mask, **{f"lse of the {name}'s stats": of.lse})
        lse = of.lse[mask].to(dtype)
        if may_read_values(lse) and not bool(lse.isfinite().all()):
            raise ValueError(f"the {name}'s stats have no lse for a row that counts; give it a label, or mask it")
        both.append(lse)
    return both[0], both[1]
