"""What is known of a row's next-token distribution, and how shards of the vocabulary merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    lse: Tensor
    target_logit: Tensor
    entropy: Tensor | None = None
    logp_var: Tensor | None = None
    top1: Tensor | None = None

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
        mean = Σ w_s mean_s and var = Σ w_s (var_s + (mean_s - mean)²) (Chan et al., 1979).
        An ignored row is the identity.

        Raises:
            ValueError: no parts, or parts that hold different fields.
        """
        if not parts:
            raise ValueError("parts is empty; merge needs the statistics of at least one shard")
        if len({tuple(p.fields()) for p in parts}) > 1:
            raise ValueError("parts hold different fields; compute every shard with the same entropy= setting")
        shards = {name: torch.stack([p.fields()[name] for p in parts]) for name in parts[0].fields()}  # (shards, ...)
        lse = torch.logsumexp(shards["lse"], 0)
        target = shards["target_logit"].amax(0)
        if "entropy" not in shards:
            return TokenStats(lse, target)
        finite_lse = torch.where(lse.isfinite(), lse, 0)
        share = torch.exp(shards["lse"] - finite_lse)
        # relative to the joint lse, so that nothing cancels when all logits are large
        shard_mean = (shards["lse"] - shards["entropy"]) - finite_lse
        shard_mean = torch.where(share > 0, shard_mean, 0)
        mean = (share * shard_mean).sum(0)
        spread = shards["logp_var"] + (shard_mean - mean) ** 2
        entropy = torch.where(lse.isfinite(), -mean, 0)
        return TokenStats(lse, target, entropy, (share * spread).sum(0), shards["top1"].amax(0))

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


def no_stats(labels: Tensor, dtype: torch.dtype, entropy: bool) -> TokenStats:
    """The statistics of rows that have seen no vocabulary."""
    none = torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device)
    zero = torch.zeros_like(none)
    if not entropy:
        return TokenStats(none, none.clone())
    return TokenStats(none, none.clone(), entropy=zero, logp_var=zero.clone(), top1=none.clone())


def stats_of_sums(sums: Tensor, labels: Tensor, ignore_index: int) -> list[TokenStats]:
    """Joins a kernel's sums over shares of the vocabulary, in their order. [fields, models, shares, N] -> per model.

    Relative to the largest logit, as the sums are, so that nothing is lost where all logits are large; `merge` would
    start from shards' lse, which are rounded.
    """
    valid = labels != ignore_index  # rows without a label may not have been written
    none = no_stats(labels, torch.float32, len(sums) == 5).fields()
    return [_joined(sums[:, model], valid, none) for model in range(sums.shape[1])]


def _joined(sums: Tensor, valid: Tensor, none: dict[str, Tensor]) -> TokenStats:
    share_top, share_total, share_target, *moments = sums  # (shares, N) each
    top = share_top.amax(0)
    shift = (share_top - top).clamp(min=-1000)  # exp is 0 there as well, and 0 · shift² a number
    scale = shift.exp()
    total = (scale * share_total).sum(0)
    fields = {"lse": top + total.log(), "target_logit": share_target.amax(0)}
    if moments:
        share_first, share_second = moments
        mean = (scale * (share_first + shift * share_total)).sum(0) / total
        square = (scale * (share_second + 2 * shift * share_first + shift**2 * share_total)).sum(0) / total
        fields |= {"entropy": total.log() - mean, "logp_var": square - mean**2, "top1": top}
    return TokenStats(**{name: torch.where(valid, field, none[name]) for name, field in fields.items()})
