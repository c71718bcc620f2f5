"""Rules (step 6): from a score to a weight per token, and what the loss is divided by. No host synchronisation.

A rule is a small frozen object. Called with a score and its signals it gives the weights; `count` gives the
denominator that one micro-batch adds to the optimizer step's, known before any forward; `scope` says among which
tokens the score is ranked.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from tokensel.ops.checks import check_number, check_positive
from tokensel.select.signals import TokenSignals

SCOPES = ("sample", "micro_batch", "batch", "dataset")


def exact_share(rho: float, name: str = "rho") -> Fraction:
    """`rho` as the decimal that was written, so that 0.6 · 10 is 6 and 0.7 · 10 is 7, not 8 after rounding up.

    Raises:
        TypeError: rho is not a number.
        ValueError: rho outside (0, 1].
    """
    check_number(name, rho)
    if not 0 < rho <= 1:
        raise ValueError(f"{name} must be in (0, 1], the share of response tokens to keep; got {rho}")
    return Fraction(str(rho)).limit_denominator(1_000_000)


def kept_count(responses: Tensor, rho: float, floor: bool = False) -> Tensor:
    """ceil(rho · n), or floor, in integers. responses: int64 counts n of any shape."""
    share = exact_share(rho)
    return (responses * share.numerator + (0 if floor else share.denominator - 1)) // share.denominator


def responses_per_sample(response: Tensor, sample: Tensor) -> Tensor:
    """Counts response tokens by sample number: bool and int64 of one shape with N entries -> [N] int64."""
    counts = torch.zeros(sample.numel(), dtype=torch.int64, device=sample.device)
    return counts.index_add_(0, sample.flatten(), response.flatten().to(torch.int64))


def constant_samples(score: Tensor, response: Tensor, sample: Tensor) -> Tensor:
    """Samples of two or more response tokens whose scores are all equal: ties keep the earlier ones. int64 scalar."""
    flat, competes, group = score.flatten(), response.flatten(), sample.flatten()
    none = torch.full_like(flat, torch.inf)
    low = none.scatter_reduce(0, group, torch.where(competes, flat, torch.inf), "amin")
    high = (-none).scatter_reduce(0, group, torch.where(competes, flat, -torch.inf), "amax")
    return ((low == high) & (responses_per_sample(response, sample) > 1)).sum()


def top_quota(score: Tensor, response: Tensor, group: Tensor, quota: Tensor) -> Tensor:
    """Keeps the `quota[g]` response tokens of each group g that score highest; ties go to the earlier one.

    Args:
        score: float; response: bool; group: int64 in [0, N); all of one shape with N entries. quota: [N] int64.
    Returns:
        bool of that shape.
    """
    flat, competes, group = score.flatten(), response.flatten(), group.flatten()
    N = flat.numel()
    # two stable sorts: by score within groups, the others behind everybody in a group N of their own
    by_score = torch.argsort(flat, descending=True, stable=True)
    order = by_score[torch.argsort(torch.where(competes, group, N)[by_score], stable=True)]
    place = torch.arange(N, device=flat.device)
    sorted_group = group[order]
    starts = torch.ones(N, dtype=torch.bool, device=flat.device)
    starts[1:] = sorted_group[1:] != sorted_group[:-1]
    rank = place - torch.where(starts, place, 0).cummax(0).values
    keep = torch.zeros(N, dtype=torch.bool, device=flat.device)
    keep[order] = rank < quota[sorted_group]
    return (keep & competes).view_as(response)


def top_share(score: Tensor, response: Tensor, group: Tensor, rho: float) -> Tensor:
    """`top_quota` of ceil(rho · n) tokens of a group with n."""
    return top_quota(score, response, group, kept_count(responses_per_sample(response, group), rho))


def spread_quota(score: Tensor, response: Tensor, sample: Tensor, rho: float, rho_min: float, rho_max: float) -> Tensor:
    """More of a sample whose scores differ much, less of one whose scores are alike, the same budget in all.

    Sample s gets the share clip(c · spread_s, rho_min, rho_max) of its tokens, spread_s the standard deviation of its
    scores and c (found by bisection) such that all samples together keep ceil(rho · n) of their n tokens.

    Returns:
        [N] int64, the quota of each sample number.
    """
    flat, competes, group = score.flatten().double(), response.flatten(), sample.flatten()
    n = responses_per_sample(response, sample).double()
    if not len(n):
        return n.long()
    zero = torch.zeros_like(n)
    mean = zero.index_add(0, group, torch.where(competes, flat, 0)) / n.clamp(min=1)
    square = torch.where(competes, (flat - mean[group]) ** 2, 0)
    spread = (zero.index_add(0, group, square) / n.clamp(min=1)).sqrt()
    budget = kept_count(n.sum().long(), rho)
    low, high = torch.zeros_like(budget, dtype=torch.float64), rho_max / spread.clamp(min=1e-12).amin()
    for _ in range(64):  # a fixed number of halvings: the host need not look
        c = (low + high) / 2
        short = ((c * spread).clamp(rho_min, rho_max) * n).sum() < budget
        low, high = torch.where(short, c, low), torch.where(short, high, c)
    wanted = ((high * spread).clamp(rho_min, rho_max) * n).cumsum(0)
    # differences of rounded sums: no sample is off by a token, and the whole budget is spent
    ends = (wanted * (budget / torch.where(wanted[-1] > 0, wanted[-1], 1))).round().long()
    # a half is rounded to the even number, which may be a token more than a sample has: it goes to those before
    tokens = n.long().cumsum(0)
    left = (tokens - ends).clamp(min=0).flip(0).cummin(0).values.flip(0)
    return torch.diff(tokens - left, prepend=tokens[:1] * 0)


@dataclass(frozen=True)
class TopShare:
    """The ceil(rho · n) best of n tokens: of each sample, of the micro-batch, of the optimizer step, of the dataset.

    Attributes:
        rho: share kept, in (0, 1].
        scope: "sample", "micro_batch", "batch" (all micro-batches of all ranks in an optimizer step; the trainer
            scores them first) or "dataset" (offline, by `tokensel select`).
        floor: keep floor(rho · n) instead.
        rho_min, rho_max: given, samples of a micro-batch share its budget by the spread of their scores, each within
            these bounds (scope "sample" only).
    """

    rho: float
    scope: str = "sample"
    rho_min: float | None = None
    rho_max: float | None = None
    floor: bool = False

    def __post_init__(self) -> None:
        exact_share(self.rho)
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {self.scope!r}")
        if (self.rho_min is None) != (self.rho_max is None):
            raise ValueError("rho_min and rho_max go together; set both or neither")
        if self.rho_min is not None and self.rho_max is not None:
            exact_share(self.rho_min, "rho_min"), exact_share(self.rho_max, "rho_max")
            if not self.rho_min <= self.rho <= self.rho_max:
                raise ValueError(f"rho={self.rho} must be within [rho_min, rho_max] = [{self.rho_min}, {self.rho_max}]")
            if self.scope != "sample":
                raise ValueError(f"rho_min and rho_max are per sample; scope {self.scope!r} has one budget already")

    def __call__(self, score: Tensor, signals: TokenSignals) -> Tensor:
        if self.rho_min is not None and self.rho_max is not None:
            quota = spread_quota(score, signals.response, signals.sample, self.rho, self.rho_min, self.rho_max)
            return top_quota(score, signals.response, signals.sample, quota)
        group = self._group(signals.sample)
        quota = self.quota(responses_per_sample(signals.response, group))
        return top_quota(score, signals.response, group, quota)

    def count(self, response: Tensor, sample: Tensor) -> Tensor:
        if self.rho_min is not None:
            return kept_count(response.sum(), self.rho)
        return self.quota(responses_per_sample(response, self._group(sample))).sum()

    def quota(self, n: Tensor) -> Tensor:
        """How many of n tokens are kept; int64 of any shape."""
        return kept_count(n, self.rho, self.floor)

    def _group(self, sample: Tensor) -> Tensor:
        return sample if self.scope == "sample" else torch.zeros_like(sample)


@dataclass(frozen=True)
class AsScored:
    """The score is the weight; the loss is divided by all response tokens, or by the samples that have any.

    Attributes:
        per_sample: each sample's weights are divided by its number of response tokens, so that samples count alike.
    """

    per_sample: bool = False
    scope: str = "sample"

    def __call__(self, score: Tensor, signals: TokenSignals) -> Tensor:
        weights = torch.where(signals.response, score, 0)
        if not self.per_sample:
            return weights
        n = responses_per_sample(signals.response, signals.sample)[signals.sample]
        return weights / n.clamp(min=1)

    def count(self, response: Tensor, sample: Tensor) -> Tensor:
        return (responses_per_sample(response, sample) > 0).sum() if self.per_sample else response.sum()


@dataclass(frozen=True)
class Above:
    """The tokens that score above a threshold; the loss is divided by all response tokens."""

    threshold: float
    scope: str = "sample"

    def __call__(self, score: Tensor, signals: TokenSignals) -> Tensor:
        return signals.response & (score > self.threshold)

    def count(self, response: Tensor, sample: Tensor) -> Tensor:
        return response.sum()


@dataclass(frozen=True)
class AsGiven:
    """Every token, with the weight that the data gives it; the loss is divided by the weights or by their number.

    Attributes:
        denominator: "weight", `Σ |weight|`, or "count", the tokens whose weight is not 0 (WIT, arXiv 2507.07817).
    """

    denominator: str = "weight"
    scope: str = "sample"

    def __post_init__(self) -> None:
        if self.denominator not in ("weight", "count"):
            raise ValueError(f"denominator must be 'weight' or 'count'; got {self.denominator!r}")

    def __call__(self, score: Tensor, signals: TokenSignals) -> Tensor:
        return signals.response

    def count(self, response: Tensor, sample: Tensor) -> Tensor:
        return response.sum()


@dataclass(frozen=True)
class LearnAndForget:
    """The ceil(rho · n) best of the micro-batch are learnt, the others un-learnt with a weight that grows.

    Loss = mean nll of the best - λ · mean nll of the others, λ = lambda_max · min(1, step / lambda_steps). Each mean is
    over its own count: the others carry -λ · kept / dropped, and the denominator is the number kept.
    """

    rho: float
    lambda_max: float
    lambda_steps: int
    scope: str = "micro_batch"

    def __post_init__(self) -> None:
        exact_share(self.rho)
        for name in ("lambda_max", "lambda_steps"):
            check_number(name, getattr(self, name))
        if self.lambda_max < 0:
            raise ValueError(f"lambda_max must not be negative; got {self.lambda_max}")
        check_positive("lambda_steps", self.lambda_steps)

    def __call__(self, score: Tensor, signals: TokenSignals) -> Tensor:
        keep = top_share(score, signals.response, torch.zeros_like(signals.sample), self.rho)
        n, kept = signals.response.sum(), keep.sum()
        forget = self.lambda_max * min(1.0, signals.step / self.lambda_steps) * kept / (n - kept).clamp(min=1)
        return torch.where(keep, 1.0, torch.where(signals.response, -forget, 0))

    def count(self, response: Tensor, sample: Tensor) -> Tensor:
        return kept_count(response.sum(), self.rho)


@dataclass(frozen=True)
class TopSamples:
    """Every token of the ceil(rho · m) best of m samples; a sample's score stands on each of its response tokens."""

    rho: float
    scope: str = "dataset"

    def __post_init__(self) -> None:
        exact_share(self.rho)
        if self.scope not in ("batch", "dataset"):
            raise ValueError(f"scope of whole samples must be batch or dataset; got {self.scope!r}")

    def __call__(self, score: Tensor, signals: TokenSignals) -> Tensor:
        response, sample = signals.response.flatten(), signals.sample.flatten()
        real = responses_per_sample(response, sample) > 0  # (N,) by sample number
        lowest = torch.full_like(score.flatten(), -torch.inf)
        value = lowest.scatter_reduce(0, sample, torch.where(response, score.flatten(), -torch.inf), "amax")
        keep = top_share(value, real, torch.zeros_like(sample), self.rho)  # (N,)
        return (response & keep[sample]).view_as(signals.response)

    def quota(self, m: Tensor) -> Tensor:
        """How many of m samples are kept; int64 of any shape."""
        return kept_count(m, self.rho)

    def count(self, response: Tensor, sample: Tensor) -> None:
        """Which samples are kept, and so how many tokens, is not known before they are scored."""
        return None


