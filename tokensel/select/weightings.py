"""Methods that train every response token, each with a weight by what the current model predicted.

Most are losses that others differentiate: a loss f(p) has the gradient of -p f'(p) · nll with the factor held constant,
and the factor is the weight here. As in `methods`, p is the probability of the label and nll = -log p in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokensel.ops.checks import check_number, check_positive
from tokensel.select import scores
from tokensel.select.method import SelectionMethod, register
from tokensel.select.rules import AsScored
from tokensel.select.signals import TokenSignals


def _check_not_negative(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative; got {value}")


@register
def dft() -> SelectionMethod:
    """Weight p, detached, on every response token (dynamic fine-tuning, arXiv 2508.05629, eq. 9).

    Loss = Σ p · nll / n over all n response tokens.
    """
    return SelectionMethod("dft", {"nll"}, scores.probability, AsScored())


@register
def f_alpha(alpha: float = 1.0) -> SelectionMethod:
    """Weight p^alpha, detached, on every response token: the gradient of (1 - p^alpha) / alpha (arXiv 2510.00526).

    alpha 0 is ordinary fine-tuning, 1 is dft. The paper finds alpha near 1 best on a strong base, near 0 on a weak one.
    """
    _check_not_negative("alpha", alpha)
    return SelectionMethod("f_alpha", {"nll"}, lambda s: scores.probability_power(s, alpha), AsScored())


@register
def deft() -> SelectionMethod:
    """Weight p^c, c = Σ p² over the vocabulary, both detached, on every response token (DEFT, arXiv 2602.11424).

    The gradient of (1 - p^c) / c with c = exp(-Rényi-2 entropy) constant: near ordinary fine-tuning where the model is
    unsure, near dft where it is sure. The constants of the Cayley variant stand in its code alone; it is left out.
    """
    scorer = lambda s: scores.probability_power(s, torch.exp(-s["renyi2"]))  # noqa: E731
    return SelectionMethod("deft", {"nll", "renyi2"}, scorer, AsScored())


@register
def eaft(alpha: float = 1.0, top_k: int = 20) -> SelectionMethod:
    """Weight (H / ln top_k)^alpha, detached, H the entropy, on every response token (EAFT, arXiv 2601.02151, eq. 3).

    H is that of the whole vocabulary, of which the paper takes the top_k likeliest tokens, renormalised, as an
    approximation. alpha 0 is ordinary fine-tuning. Axolotl's code leaves out ln top_k; the weights are then three times
    as large.
    """
    _check_not_negative("alpha", alpha)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 2:
        raise ValueError(f"top_k must be a whole number of tokens, 2 or more; got {top_k!r}")
    scorer = lambda s: (s["entropy"].clamp(min=0) / math.log(top_k)) ** alpha  # noqa: E731
    return SelectionMethod("eaft", {"entropy"}, scorer, AsScored())


@register
def infosft(peak: float = 0.93) -> SelectionMethod:
    """Weight p · max(0, 1 - logit p / logit peak), detached, on every response token (InfoSFT, arXiv 2605.14967).

    logit p = log(p / (1 - p)). What the model gives `peak` or more is not trained any more. As the released code
    scales it; the paper's weight is logit(peak) times this.
    """
    check_number("peak", peak)
    if not 0.5 < peak < 1:
        raise ValueError(f"peak must be in (0.5, 1), a probability; got {peak}")
    return SelectionMethod("infosft", {"nll"}, lambda s: scores.information(s, peak), AsScored())


@register
def idft(beta: float = 1.0, gamma_min: float = 0.1, gamma_max: float = 2.0) -> SelectionMethod:
    """Weight p^g (1 - g nll), detached: the gradient of -p^g log p, g = exp(-(log p + H) / beta) (arXiv 2602.12222).

    As the released code trains it: g constant and clamped, H the entropy. The weight is below 0 where g nll > 1, so
    that such tokens are un-learnt. The paper's own equation could not be verified, and an older trainer of the same
    repository has another loss under this name. Its warm-up is left out.
    """
    check_positive("beta", beta)
    for name, value in (("gamma_min", gamma_min), ("gamma_max", gamma_max)):
        check_number(name, value)
    if not 0 <= gamma_min <= gamma_max < math.inf:
        raise ValueError(f"0 <= gamma_min <= gamma_max, finite, must hold; got {gamma_min}, {gamma_max}")
    scorer = lambda s: scores.in_distribution(s, beta, gamma_min, gamma_max)  # noqa: E731
    return SelectionMethod("idft", {"nll", "entropy"}, scorer, AsScored())


@register
def rank_tuner(times_probability: bool = True) -> SelectionMethod:
    """Weight p · (p s)^(-K), detached: p against the rank that the entropy expects (RankTuner, arXiv 2602.01745).

    s = 2^H / 4 + 1, the entropy H in bits; K = 1 / log2(x + 1)², x the larger one of s and the label's rank. (p s)^(-K)
    stays within [1/2, 2], as the published scale of ranks does, of which it is an approximation. Read in summaries of
    the paper: its code is not public, and what it does where H is below two bits could not be verified.

    Args:
        times_probability: the factor p in front, as for mathematics; without it, as for general tasks.
    """
    if not isinstance(times_probability, bool):
        raise ValueError(f"times_probability must be true or false; got {times_probability!r}")

    def scorer(signals: TokenSignals) -> Tensor:
        scale = scores.relative_scale(signals)
        return scores.probability(signals) * scale if times_probability else scale

    return SelectionMethod("rank_tuner", {"nll", "entropy", "rank"}, scorer, AsScored())


@register
def talr(w_min: float = 0.01) -> SelectionMethod:
    """Weight max(p^(1 / tau), w_min), detached, tau the micro-batch's median nll (TALR, arXiv 2509.20758).

    w_min 1 is ordinary fine-tuning. The paper's floor, and whether its weights are normalised, could not be verified.
    """
    check_number("w_min", w_min)
    if not 0 <= w_min <= 1:
        raise ValueError(f"w_min must be in [0, 1]; got {w_min}")
    scorer = lambda s: scores.tempered_probability(s, w_min)  # noqa: E731
    return SelectionMethod("talr", {"nll"}, scorer, AsScored(scope="micro_batch"))
