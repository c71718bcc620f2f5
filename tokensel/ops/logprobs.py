"""Log-probabilities of several tokens a row: the K likeliest, or K that are named. Nothing of width V is held."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    check_shape,
    check_tensor,
    check_whole,
    may_read_values,
)
from tokensel.ops.chunked import SMALLEST_EXPONENT, Head, block_stats
from tokensel.ops.chunked_grad import WORKSPACE_MIB, gradients_by
from tokensel.ops.logits_blocks import Model, sweep
from tokensel.ops.vocab_parallel import VocabShard, local_head

NOWHERE = -1  # an id that names no token of this part of the vocabulary


class TopLogprobs(NamedTuple):
    """Log-probabilities of K tokens a row, as `top_logprobs` gives them and as other programs record them.

    Attributes:
        logp: [..., K] nats, normalised over the whole vocabulary; -inf marks an entry that holds no token.
        ids: [..., K] int64 or int32, distinct within a row.
    """

    logp: Tensor
    ids: Tensor


@torch.no_grad()
def top_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    workspace_mib: float = 256,
) -> TopLogprobs:
    """The k likeliest next tokens of every row and their log-probabilities, without logits and without gradient.

    What one records of a teacher; `token_divergence` takes it. It costs one product with the head, and 12 bytes a row
    and token to keep.

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V]; softcap, logit_scale, workspace_mib: as in `token_stats`, which
            also says how a head that is sharded over ranks is given: each rank gets the same result.
        k: how many, at most V.
        mask: [...] bool, the rows that count; None = all.
        temperature: divides the logits, after the softcap.
        impl: "auto", "chunked" (plain PyTorch on every device) or "reference".
    Returns:
        TopLogprobs of [..., k]: nats, float32 (float64 for float64 input), descending, and int64 ids; of equal logits
        the smaller id comes first. Where the mask is False: -inf and 0.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given.
    """
    rows = _rows(hidden, weight, mask, bias, softcap, logit_scale, temperature, impl)
    V = weight.shape[0]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int; got {k!r}")
    if not 1 <= k <= V:
        raise ValueError(f"k must be in [1, {V}], the vocabulary; got {k}")
    check_positive("workspace_mib", workspace_mib)
    with torch.autocast(rows.model.hidden.device.type, enabled=False):
        if impl == "reference":
            found = reference.top_logprobs(rows.model.logits(), k)
        else:
            found = _top_logprobs(rows.model, k, rows.dtype, rows.shard, float(workspace_mib))
    return TopLogprobs(rows.spread(found[0], -torch.inf), rows.spread(found[1], 0))


def logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Log-probabilities of K given tokens a row, differentiable, without logits.

    Losses on some of the vocabulary are made of them, such as `Σ q (log q - log p)` over a teacher's top k alone. The
    forward is one product with the head; the backward three (two with a frozen head), of rows whose upstream gradient
    is not all zero.

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V]; softcap, logit_scale: as in `token_stats`, which also says how a
            head that is sharded over ranks is given: it gets the gradient of its own rows, `hidden` the sum over ranks.
        ids: [..., K] int64 or int32, in [0, V); a token may be named twice.
        mask: [...] bool, the rows that count; None = all. The ids of others are not read.
        temperature: divides the logits, after the softcap.
        impl: "auto", "chunked" (plain PyTorch on every device) or "reference".
    Returns:
        [..., K] nats, float32 (float64 for float64 input); 0, and without gradient, where the mask is False.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given. On a CPU the backward raises where an
            upstream gradient is not finite.
    """
    rows = _rows(hidden, weight, mask, bias, softcap, logit_scale, temperature, impl)
    some = rows.of("ids", check_ids("ids", ids, rows.shape))
    check_id_range("ids", some, weight.shape[0])
    with torch.autocast(rows.model.hidden.device.type, enabled=False):
        logp, _ = logprobs_at_and_elsewhere(rows.model, some.long(), rows.shard, impl)
    return rows.spread(logp, 0)


