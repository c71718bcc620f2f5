"""Methods (steps 5 and 6): named pairs of a scorer and a selector.

Adding one is a function that builds it: its arguments are the method's parameters, its docstring the formula.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokensel import scores
from tokensel.checks import check_number
from tokensel.scores import TokenSignals
from tokensel.select import exact_share, kept_count, responses_per_sample, top_share


@dataclass(frozen=True)
class TokenSelector:
    """A method: what it needs to know, how it scores, which share of each sample it keeps.

    Attributes:
        name: as in `tokensel.methods.get`.
        needs: names of the TokenSignals fields that it reads ("history_nll", "mass", ...).
        scorer: TokenSignals -> score, higher = keep.
        rho: share of the response tokens of each sample that is kept.
    """

    name: str
    needs: frozenset[str]
    scorer: Callable[[TokenSignals], Tensor]
    rho: float

    def score(self, signals: TokenSignals) -> Tensor:
        """The score of each token, of the shape of `signals.response`.

        Raises:
            ValueError: a signal that the method needs is None.
        """
        for name in sorted(self.needs):
            if getattr(signals, name) is None:
                raise ValueError(f"method {self.name!r} needs signals.{name}, which is None")
        return self.scorer(signals)

    def __call__(self, signals: TokenSignals) -> Tensor:
        """The weight of each token, float32 of the shape of `signals.response`; 0 = dropped."""
        return self.select(self.score(signals), signals).float()

    def select(self, score: Tensor, signals: TokenSignals) -> Tensor:
        """Which tokens are kept by `score`: bool of the shape of `signals.response`."""
        return top_share(score, signals.response, signals.sample, self.rho)

    def expected_kept(self, response: Tensor, sample: Tensor) -> Tensor:
        """Σ ceil(rho · n) over samples, an int64 scalar: known before any forward, so it can be a denominator."""
        return kept_count(responses_per_sample(response, sample), self.rho).sum()


_METHODS: dict[str, Callable[..., TokenSelector]] = {}


def register(build: Callable[..., TokenSelector]) -> Callable[..., TokenSelector]:
    """Makes a builder known to `get` under its function name."""
    _METHODS[build.__name__] = build
    return build


def names() -> list[str]:
    """The registered methods, sorted."""
    return sorted(_METHODS)


def get(name: str, **parameters: object) -> TokenSelector:
    """Builds a method by name.

    Raises:
        ValueError: an unknown name (with the nearest known one), or a parameter that the method does not have.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}{hint} Known: {', '.join(names())}")
    known = list(inspect.signature(_METHODS[name]).parameters)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        takes = ", ".join(known) if known else "none"
        raise ValueError(f"method {name!r} has no parameter {', '.join(unknown)}; it takes: {takes}")
    return _METHODS[name](**parameters)


def _check_rel(gamma: float, rel_sign: int, rel_floor: float, rel_warmup: int, debias: str | None) -> None:
    numbers = {"gamma": gamma, "rel_sign": rel_sign, "rel_floor": rel_floor, "rel_warmup": rel_warmup}
    for name, value in numbers.items():
        check_number(name, value)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1]; got {gamma}")
    if rel_sign not in (1, -1):
        raise ValueError(f"rel_sign must be 1 (published) or -1; got {rel_sign}")
    if rel_floor < 0:
        raise ValueError(f"rel_floor must not be negative (nats); got {rel_floor}")
    if rel_warmup < 0:
        raise ValueError(f"rel_warmup must not be negative (samples); got {rel_warmup}")
    if rel_warmup and gamma == 1:
        raise ValueError("rel_warmup leaves nothing to score by when gamma is 1; use gamma < 1 or rel_warmup=0")
    if debias not in (None, "uniform"):
        raise ValueError(f"debias must be None or 'uniform'; got {debias!r}")


def _blend(name: str, gamma, rho, rel_sign=1, rel_floor=0.0, rel_warmup=0, debias=None) -> TokenSelector:
    _check_rel(gamma, rel_sign, rel_floor, rel_warmup, debias)
    exact_share(rho)
    needs = {"nll", "history_nll"} if gamma > 0 else set()
    if gamma < 1:
        needs |= {"mass"} | ({"uniform_mass"} if debias else set())

    def scorer(signals: TokenSignals) -> Tensor:
        return scores.sstoken(signals, gamma, rel_sign, rel_floor, rel_warmup, debias)

    return TokenSelector(name, frozenset(needs), scorer, rho)


@register
def sstoken(
    gamma: float = 0.5,
    rho: float = 0.6,
    rel_sign: int = 1,
    rel_floor: float = 0.0,
    rel_warmup: int = 0,
    debias: str | None = None,
) -> TokenSelector:
    """ssToken (arXiv 2510.18250): gamma · minmax(REL) + (1 - gamma) · Attn, top rho of each sample.

    REL = nll_history - nll_current, min-max over the response tokens of the sample; Attn = attention mass of the
    token's own query row on the prompt, mean over heads, not normalised. The paper uses rho 0.6, 0.8 at 14B.

    Args:
        gamma: weight of REL, in [0, 1]; at 0 no history is needed, at 1 no attention.
        rho: share kept, in (0, 1]; ceil(rho · n) tokens of a sample with n.
        rel_sign: 1 as published; -1 prefers tokens on which the model is worse than its history.
        rel_floor: the min-max range is never taken below this, nats.
        rel_warmup: samples during which only attention scores. (The published code leaves REL out for the dataset
            rows below 10,000.)
        debias: "uniform" divides Attn by what a uniform attention would give.
    """
    return _blend("sstoken", gamma, rho, rel_sign, rel_floor, rel_warmup, debias)


@register
def rel(rho: float = 0.6) -> TokenSelector:
    """REL alone, published sign: top rho of nll_history - nll_current (sstoken with gamma 1)."""
    return _blend("rel", 1.0, rho)


@register
def history_excess(rho: float = 0.6) -> TokenSelector:
    """REL with the sign reversed: top rho of nll_current - nll_history.

    Rho-1's excess loss (arXiv 2404.07965) with the model's own past as the reference.
    """
    return _blend("history_excess", 1.0, rho, rel_sign=-1)


@register
def attention(rho: float = 0.6, debias: str | None = None) -> TokenSelector:
    """Attention mass on the prompt alone (sstoken with gamma 0)."""
    return _blend("attention", 0.0, rho, debias=debias)


@register
def random(rho: float = 0.6, seed: int = 0) -> TokenSelector:
    """A seeded uniform draw of rho of each sample, anew each step: the baseline beside every result."""
    exact_share(rho)
    return TokenSelector("random", frozenset({"key"}), lambda signals: scores.random(signals, seed), rho)


@register
def full() -> TokenSelector:
    """Every response token: ordinary supervised fine-tuning."""
    return TokenSelector("full", frozenset(), scores.constant, 1.0)


__all__ = ["TokenSelector", "TokenSignals", "get", "names", "register"]
