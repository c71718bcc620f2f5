"""A method (steps 5 and 6) is a scorer and a rule under a name: its type, and the registry of names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokensel.ops.checks import may_read_values
from tokensel.select.rules import Above, AdaptiveThreshold, AsGiven, AsScored, LearnAndForget, TopSamples, TopShare
from tokensel.select.signals import RECORDED, TokenSignals


@dataclass(frozen=True)
class SelectionMethod:
    """A method: what it needs to know, its scorer, and the rule by which a score becomes weights.

    Attributes:
        name: as in `tokensel.methods.get`.
        needs: names of the TokenSignals fields that it reads ({"history_nll", "mass"}, say).
        scorer: TokenSignals -> score, higher = keep.
        rule: from `tokensel.select.rules`: weights, denominator and scope.
    """

    name: str
    needs: AbstractSet[str]
    scorer: Callable[[TokenSignals], Tensor]
    rule: TopShare | Above | AsScored | AsGiven | LearnAndForget | TopSamples | AdaptiveThreshold

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))

    @property
    def scope(self) -> str:
        """Among which tokens the score is ranked: "sample", "micro_batch", "batch" or "dataset"."""
        return self.rule.scope

    def score(self, signals: TokenSignals) -> Tensor:
        """The score of each token, of the shape of `signals.response`.

        Raises:
            ValueError: a signal that the method needs is None, or (on a CPU; a device-side assertion elsewhere) is not
                finite on a response token.
        """
        for name in sorted(self.needs):
            value = getattr(signals, name)
            if value is None:
                how = f"; it needs {RECORDED[name]}" if name in RECORDED else ""
                raise ValueError(f"method {self.name!r} needs signals.{name}, which is None{how}")
            if isinstance(value, Tensor) and value.is_floating_point():
                _check_finite(name, value, signals.response)
        score = self.scorer(signals)
        _check_finite("score", score, signals.response)
        return score

    def select(self, score: Tensor, signals: TokenSignals) -> Tensor:
        """The weight of each token by its score, float32; 0 = dropped. Weights that the data gives are factors.

        Tokens to which the data gives weight 0 do not compete.
        """
        if signals.weight is None:
            return self.rule(score, signals).float()
        competing = signals.response & (signals.weight != 0)
        weights = self.rule(score, replace(signals, response=competing)).float()
        return weights * signals.weight.float()

    def __call__(self, signals: TokenSignals) -> Tensor:
        """The weight of each token, float32 of the shape of `signals.response`; 0 = dropped."""
        return self.select(self.score(signals), signals)

    def count(self, response: Tensor, sample: Tensor, weight: Tensor | None = None) -> Tensor | None:
        """What a micro-batch adds to the denominator of the loss: known before any forward, or None.

        Args:
            response, sample: as in TokenSignals.
            weight: of the shape of `response`, what the data gives each token, prompt tokens too; None = 1.
        """
        if weight is None:
            return self.rule.count(response, sample)
        if isinstance(self.rule, AsGiven):
            return weight.abs().sum() if self.rule.denominator == "weight" else (weight != 0).sum()
        competing = self.rule.count(response & (weight != 0), sample)
        return None if competing is None else competing + torch.where(response, 0, weight).abs().sum()


def _check_finite(name: str, value: Tensor, response: Tensor) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled graph has no place for the check
    finite = value.isfinite() | ~response
    if not may_read_values(value):
        torch._assert_async(finite.all(), f"{name}: not finite on a response token")
    elif not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name}{where} is {float(value[tuple(where)])} on a response token; check the model's losses, the data's "
            "weights and what was recorded"
        )


_METHODS: dict[str, Callable[..., SelectionMethod]] = {}
_GONE = {"rel_scale": "it went in 0.2: neither ranking nor gating REL improved on min-max"}


def register(build: Callable[..., SelectionMethod]) -> Callable[..., SelectionMethod]:
    """Makes a builder known to `get` under its function name."""
    _METHODS[build.__name__] = build
    return build


def names() -> list[str]:
    """The registered methods, sorted."""
    return sorted(_METHODS)


def builder(name: str) -> Callable[..., SelectionMethod]:
    """The function that builds a method: its signature and docstring explain it.

    Raises:
        ValueError: an unknown name; says the nearest known one.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown method {name!r}{hint} Known: {', '.join(names())}")
    return _METHODS[name]


def get(name: str, **parameters: object) -> SelectionMethod:
    """Builds a method by name.

    Raises:
        ValueError: an unknown name (with the nearest known one), or a parameter that the method does not have.
    """
    build = builder(name)
    takes = list(inspect.signature(build).parameters)
    for unknown in sorted(set(parameters) - set(takes)):
        near = difflib.get_close_matches(unknown, takes, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        hint = f" ({_GONE[unknown]})" if unknown in _GONE else hint
        raise ValueError(f"method {name!r} has no parameter {unknown}{hint}; it takes: {', '.join(takes) or 'none'}")
    return build(**parameters)


def describe() -> list[dict[str, str]]:
    """A row for every method: name, score and rule, scope, parameters with their defaults, signals it needs."""
    rows = []
    for name in names():
        build = _METHODS[name]
        method = build()
        parameters = inspect.signature(build).parameters.values()
        rows.append(
            {
                "method": name,
                "score and rule": (inspect.getdoc(build) or "").partition("\n")[0],
                "scope": method.scope,
                "needs": ", ".join(sorted(method.needs)) or "-",
                "parameters": ", ".join(f"{p.name}={p.default}" for p in parameters) or "-",
            }
        )
    return rows