class _Rows(NamedTuple):
    """The rows of a call that count."""

    model: Model  # hidden (K, D)
    dtype: torch.dtype  # of the logits
    shape: tuple[int, ...]  # of all rows
    mask: Tensor | None
    shard: VocabShard | None

    def of(self, name: str, values: Tensor) -> Tensor:
        """[..., n] -> (K, n)"""
        check_same_device(**{"hidden": self.model.hidden, name: values})
        return values.reshape(-1, values.shape[-1]) if self.mask is None else values[self.mask]

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """(K, n) -> [..., n], `fill` in rows that do not count."""
        shape = *self.shape, values.shape[-1]
        if self.mask is None:
            return values.reshape(shape)
        return values.new_full(shape, fill).masked_scatter(self.mask[..., None], values)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    impl: str,
) -> _Rows:
    hidden, weight, bias, shard = local_head(hidden, weight, bias)
    hidden = check_head(hidden, weight, bias)
    check_impl(impl, shard)
    check_number("temperature", temperature)
    check_positive("temperature", temperature)
    check_positive("softcap", softcap)
    shape = tuple(hidden.shape[:-1])
    if mask is not None:
        check_mask(mask, shape)
        check_same_device(hidden=hidden, mask=mask)
    x = hidden.reshape(-1, hidden.shape[-1]) if mask is None else hidden[mask]
    head = Head(bias, softcap, float(logit_scale)).tempered(temperature)
    return _Rows(Model(x, weight, head), torch.promote_types(x.dtype, torch.float32), shape, mask, shard)


def check_impl(impl: str, shard: VocabShard | None) -> None:
    """An implementation of what has no kernel."""
    if impl not in ("auto", "chunked", "reference"):
        raise ValueError(f"impl must be one of auto, chunked, reference; got {impl!r}")
    check_whole(impl, shard)


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    check_shape("mask", check_tensor("mask", mask), shape, "one entry a row")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool; got {mask.dtype}")


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Ids [*shape, K], K >= 1."""
    check_tensor(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be torch.int64 or torch.int32; got {ids.dtype}")
    if ids.dim() != len(shape) + 1 or tuple(ids.shape[:-1]) != shape or ids.shape[-1] == 0:
        wanted = ", ".join(map(str, (*shape, "K")))
        raise ValueError(f"{name} must have shape [{wanted}], K tokens for each row of hidden; got {[*ids.shape]}")
    return ids


def check_id_range(name: str, ids: Tensor, vocabulary: int) -> None:
    """Ids in [0, vocabulary), checked as labels are (`checks.check_label_range`)."""
    if torch.compiler.is_compiling():
        return
    inside = (ids >= 0) & (ids < vocabulary)
    if not may_read_values(ids):
        torch._assert_async(inside.all(), f"{name}: outside [0, V); TOKENSEL_CHECK=1 names it")
    elif not bool(inside.all()):
        row, entry = (~inside).nonzero()[0].tolist()
        raise ValueError(
            f"{name} has {int(ids[row, entry])} in row {row} of those that count, outside [0, {vocabulary})"
        )


def _top_logprobs(
    model: Model, k: int, dtype: torch.dtype, shard: VocabShard | None, workspace_mib: float
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, ids) of the k likeliest: (K, D) -> (K, k) each."""
    K, V = len(model.hidden), len(model.weight)
    values = model.hidden.new_full((K, k), -torch.inf, dtype=dtype)
    ids = torch.full_like(values, V if shard is None else shard.vocabulary, dtype=torch.int64)  # after all that exist
    lse = values.new_full((K,), -torch.inf)
    for rows, columns, (z,) in sweep([model], dtype, workspace_mib):
        seen = columns.start  # the first so many entries hold something
        more = min(k, z.shape[1])
        if seen >= k:  # equal logits do not count, whose ids are larger than those at hand
            more = min(k, int((z > values[rows].amin(1, keepdim=True)).sum(1).amax()))
        if more:
            at = _largest(z, more)
            both = torch.cat([values[rows, :seen], z.gather(1, at)], 1)
            at = torch.cat([ids[rows, :seen], at + columns.start], 1)
            best = _largest(both, min(k, both.shape[1]))
            values[rows, : best.shape[1]], ids[rows, : best.shape[1]] = both.gather(1, best), at.gather(1, best)
        lse[rows] = torch.logaddexp(lse[rows], _lse(z))
    if shard is not None:
        ids += torch.where(ids < shard.vocabulary, shard.first, 0)
        values, ids = torch.cat(shard.gather(values), 1), torch.cat(shard.gather(ids), 1)
        lse = torch.stack(shard.gather(lse)).logsumexp(0)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k] - lse[:, None], ids.gather(1, order)[:, :k]


