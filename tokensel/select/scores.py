"""Scorers (step 5): pure functions from token signals to a score, higher = keep."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tokensel.documents import uniform_from_keys
from tokensel.select.rules import top_share
from tokensel.select.signals import TokenSignals

EM_STEPS = 16  # on SmolLM2's vocabulary the share is then within a token or so of its limit; which are kept, nearer


def sum_per_sample(values: Tensor, signals: TokenSignals) -> Tensor:
    """Sums `values` over the response tokens of each sample and puts the sum on each of its tokens."""
    flat = torch.where(signals.response, values, 0).flatten()
    return torch.zeros_like(flat).index_add(0, signals.sample.flatten(), flat)[signals.sample]


def mean_per_sample(values: Tensor, signals: TokenSignals) -> Tensor:
    """As `sum_per_sample`, divided by the number of response tokens."""
    return sum_per_sample(values, signals) / sum_per_sample(torch.ones_like(values), signals).clamp(min=1)


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


def excess_over_current(signals: TokenSignals) -> Tensor:
    """Retrospective excess loss, REL_i = nll_history_i - nll_current_i, nats (ssToken, arXiv 2510.18250).

    Large means that the model has already improved on the token.
    """
    return signals["history_nll"] - signals["nll"]


def attention(signals: TokenSignals, debias: str | None = None) -> Tensor:
    """Attention mass on the prompt; `debias="uniform"` divides by the mass of a uniform attention."""
    if debias is None:
        return signals["mass"]
    return torch.where(signals["uniform_mass"] > 0, signals["mass"] / signals["uniform_mass"], 0)


def sstoken(
    signals: TokenSignals,
    gamma: float,
    rel_sign: int = 1,
    rel_floor: float = 0.0,
    rel_warmup: int = 0,
    debias: str | None = None,
) -> Tensor:
    """gamma · minmax(rel_sign · REL) + (1 - gamma) · Attn (arXiv 2510.18250); a part with weight 0 is not read.

    Min-max is over the response tokens of a sample. During the first `rel_warmup` samples the REL part is left out.
    """
    score = torch.zeros(signals.response.shape, dtype=torch.float32, device=signals.response.device)
    if gamma > 0 and signals.samples_seen >= rel_warmup:
        score = score + gamma * minmax_per_sample(rel_sign * excess_over_current(signals), signals, rel_floor)
    if gamma < 1:
        score = score + (1 - gamma) * attention(signals, debias)
    return score


def random(signals: TokenSignals, seed: int) -> Tensor:
    """Seeded uniform in [0, 1): a function of (token's document and place, seed, step) and of nothing else."""
    return uniform_from_keys(signals["key"], seed * 1_000_003 + signals.step)


def constant(signals: TokenSignals) -> Tensor:
    """1 for every token."""
    return torch.ones(signals.response.shape, dtype=torch.float32, device=signals.response.device)


def probability(signals: TokenSignals) -> Tensor:
    """p of the label under the current model."""
    return torch.exp(-signals["nll"])


def log_odds(signals: TokenSignals) -> Tensor:
    """log(p / (1 - p)) of the label; +inf where p is 1."""
    nll = signals["nll"]
    return -nll - torch.log(-torch.expm1(-nll))


def probability_power(signals: TokenSignals, exponent: Tensor | float) -> Tensor:
    """p to a power, by log p."""
    return torch.exp(-exponent * signals["nll"])


def information(signals: TokenSignals, peak: float) -> Tensor:
    """p · max(0, 1 - log-odds / log-odds of `peak`), InfoSFT (arXiv 2605.14967): most for tokens of middling p."""
    weight = (1 - log_odds(signals) / math.log(peak / (1 - peak))).clamp(min=0)
    return torch.where(weight > 0, probability(signals) * weight, 0)


def in_distribution(signals: TokenSignals, beta: float, gamma_min: float, gamma_max: float) -> Tensor:
    """p^g (1 - g nll), what multiplies the nll's gradient in that of -p^g log p (IDFT, arXiv 2602.12222).

    g = exp(-(log p + entropy) / beta), clamped and constant: large where the label is less likely than the model's
    entropy has it.
    """
    power = torch.exp((signals["nll"] - signals["entropy"]) / beta).clamp(gamma_min, gamma_max)
    return probability_power(signals, power) * (1 - power * signals["nll"])


def relative_scale(signals: TokenSignals) -> Tensor:
    """(p · s)^(-K), RankTuner (arXiv 2602.01745) by the entropy: above 1 for what is less likely than expected.

    s = 2^H / 4 + 1 with the entropy H in bits bounds the rank that the prediction expects; K = 1 / log2(x + 1)² at the
    larger one x of s and the label's rank, counted from 1. Within [1/2, 2], where the published scale of ranks lies.
    """
    expected = torch.exp(signals["entropy"]) / 4 + 1
    larger = torch.maximum(signals["rank"] + 1, expected)
    return torch.exp((signals["nll"] - torch.log(expected)) / torch.log2(larger + 1) ** 2).clamp(0.5, 2)


def tempered_probability(signals: TokenSignals, w_min: float) -> Tensor:
    """max(p^(1 / tau), w_min), TALR (arXiv 2509.20758), tau the median nll of response tokens, at least 1e-6 nats."""
    nll = signals["nll"].to(torch.promote_types(signals["nll"].dtype, torch.float32)).clamp(min=0)  # but for rounding
    tau = torch.nanmedian(torch.where(signals.response, nll, torch.nan)).clamp(min=1e-6)
    return torch.exp(-nll / tau).clamp(min=w_min)


def clean_posterior(signals: TokenSignals) -> Tensor:
    """(1 - s) p / ((1 - s) p + s / V): how likely the model and not a uniform draw of V tokens said the token.

    The sample's share of noise s maximises the likelihood of its tokens under that mixture, Huber's contaminated model
    (1964); expectation-maximisation from s = 1/2, each step the mean of 1 - posterior. Tokens to which the data gives
    weight 0 are judged, but say nothing of s.
    """
    nll = signals["nll"]
    nll = nll.to(torch.promote_types(nll.dtype, torch.float32))  # sums of a sample stall in bfloat16
    excess = nll - math.log(signals["vocab_size"])  # over a uniform draw, nats
    heard = signals if signals.weight is None else replace(signals, response=signals.response & (signals.weight != 0))
    posterior = torch.sigmoid(-excess)
    for _ in range(EM_STEPS):
        share = mean_per_sample(1 - posterior, heard)
        posterior = torch.sigmoid(-torch.logit(share) - excess)
    return posterior


def normalised_log_probability(signals: TokenSignals) -> Tensor:
    """(log p - mean) / standard deviation of log p under the prediction, Min-K%++ (arXiv 2404.02936, eq. 3).

    The mean of log p under p is minus the entropy. 0 where the prediction has no spread.
    """
    sigma = signals["logp_var"].sqrt()
    return torch.where(sigma > 0, (signals["entropy"] - signals["nll"]) / torch.where(sigma > 0, sigma, 1), 0)


def reasoning_weights(signals: TokenSignals, temperature: float) -> Tensor:
    """Weights of SHAD + RFT (arXiv 2412.14780): tokens whose loss rises under a model of shuffled pairs are reasoning.

    With n_g tokens and mean current loss l_g in each of the two groups, the weight of group g is
    softmax(l / temperature)_g and each of its tokens carries n / n_g of it, so that the loss divided by the n response
    tokens is Σ_g weight_g · l_g. Groups are those of the micro-batch; an empty group has no weight.
    """
    reasoning = signals.response & (signals["shuffled_nll"] - signals["base_nll"] > 0)
    groups = torch.stack([reasoning, signals.response & ~reasoning])  # (2, ...)
    sizes = groups.flatten(1).sum(1)
    loss = torch.where(groups, signals["nll"], 0).flatten(1).sum(1) / sizes.clamp(min=1)
    weight = torch.softmax(torch.where(sizes > 0, loss / temperature, -torch.inf), 0)
    each = torch.where(sizes > 0, weight * signals.response.sum() / sizes.clamp(min=1), 0)  # (2,)
    return torch.where(reasoning, each[0], each[1])


def selective_ifd(signals: TokenSignals, token_share: float) -> Tensor:
    """S-IFD of T-SHIRT (arXiv 2506.01317), a score of the sample on each of its tokens.

    IFD = `exp(mean(nll(y | x) - nll(y)))`; the selective one takes the mean over the ceil(token_share · n) response
    tokens of the sample whose `|nll(y | x) - nll(y)|` is largest.
    """
    change = signals["base_nll"] - signals["alone_nll"]
    informative = top_share(change.abs(), signals.response, signals.sample, token_share)
    total = sum_per_sample(torch.where(informative, change, 0), signals)
    return torch.exp(total / sum_per_sample(informative.to(change.dtype), signals).clamp(min=1))


def softmax_weights(values: Tensor, signals: TokenSignals, temperature: float) -> Tensor:
    """n · softmax(values / temperature) over the n response tokens of each sample: mean weight 1, all 1 as it grows."""
    sample, flat = signals.sample.flatten(), torch.where(signals.response, values, -torch.inf).flatten()
    high = torch.full_like(flat, -torch.inf).scatter_reduce(0, sample, flat, "amax")[sample].view_as(values)
    e = torch.where(signals.response, ((values - high) / temperature).exp(), 0)
    return torch.where(signals.response, e / mean_per_sample(e, signals), 0)


def contrast_weights(signals: TokenSignals) -> Tensor:
    """1 - exp(-contrast_nll) on tokens to which the data gives a negative weight (on all, where it gives none)."""
    weight = -torch.expm1(-signals["contrast_nll"])
    return weight if signals.weight is None else torch.where(signals.weight < 0, weight, 1)
