"""The methods: adding one is a function that builds it.

Its arguments are the method's parameters, its docstring the formula. The first line of the docstring says score and
rule, as `tokensel methods` lists them. Symbols: n response tokens in the scope, p the current model's probability of
the label, nll = -log p in nats, REL = nll_history - nll.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from tokensel.ops.checks import check_number, check_positive
from tokensel.select import (
    scores,
    weightings,  # noqa: F401  which registers its methods
)
from tokensel.select.method import SelectionMethod, builder, describe, get, names, register
from tokensel.select.rules import (
    Above,
    AdaptiveThreshold,
    AsGiven,
    AsScored,
    LearnAndForget,
    TopSamples,
    TopShare,
    exact_share,
)
from tokensel.select.signals import TokenSignals

__all__ = ["SelectionMethod", "TokenSignals", "builder", "describe", "get", "names", "register"]

# Baselines


@register
def full() -> SelectionMethod:
    """Every response token: ordinary supervised fine-tuning."""
    return SelectionMethod("full", frozenset(), scores.constant, AsScored())


@register
def random(rho: float = 0.6, seed: int = 0, scope: str = "sample") -> SelectionMethod:
    """A seeded uniform draw, top rho: the baseline beside every result. Drawn anew each step."""
    return SelectionMethod("random", {"key"}, lambda signals: scores.random(signals, seed), TopShare(rho, scope))


@register
def weighted(denominator: str = "weight") -> SelectionMethod:
    """The weights that the data gives, per message or token, negative allowed, as they are.

    Loss = Σ weight · nll / Σ |weight|, or / (tokens whose weight is not 0) with denominator="count", as weighted
    instruction tuning has it (WIT, arXiv 2507.07817, whose weights are one number for prompt tokens and one for
    response tokens). Where weights are given, they are factors of every other method's weights, too.
    """
    return SelectionMethod("weighted", frozenset(), scores.constant, AsGiven(denominator))


# ssToken and its parts


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


def _blend(
    name: str,
    rule: TopShare,
    gamma: float,
    rel_sign: int = 1,
    rel_floor: float = 0.0,
    rel_warmup: int = 0,
    debias: str | None = None,
) -> SelectionMethod:
    _check_rel(gamma, rel_sign, rel_floor, rel_warmup, debias)
    needs = {"nll", "history_nll"} if gamma > 0 else set()
    if gamma < 1:
        needs |= {"mass"} | ({"uniform_mass"} if debias else set())

    def scorer(signals: TokenSignals) -> Tensor:
        return scores.sstoken(signals, gamma, rel_sign, rel_floor, rel_warmup, debias)

    return SelectionMethod(name, needs, scorer, rule)


@register
def sstoken(
    gamma: float = 0.5,
    rho: float = 0.6,
    rel_sign: int = 1,
    rel_floor: float = 0.0,
    rel_warmup: int = 0,
    debias: str | None = None,
    scope: str = "sample",
    rho_min: float | None = None,
    rho_max: float | None = None,
) -> SelectionMethod:
    """gamma · minmax(REL) + (1 - gamma) · Attn, top rho (ssToken, arXiv 2510.18250).

    REL is min-maxed over the response tokens of the sample; Attn = attention mass of the token's own query row on the
    prompt, mean over heads, not normalised. The paper uses rho 0.6, 0.8 at 14B; ceil(rho · n) tokens of a sample with n
    are kept; the loss is the mean of the kept tokens' nll. What the published code does otherwise: the prompt is its
    first count(-100) positions, batches without padding lose the causal mask, REL is left out for the dataset's first
    10,000 rows, and means are taken per micro-batch (`loss_denominator="micro_batch"`).

    Args:
        gamma: weight of REL, in [0, 1]; at 0 no history is needed, at 1 no attention.
        rho: share kept, in (0, 1].
        rel_sign: 1 as published; -1 prefers tokens on which the model is worse than its history.
        rel_floor: the min-max range is never taken below this, nats.
        rel_warmup: samples during which only attention scores.
        debias: "uniform" divides Attn by what a uniform attention would give.
        scope: among which tokens the best are kept: "sample", "micro_batch" or "batch".
        rho_min, rho_max: given, samples share the micro-batch's budget by the spread of their scores.
    """
    rule = TopShare(rho, scope, rho_min, rho_max)
    return _blend("sstoken", rule, gamma, rel_sign, rel_floor, rel_warmup, debias)


@register
def rel(
    rho: float = 0.6, scope: str = "sample", rho_min: float | None = None, rho_max: float | None = None
) -> SelectionMethod:
    """REL, published sign, top rho (sstoken with gamma 1)."""
    return _blend("rel", TopShare(rho, scope, rho_min, rho_max), 1.0)


@register
def history_excess(
    rho: float = 0.6, scope: str = "sample", rho_min: float | None = None, rho_max: float | None = None
) -> SelectionMethod:
    """nll - nll_history, REL with the sign reversed, top rho.

    Rho-1's excess loss (arXiv 2404.07965) with the model's own past as the reference.
    """
    return _blend("history_excess", TopShare(rho, scope, rho_min, rho_max), 1.0, rel_sign=-1)


@register
def attention(
    rho: float = 0.6,
    debias: str | None = None,
    scope: str = "sample",
    rho_min: float | None = None,
    rho_max: float | None = None,
) -> SelectionMethod:
    """Attn, attention mass on the prompt, top rho (sstoken with gamma 0)."""
    return _blend("attention", TopShare(rho, scope, rho_min, rho_max), 0.0, debias=debias)


# With a reference model

_BASE_OVER_REFERENCE = ({"base_nll", "reference_nll"}, lambda signals: signals["base_nll"] - signals["reference_nll"])


@register
def rho1(rho: float = 0.6, scope: str = "batch") -> SelectionMethod:
    """nll - nll_reference, top rho of the batch (Rho-1, arXiv 2404.07965, eq. 3).

    The reference is a model trained on data of the quality wanted: history "reference", or recorded losses of one.
    """
    rule = TopShare(rho, scope)
    return SelectionMethod("rho1", {"nll", "reference_nll"}, lambda s: s["nll"] - s["reference_nll"], rule)


@register
def token_cleaning(rho: float = 0.6, scope: str = "dataset") -> SelectionMethod:
    """nll_base - nll_reference, top rho of the whole dataset (token cleaning, fixed model, arXiv 2502.01968).

    Both are recorded. With scope "dataset" `tokensel select` keeps floor(rho · n) of the dataset's n response tokens,
    as the published code does; other scopes keep the ceiling.
    """
    rule = TopShare(rho, scope, floor=scope == "dataset")
    return SelectionMethod(
        "token_cleaning", {"base_nll", "reference_nll"}, lambda s: s["base_nll"] - s["reference_nll"], rule
    )


@register
def token_cleaning_iterative(rho: float = 0.6, scope: str = "dataset") -> SelectionMethod:
    """nll_base - nll_reference, the reference being the stage before, top rho of each split (arXiv 2502.01968).

    The dataset is cut into contiguous splits; split 0 is trained in full, and each later one is scored against the
    model that came out of the split before: `examples/token_cleaning_iterative.py` runs the stages.
    """
    return SelectionMethod("token_cleaning_iterative", *_BASE_OVER_REFERENCE, TopShare(rho, scope))


@register
def forgetting(rho: float = 0.7, lambda_max: float = 0.1, lambda_steps: int = 1000) -> SelectionMethod:
    """nll_base - nll_reference: top rho of the micro-batch learnt, the others un-learnt (arXiv 2508.04329).

    Loss = mean nll of the best - λ(step) · mean nll of the others, each by its own count; λ grows linearly to
    lambda_max in lambda_steps optimizer steps. That λ grows is published; how fast could not be verified, so both
    numbers are parameters. At lambda_max 0 only the best are trained.
    """
    return SelectionMethod("forgetting", *_BASE_OVER_REFERENCE, LearnAndForget(rho, lambda_max, lambda_steps))


# By the current model alone


def _risk(by: str) -> tuple[set[str], Callable[[TokenSignals], Tensor]]:
    if by not in ("nll", "entropy"):
        raise ValueError(f"by must be 'nll' or 'entropy'; got {by!r}")
    return {by}, lambda signals: signals[by]


@register
def eslm(alpha: float = 0.1, by: str = "nll") -> SelectionMethod:
    """nll or entropy, tokens above the alpha-quantile of the micro-batch (ESLM, arXiv 2505.19893).

    ceil((1 - alpha) · n) tokens: those at or above the value at risk at level alpha; of equal ones the earlier. alpha 0
    keeps all. The published threshold keeps every tie, and so may keep more.

    Args:
        alpha: in [0, 1).
        by: "nll" or "entropy".
    """
    check_number("alpha", alpha)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), the share of tokens left out; got {alpha}")
    share = 1 - exact_share(alpha, "alpha") if alpha else 1
    return SelectionMethod("eslm", *_risk(by), TopShare(float(share), "micro_batch"))


@register
def ada_eslm(
    alpha: float = 0.1, by: str = "nll", speed: float = 0.5, alpha_min: float = 0.01, alpha_max: float = 0.5
) -> SelectionMethod:
    """As eslm, alpha moving with the change of the kept tokens' mean score (Ada-ESLM, arXiv 2505.19893).

    alpha <- clip(alpha · exp(-speed · ΔCVaR / CVaR), alpha_min, alpha_max) after each optimizer step: where the risk of
    what is kept rises, more is kept. The paper's step size and evaluation interval could not be verified: speed is a
    parameter, the interval one step.
    """
    return SelectionMethod("ada_eslm", *_risk(by), AdaptiveThreshold(alpha, speed, alpha_min, alpha_max))


@register
def profit(tau: float = 0.1) -> SelectionMethod:
    """p, tokens with p > tau; the loss is still divided by all response tokens (ProFiT).

    tau 0 is ordinary fine-tuning. The published default could not be verified.
    """
    check_number("tau", tau)
    if not 0 <= tau < 1:
        raise ValueError(f"tau must be in [0, 1), a probability; got {tau}")
    return SelectionMethod("profit", {"nll"}, scores.probability, Above(tau))


@register
def clean_posterior(warmup_steps: int = 5) -> SelectionMethod:
    """(1 - s) p / ((1 - s) p + s / V), tokens above 1/2: likelier said by the model than drawn at random. Ours.

    s is the sample's share of noise, estimated from its losses alone: a clean sample keeps everything, a noisy one
    loses what stands out. No reference, no history, no share to choose. The loss is still divided by all response
    tokens. docs/quality.md says where it helps, and where nothing does.

    It is for pretrained models: of a sample that costs a model more than a uniform draw would, nothing is kept.

    Args:
        warmup_steps: optimizer steps that keep everything: to a base a new format is as surprising as noise.
    """
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"warmup_steps must be a whole number of optimizer steps, 0 or more; got {warmup_steps!r}")

    def scorer(signals: TokenSignals) -> Tensor:
        return scores.constant(signals) if signals.step < warmup_steps else scores.clean_posterior(signals)

    return SelectionMethod("clean_posterior", {"nll", "vocab_size"}, scorer, Above(0.5))


@register
def min_k_pp(rho: float = 0.6, scope: str = "sample") -> SelectionMethod:
    """(log p - mean) / standard deviation of log p under the prediction, top rho (Min-K%++, arXiv 2404.02936).

    The statistic is published for detecting training data; ranking tokens to keep by it is ours.
    """
    needs = {"nll", "entropy", "logp_var"}
    return SelectionMethod("min_k_pp", needs, scores.normalised_log_probability, TopShare(rho, scope))


@register
def soft_weights(temperature: float = 1.0, rel_sign: int = 1) -> SelectionMethod:
    """Weight n · softmax(rel_sign · REL / temperature) in each sample, every token (in the style of VCORE).

    The weights' mean is 1; temperature inf is ordinary fine-tuning. The published weights are of this form, with a
    utility that could not be verified.
    """
    check_positive("temperature", temperature)
    _check_rel(1.0, rel_sign, 0.0, 0, None)

    def scorer(signals: TokenSignals) -> Tensor:
        return scores.softmax_weights(rel_sign * scores.excess_over_current(signals), signals, temperature)

    return SelectionMethod("soft_weights", {"nll", "history_nll"}, scorer, AsScored())


# With other recorded losses


@register
def stm(tau: float = 2.5) -> SelectionMethod:
    """p_base, tokens whose perplexity under the base, 1 / p_base, is below tau (STM, arXiv 2501.14315).

    The base is the model before fine-tuning. The loss is divided by all response tokens; published, by those kept.
    tau inf is ordinary fine-tuning. The published code drops the first token of an answer, too.
    """
    check_number("tau", tau)
    if not tau > 1:
        raise ValueError(f"tau must be above 1, a perplexity; got {tau}")
    return SelectionMethod("stm", {"base_nll"}, lambda s: -s["base_nll"], Above(-math.log(tau)))


@register
def tail_sft(rho: float = 0.5, scope: str = "batch") -> SelectionMethod:
    """mean(nll - nll_base) of a sample, top rho of the batch's samples: what improved most goes (arXiv 2608.25756).

    Every token of the samples that are kept. The published share that is left out may grow over training; here it does
    not. Read in notes and code about the paper.
    """
    scorer = lambda s: scores.mean_per_sample(s["nll"] - s["base_nll"], s)  # noqa: E731
    return SelectionMethod("tail_sft", {"nll", "base_nll"}, scorer, TopSamples(rho, scope))


@register
def shad_rft(temperature: float = 1.0) -> SelectionMethod:
    """nll_shuffled > nll_base: reasoning, else boilerplate; groups weighted by loss (SHAD + RFT, arXiv 2412.14780).

    Loss = Σ over the two groups of softmax(mean nll of the groups / temperature) · mean nll of the group, groups and
    means over the micro-batch, weights detached. `shuffled` is recorded under a model trained on shuffled pairs.
    """
    check_positive("temperature", temperature)
    needs = {"nll", "base_nll", "shuffled_nll"}
    scorer = lambda s: scores.reasoning_weights(s, temperature)  # noqa: E731
    return SelectionMethod("shad_rft", needs, scorer, AsScored(scope="micro_batch"))


@register
def t_shirt(rho: float = 0.5, token_share: float = 0.5, scope: str = "dataset") -> SelectionMethod:
    """exp(mean(nll_base - nll_alone)) over a sample's most informative tokens, top rho of samples (arXiv 2506.01317).

    Selects whole samples by S-IFD, whose mean runs over the token_share of tokens with the largest change. The paper's
    hierarchical search around a sample's neighbours is not part of it, and its token share could not be verified.
    """
    exact_share(token_share, "token_share")
    scorer = lambda s: scores.selective_ifd(s, token_share)  # noqa: E731
    return SelectionMethod("t_shirt", {"base_nll", "alone_nll"}, scorer, TopSamples(rho, scope))


@register
def critical_tokens() -> SelectionMethod:
    """Weight 1 - s on rejected answers, s the contrastive estimate of a token (cDPO, arXiv 2411.19943).

    s = softmax(2 z_positive - z_negative) at the label, recorded as exp(-contrast_nll). Rows to which the data gives a
    negative weight are the rejected ones; the others keep weight 1. Each sample is divided by its own length, and the
    sum by the number of samples.
    """
    return SelectionMethod("critical_tokens", {"contrast_nll"}, scores.contrast_weights, AsScored(per_sample=True))