def _largest(z: Tensor, k: int) -> Tensor:
    """Where the k largest of each row are, from left to right; of equal ones the left ones count. (R, C) -> (R, k)"""
    values, at = z.topk(k, dim=1, sorted=False)
    tied = (z >= values.amin(1, keepdim=True)).sum(1) > k  # it is not said which of equal ones `topk` takes
    if tied.any():
        at[tied] = z[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return at.sort(dim=1).values


def _lse(z: Tensor) -> Tensor:
    """log-sum-exp of a block of logits, which is overwritten: (R, C) -> (R,)"""
    no_label = torch.full((len(z),), NOWHERE, device=z.device)
    return block_stats(z, no_label, ()).lse


def logprobs_at_and_elsewhere(model: Model, ids: Tensor, shard: VocabShard | None, impl: str) -> tuple[Tensor, Tensor]:
    """(log p of the ids, log of the probability of all tokens that are not named), differentiable.

    hidden (K, D), ids (K, n) -> (K, n), (K,). An id of NOWHERE names no token, and has -inf.
    """
    if impl == "reference":
        return reference.logprobs_at(model.logits(), ids)
    dtype, again = torch.promote_types(model.hidden.dtype, torch.float32), repeats(ids)
    if shard is not None:
        ids = torch.where((ids >= shard.first) & (ids < shard.first + shard.rows), ids - shard.first, NOWHERE)
    with torch.no_grad():
        logits, elsewhere = _logits_at(model, ids, dtype)
        if shard is not None:
            logits = torch.stack(shard.gather(logits)).amax(0)
            elsewhere = torch.stack(shard.gather(elsewhere)).logsumexp(0)
        of_all = torch.cat([logits.masked_fill(again, -torch.inf), elsewhere[:, None]], 1)
        lse = of_all.logsumexp(1)
    apply: Any = _LogprobsAt.apply  # autograd gives it no types
    results: tuple[Tensor, Tensor] = apply(*model[:2], model.head.bias, ids, logits, elsewhere, lse, model.head)
    return results


def _logits_at(model: Model, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logits of the ids, log-sum-exp of all others): (K, n) -> (K, n), (K,)"""
    logits = torch.full_like(ids, -torch.inf, dtype=dtype)
    elsewhere = logits.new_full((len(ids),), -torch.inf)
    for rows, columns, (z,) in sweep([model], dtype, WORKSPACE_MIB):
        row, entry, column = _inside(ids[rows], columns.start, z.shape[1])
        logits[rows.start + row, entry] = z[row, column]
        z[row, column] = -torch.inf
        elsewhere[rows] = torch.logaddexp(elsewhere[rows], _lse(z))
    return logits, elsewhere


def _inside(ids: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, entry, column of the block) of the ids whose logits a block holds. ids (R, n)"""
    row, entry = ((ids >= start) & (ids < start + columns)).nonzero(as_tuple=True)
    return row, entry, ids[row, entry] - start


def repeats(ids: Tensor) -> Tensor:
    """Which ids of a row were named before in it. (K, n) -> (K, n) bool"""
    ordered, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    return again.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])


class _LogprobsAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        logits: Tensor,
        elsewhere: Tensor,
        lse: Tensor,
        head: Head,
    ) -> tuple[Tensor, Tensor]:
        logp = logits - lse[:, None]
        ctx.save_for_backward(hidden, weight, bias, ids, logp, elsewhere, lse)
        ctx.head = head
        return logp, elsewhere - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor, of_elsewhere: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logp, elsewhere, lse = ctx.saved_tensors
        check_finite("the gradient of the log-probabilities", of_logp.sum(1) + of_elsewhere)
        head: Head = ctx.head._replace(bias=bias)  # noticed if it has changed since
        kept = ((of_logp != 0).any(1) | (of_elsewhere != 0)).nonzero()[:, 0]
        ids, elsewhere, lse = ids[kept], elsewhere[kept], lse[kept]
        of_logp, of_elsewhere = of_logp[kept] * head.logit_scale, of_elsewhere[kept] * head.logit_scale
        total = of_logp.sum(1) + of_elsewhere  # every log-probability falls with the lse
        # of a token that is not named: its share of them, times what they get together
        of_share = of_elsewhere - total * (elsewhere - lse).exp()
        of_named = -total[:, None] * logp[kept].exp()
        pivot = torch.where(elsewhere.isfinite(), elsewhere, 0)  # where nothing else can be, of_share is 0

        def gradient_of(z: Tensor, rows: slice, start: int) -> Tensor:
            bend = None if head.softcap is None else 1 - (z / head.softcap) ** 2
            row, entry, column = _inside(ids[rows], start, z.shape[1])
            dz = z.sub_(pivot[rows, None]).clamp_(min=SMALLEST_EXPONENT).exp_().mul_(of_share[rows, None])
            dz[row, column] = of_named[rows][row, entry]
            dz.index_put_((row, column), of_logp[rows][row, entry], accumulate=True)
            return dz if bend is None else dz.mul_(bend)

        want = ctx.needs_input_grad[:3]
        return *gradients_by(gradient_of, hidden, weight, kept, head, want, lse.dtype), *[None] * 5
