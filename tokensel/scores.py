"""Scorers (step 5): pure functions from token signals to a score, higher = keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensel.checks import check_same_device, check_shape, check_tensor
from tokensel.documents import uniform_from_keys


@dataclass(frozen=True)
class TokenSignals:
    """What is known of each token before it is kept or dropped. All tensors have one shape, [N] or [B, S].

    Attributes:
        response: bool, the tokens that compete.
        sample: int64 in [0, N), which sample a token belongs to (`tokensel.documents.document_index`).
        nll: float, current negative log-likelihood, nats.
        history_nll: float, the same under the history, nats.
        mass: float, attention mass on the prompt.
        uniform_mass: float, what a uniform attention would put there (for `debias`).
        key: int64 identity of the token (`tokensel.documents.token_keys`), what seeded random draws from.
        step: optimizer steps done, so that random selection draws anew each step.
        samples_seen: samples trained on before this optimizer step (for `rel_warmup`).
    """

    response: Tensor
    sample: Tensor
    nll: Tensor | None = None
    history_nll: Tensor | None = None
    mass: Tensor | None = None
    uniform_mass: Tensor | None = None
    key: Tensor | None = None
    step: int = 0
    samples_seen: int = 0

    def __post_init__(self) -> None:
        if check_tensor("response", self.response).dtype != torch.bool:
            raise TypeError(f"response must be torch.bool; got {self.response.dtype}")
        fields = {n: getattr(self, n) for n in ("sample", "nll", "history_nll", "mass", "uniform_mass", "key")}
        for name, value in fields.items():
            if value is not None:
                check_shape(name, check_tensor(name, value), tuple(self.response.shape), "the shape of response")
        check_same_device(response=self.response, **fields)


def excess_over_current(signals: TokenSignals) -> Tensor:
    """Retrospective excess loss, REL_i = nll_history_i - nll_current_i, nats (ssToken, arXiv 2510.18250).

    Large means that the model has already improved on the token.
    """
    return signals.history_nll - signals.nll


def minmax_per_sample(values: Tensor, signals: TokenSignals, floor: float = 0.0) -> Tensor:
    """Maps the response tokens of each sample onto [0, 1]; other tokens get 0.

    Args:
        values: float, the shape of `signals.response`.
        floor: the range max - min is never taken below this, so that differences which are only noise are not
            stretched; in the units of `values`.
    """
    sample = signals.sample.flatten()
    flat = values.flatten()
    response = signals.response.flatten()
    start = torch.full_like(flat, torch.inf)
    low = start.scatter_reduce(0, sample, torch.where(response, flat, torch.inf), "amin")
    high = (-start).scatter_reduce(0, sample, torch.where(response, flat, -torch.inf), "amax")
    spread = (high - low).clamp(min=floor)[sample]
    unit = torch.where(response & (spread > 0), (flat - low[sample]) / torch.where(spread > 0, spread, 1), 0)
    return unit.view_as(values)


def attention(signals: TokenSignals, debias: str | None = None) -> Tensor:
    """Attention mass on the prompt; `debias="uniform"` divides by the mass of a uniform attention."""
    if debias is None:
        return signals.mass
    return torch.where(signals.uniform_mass > 0, signals.mass / signals.uniform_mass, 0)


def sstoken(
    signals: TokenSignals,
    gamma: float,
    rel_sign: int = 1,
    rel_floor: float = 0.0,
    rel_warmup: int = 0,
    debias: str | None = None,
) -> Tensor:
    """gamma · minmax(rel_sign · REL) + (1 - gamma) · Attn (arXiv 2510.18250); a part with weight 0 is not read.

    During the first `rel_warmup` samples the REL part is left out.
    """
    score = torch.zeros(signals.response.shape, dtype=torch.float32, device=signals.response.device)
    if gamma > 0 and signals.samples_seen >= rel_warmup:
        score = score + gamma * minmax_per_sample(rel_sign * excess_over_current(signals), signals, rel_floor)
    if gamma < 1:
        score = score + (1 - gamma) * attention(signals, debias)
    return score


def random(signals: TokenSignals, seed: int) -> Tensor:
    """Seeded uniform in [0, 1): a function of (token's document and place, seed, step) and of nothing else."""
    return uniform_from_keys(signals.key, seed * 1_000_003 + signals.step)


def constant(signals: TokenSignals) -> Tensor:
    """1 for every token."""
    return torch.ones(signals.response.shape, dtype=torch.float32, device=signals.response.device)
