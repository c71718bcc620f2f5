"""What is known of a row's next-token distribution, and how shards of the vocabulary merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = ("entropy", "logp_var", "top1")  # the fields that entropy=True asks for
EXTRAS = ("renyi2", "logit_sum", "rank")  # those that are asked for one by one


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the next-token distribution of each row, over the vocabulary or over a shard of it.

    All fields have the shape of `labels` and are float32 (float64 for float64 inputs).

    Attributes:
        lse: log-sum-exp of the logits, nats. -inf where no vocabulary was seen (an ignored row).
        target_logit: logit of the label; -inf where the label is not in the shard, or the row is ignored.
        entropy: entropy of the softmax, nats, or None.
        logp_var: variance of log p under p, nats², or None.
        top1: the largest logit, or None.
        renyi2: Rényi-2 entropy of the softmax, -log Σ p², nats, or None.
        logit_sum: sum of the logits, V times their mean, or None.
        rank: how many other logits exceed the label's, or None; of a shard, how many of its own.
    """

    lse: Tensor
    target_logit: Tensor
    entropy: Tensor | None = None
    logp_var: Tensor | None = None
    top1: Tensor | None = None
    renyi2: Tensor | None = None
    logit_sum: Tensor | None = None
    rank: Tensor | None = None

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the label, nats; 0 on ignored rows."""
        return torch.where(self.lse == self.target_logit, 0, self.lse - self.target_logit)

    @property
    def correct(self) -> Tensor | None:
        """Whether no logit is larger than the label's (bool), or None if `top1` was not asked for."""
        return None if self.top1 is None else (self.target_logit == self.top1) & self.lse.isfinite()

    @staticmethod
    def merge(parts: Sequence[TokenStats]) -> TokenStats:
        """Joins statistics of disjoint shards of the vocabulary; the order of `parts` does not matter but for rounding.

        With weights w_s = exp(lse_s - lse), means and variances of the logits join as
        mean = Σ w_s mean_s and var = Σ w_s (var_s + (mean_s - mean)²) (Chan et al., 1979), and Σ p² = Σ w_s² Σ p_s².
        An ignored row is the identity.

        Raises:
            ValueError: no parts, or parts that hold different fields.
        """
        if not parts:
            raise ValueError("parts is empty; merge needs the statistics of at least one shard")
        if len({tuple(p.fields()) for p in parts}) > 1:
            raise ValueError("parts hold different fields; compute every shard with the same settings")
        shards = {name: torch.stack([p.fields()[name] for p in parts]) for name in parts[0].fields()}  # (shards, ...)
        lse = torch.logsumexp(shards["lse"], 0)
        target = shards["target_logit"].amax(0)
        finite_lse = torch.where(lse.isfinite(), lse, 0)
        fields: dict[str, Tensor] = {name: shards[name].sum(0) for name in ("logit_sum", "rank") if name in shards}
        if "renyi2" in shards:
            square = torch.logsumexp(2 * (shards["lse"] - finite_lse) - shards["renyi2"], 0)
            fields["renyi2"] = torch.where(lse.isfinite(), -square, 0)
        if "entropy" in shards:
            share = torch.exp(shards["lse"] - finite_lse)
            # relative to the joint lse, so that nothing cancels when all logits are large
            shard_mean = (shards["lse"] - shards["entropy"]) - finite_lse
            shard_mean = torch.where(share > 0, shard_mean, 0)
            mean = (share * shard_mean).sum(0)
            spread = shards["logp_var"] + (shard_mean - mean) ** 2
            fields |= {"entropy": torch.where(lse.isfinite(), -mean, 0), "logp_var": (share * spread).sum(0)}
            fields["top1"] = shards["top1"].amax(0)
        return TokenStats(lse, target, **fields)

    def fields(self) -> dict[str, Tensor]:
        """The fields that there are, by name."""
        return {name: field for name, field in vars(self).items() if field is not None}

    def view(self, shape: Sequence[int]) -> TokenStats:
        """The same statistics in another shape."""
        return TokenStats(**{name: field.view(shape) for name, field in self.fields().items()})

    def write(self, rows: Tensor, part: TokenStats) -> None:
        """Puts the statistics of some rows in their place; rows: (R,) int64."""
        for name, field in self.fields().items():
            field[rows] = part.fields()[name]


def wanted_fields(entropy: bool, renyi2: bool, logit_sum: bool, rank: bool) -> tuple[str, ...]:
    """The fields of TokenStats that are asked for, beside those that it always has."""
    extras = zip(EXTRAS, (renyi2, logit_sum, rank), strict=True)
    return (*(MOMENTS if entropy else ()), *(name for name, wanted in extras if wanted))


def no_stats(labels: Tensor, dtype: torch.dtype, wanted: Sequence[str]) -> TokenStats:
    """The statistics of rows that have seen no vocabulary."""
    none = torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device)
    fields = {name: none.clone() if name == "top1" else torch.zeros_like(none) for name in wanted}
    return TokenStats(none, none.clone(), **fields)


def sums_of(wanted: Sequence[str]) -> int:
    """How many sums a kernel makes of a row's share of the vocabulary."""
    return 8 if set(wanted) & set(EXTRAS) else 5 if wanted else 3


def stats_of_sums(sums: Tensor, labels: Tensor, ignore_index: int, wanted: Sequence[str]) -> list[TokenStats]:
    """Joins a kernel's sums over shares of the vocabulary, in their order. [sums, models, shares, N] -> per model.

    Relative to the largest logit, as the sums are, so that nothing is lost where all logits are large; `merge` would
    start from shards' lse, which are rounded.
    """
    valid = labels != ignore_index  # rows without a label may not have been written
    none = no_stats(labels, torch.float32, wanted).fields()
    joined = (_joined(*sums[:, model]) for model in range(sums.shape[1]))
    return [TokenStats(**{name: torch.where(valid, of[name], none[name]) for name in none}) for of in joined]


def _joined(top: Tensor, total: Tensor, target: Tensor, *moments: Tensor) -> dict[str, Tensor]:
    """The fields of rows, of sums (shares, N) each: `write_logits_sums` says which."""
    largest = top.amax(0)
    shift = (top - largest).clamp(min=-1000)  # exp is 0 there as well, and 0 · shift² a number
    scale = shift.exp()
    whole = (scale * total).sum(0)
    fields = {"lse": largest + whole.log(), "target_logit": target.amax(0)}
    if moments:
        first, second, *more = moments
        mean = (scale * (first + shift * total)).sum(0) / whole
        square = (scale * (second + 2 * shift * first + shift**2 * total)).sum(0) / whole
        fields |= {"entropy": whole.log() - mean, "logp_var": square - mean**2, "top1": largest}
        if more:
            squares, logits, above = more
            fields["renyi2"] = 2 * whole.log() - (scale**2 * squares).sum(0).log()
            fields |= {"logit_sum": logits.sum(0), "rank": above.sum(0)}
    return fields