class AdaptiveThreshold:
    """Keeps the ceil((1 - alpha) · n) best of the micro-batch and moves alpha with the mean score of what it kept.

    After each optimizer step, with C the mean score of kept tokens (the conditional value at risk, CVaR),
    alpha <- clip(alpha · exp(-speed · (C - C_before) / C_before), alpha_min, alpha_max). Alpha lives on the device, so
    the host never waits; `state_dict` keeps it for a resumed run.
    """

    scope = "micro_batch"

    def __init__(self, alpha: float, speed: float, alpha_min: float, alpha_max: float) -> None:
        for name, value in (("alpha", alpha), ("alpha_min", alpha_min), ("alpha_max", alpha_max), ("speed", speed)):
            check_number(name, value)
        if not 0 <= alpha_min <= alpha <= alpha_max < 1:
            raise ValueError(
                f"0 <= alpha_min <= alpha <= alpha_max < 1 must hold; got {alpha_min}, {alpha}, {alpha_max}"
            )
        if speed < 0:
            raise ValueError(f"speed must not be negative; got {speed}")
        self.speed, self.bounds = speed, (alpha_min, alpha_max)
        self.alpha = torch.tensor(alpha, dtype=torch.float64)
        self.cvar = torch.tensor(math.nan, dtype=torch.float64)  # of the step before; NaN = none yet
        self._sums = torch.zeros(2, dtype=torch.float64)  # (score of kept tokens, their number) of this step

    def __call__(self, score: Tensor, signals: TokenSignals) -> Tensor:
        self._to(score.device)
        quota = self._kept(signals.response.sum()).expand(score.numel())  # of the one group that there is
        keep = top_quota(score, signals.response, torch.zeros_like(signals.sample), quota)
        if torch.is_grad_enabled():  # else it is an evaluation
            self._sums += torch.stack([torch.where(keep, score, 0).sum(dtype=torch.float64), keep.sum().double()])
        return keep

    def count(self, response: Tensor, sample: Tensor) -> Tensor:
        self._to(response.device)
        return self._kept(response.sum())

    def after_step(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """Moves alpha at the end of an optimizer step. reduce: adds the (2,) sums up over ranks."""
        total, kept = reduce(self._sums)
        cvar = total / kept
        moved = self.alpha * torch.exp(-self.speed * (cvar - self.cvar) / self.cvar.abs())
        self.alpha = torch.where(moved.isfinite(), moved, self.alpha).clamp(*self.bounds)
        self.cvar = torch.where(cvar.isfinite(), cvar, self.cvar)
        self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha, "cvar": self.cvar}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: an alpha outside of [0, 1), or tensors that are no numbers.
        """
        alpha, cvar = state["alpha"], state["cvar"]
        if not all(t.dim() == 0 and t.is_floating_point() for t in (alpha, cvar)) or not 0 <= float(alpha) < 1:
            raise ValueError(
                f"rule.alpha must be a number in [0, 1) and rule.cvar a number; got {reprlib.repr(alpha)} and "
                f"{reprlib.repr(cvar)}; resume from another checkpoint"
            )
        self.alpha, self.cvar = alpha.double(), cvar.double()
        self._sums = torch.zeros_like(self._sums)  # of a step that did not end

    def _kept(self, n: Tensor) -> Tensor:
        # alpha = 0.1 must keep 9 of 10, not 10 after rounding up
        return torch.ceil((1 - self.alpha) * n - 1e-9).long()

    def _to(self, device: torch.device) -> None:
        self.alpha, self.cvar, self._sums = (t.to(device) for t in (self.alpha, self.cvar, self._sums))
