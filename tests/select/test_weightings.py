"""Methods that weigh every token by its prediction: formulas in float64, cases by hand, limits, gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from made_signals import GIVEN, NLL, RESPONSE, SAMPLE, SIGNALS, weights

from tokensel import TokenSignals, methods, selected_cross_entropy, token_stats

P, H = torch.exp(-NLL), SIGNALS["entropy"]


def relative_scale(p, entropy, rank):
    """By the paper's symbols, H in bits and ranks counted from 1, one token after the other."""
    scales = []
    for p_t, h_t, r_t in zip(p.tolist(), entropy.tolist(), rank.tolist(), strict=True):
        s = 2 ** (h_t / math.log(2)) / 4 + 1
        scale = (p_t * s) ** -(1 / math.log2(max(r_t + 1, s) + 1) ** 2)
        scales.append(min(max(scale, 0.5), 2.0))
    return torch.tensor(scales).double()


def information(p, peak):
    logit = lambda x: math.log(x / (1 - x))  # noqa: E731
    return torch.tensor([x * max(0.0, 1 - logit(x) / logit(peak)) if x < 1 else 0.0 for x in p.tolist()]).double()


GAMMA = torch.exp(-(-NLL + H)).clamp(0.1, 2.0)
FORMULAS = [
    ("dft", {}, P),
    ("f_alpha", {"alpha": 0.3}, P**0.3),
    ("deft", {}, P ** torch.exp(-SIGNALS["renyi2"])),
    ("eaft", {}, H / math.log(20)),
    ("eaft", {"alpha": 3, "top_k": 5}, (H / math.log(5)) ** 3),
    ("infosft", {}, information(P, 0.93)),
    ("infosft", {"peak": 0.7}, information(P, 0.7)),
    ("idft", {}, P**GAMMA * (1 - GAMMA * NLL)),
    ("rank_tuner", {}, P * relative_scale(P, H, SIGNALS["rank"])),
    ("rank_tuner", {"times_probability": False}, relative_scale(P, H, SIGNALS["rank"])),
    ("talr", {}, (P ** (1 / NLL[RESPONSE].sort().values[3])).clamp(min=0.01)),  # the lower of eight's two middle ones
    ("talr", {"w_min": 0.4}, (P ** (1 / NLL[RESPONSE].sort().values[3])).clamp(min=0.4)),
]


@pytest.mark.parametrize("name, parameters, expected", FORMULAS, ids=lambda x: x if isinstance(x, str) else "")
def test_weights_are_those_of_the_formula_over_all_responses(name, parameters, expected):
    w = weights(name, **parameters)
    torch.testing.assert_close(w[RESPONSE], expected[RESPONSE], rtol=1e-6, atol=1e-7)
    assert not w[~RESPONSE].any()
    assert int(methods.get(name, **parameters).count(RESPONSE, SAMPLE)) == 8


# the loss that others differentiate, of p, entropy H, Σ p² and g, all but p constant
LOSSES = {
    "dft": ({}, lambda p, H, c: -p),
    "f_alpha": ({"alpha": 0.3}, lambda p, H, c: (1 - p**0.3) / 0.3),
    "deft": ({}, lambda p, H, c: (1 - p**c) / c),
    "idft": ({}, lambda p, H, c: -(p ** torch.exp(-(p.log().detach() + H)).clamp(0.1, 2.0)) * p.log()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_published_loss(name):
    N, V, D = 23, 31, 8
    hidden, head = (torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (N, V))
    labels = torch.randint(0, V, (N,))
    parameters, loss_of = LOSSES[name]
    method = methods.get(name, **parameters)
    stats = token_stats(hidden, head, labels, entropy=True, renyi2=True)
    known = {"nll": stats.nll, "entropy": stats.entropy, "renyi2": stats.renyi2}
    signals = TokenSignals(torch.ones(N).bool(), torch.zeros(N).long(), **known)
    loss = selected_cross_entropy(hidden, head, labels, method(signals), stats=stats, denominator=N)
    probabilities = (hidden @ head.T).softmax(-1)
    p = probabilities.gather(1, labels[:, None])[:, 0]
    entropy = -(probabilities * probabilities.log()).sum(-1).detach()
    expected = loss_of(p, entropy, (probabilities**2).sum(-1).detach()).mean()
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)  # weights are float32


@pytest.mark.parametrize(
    "name, parameters",
    [("f_alpha", {"alpha": 0}), ("eaft", {"alpha": 0}), ("talr", {"w_min": 1}), ("stm", {"tau": math.inf}),
     ("tail_sft", {"rho": 1})],
)  # fmt: skip
def test_the_limit_is_ordinary_fine_tuning(name, parameters):
    method, full = methods.get(name, **parameters), methods.get("full")
    torch.testing.assert_close(method(GIVEN), full(GIVEN), rtol=1e-6, atol=0)


def test_others_are_limits_of_dft():
    torch.testing.assert_close(weights("f_alpha", alpha=1), weights("dft"))
    sure = replace(GIVEN, renyi2=torch.zeros(10).double())
    torch.testing.assert_close(weights("deft", sure), weights("dft"))
    unsure = replace(GIVEN, renyi2=torch.full((10,), 50.0).double())
    torch.testing.assert_close(weights("deft", unsure), weights("full"))


def test_a_token_that_is_certain_or_impossible_has_a_weight():
    nll = torch.tensor([0.0, 1e-12, 120.0, 1e4])
    sure = {
        "entropy": torch.tensor([0.0, 0.0, 0.0, 3.0]),
        "renyi2": torch.zeros(4),
        "rank": torch.tensor([0.0, 0, 9, 90]),
    }
    signals = TokenSignals(torch.ones(4).bool(), torch.zeros(4).long(), nll=nll, **sure)
    for name in ("f_alpha", "deft", "eaft", "infosft", "idft", "rank_tuner", "talr"):
        assert methods.get(name)(signals).isfinite().all(), name
    assert methods.get("infosft")(signals).tolist() == [0, 0, 0, 0]


def test_talr_of_losses_that_rounding_has_put_below_zero():
    nll = torch.tensor([-1e-5, -1e-5, -2e-6, 0.0, -4e-5, 0.3])
    signals = TokenSignals(torch.ones(6).bool(), torch.zeros(6).long(), nll=nll)
    assert methods.get("talr")(signals).tolist() == pytest.approx([1, 1, 1, 1, 1, 0.01])


def test_idft_unlearns_what_the_model_would_not_say():
    # log p + H = -1: g = 2 at most, and p^g (1 - g nll) is below 0 where g nll > 1
    w = weights("idft", replace(GIVEN, entropy=NLL - 1))
    assert (w[RESPONSE & (NLL > 0.5)] < 0).all() and (w[RESPONSE & (NLL < 0.3)] > 0).all()


def test_rank_tuner_raises_what_ranks_behind_what_is_expected():
    scale = weights("rank_tuner", replace(GIVEN, entropy=torch.full((10,), 0.1).double()), times_probability=False)
    assert (scale[RESPONSE & (NLL > 1)] > 1).all() and (scale[RESPONSE & (NLL < 0.2)] < 1).all()


@pytest.mark.parametrize("tau", [1.2, 2.5, 20.0])
def test_stm_keeps_what_the_base_finds_likely(tau):
    kept = weights("stm", tau=tau).nonzero()[:, 0].tolist()
    assert kept == [i for i in range(10) if RESPONSE[i] and math.exp(SIGNALS["base_nll"][i]) < tau]


def test_tail_sft_leaves_out_the_samples_that_improved_most():
    sample = torch.tensor([0, 0, 2, 2, 4, 4])
    nll = torch.tensor([1.0, 1.0, 1.0, 3.0, 2.0, 2.0]).double()
    base = torch.tensor([3.0, 3.0, 1.0, 3.1, 5.0, 1.0]).double()  # improved by 2, 0.05 and 1 on average
    signals = TokenSignals(torch.ones(6).bool(), sample, nll=nll, base_nll=base)
    assert methods.get("tail_sft")(signals).tolist() == [0, 0, 1, 1, 1, 1]  # the better two of three
    assert methods.get("tail_sft", rho=0.3)(signals).tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("f_alpha", {"alpha": -1}, "alpha must be finite and not negative; got -1"),
        ("eaft", {"alpha": math.inf}, "alpha must be finite"),
        ("eaft", {"top_k": 1}, "top_k must be a whole number of tokens, 2 or more; got 1"),
        ("infosft", {"peak": 0.5}, r"peak must be in \(0.5, 1\)"),
        ("idft", {"beta": 0}, "beta must be positive"),
        ("idft", {"gamma_min": 3}, "0 <= gamma_min <= gamma_max, finite, must hold; got 3, 2.0"),
        ("idft", {"gamma_max": math.inf}, "0 <= gamma_min <= gamma_max, finite, must hold"),
        ("rank_tuner", {"times_probability": 1}, "times_probability must be true or false; got 1"),
        ("talr", {"w_min": 1.5}, r"w_min must be in \[0, 1\]"),
        ("stm", {"tau": 1}, "tau must be above 1, a perplexity"),
        ("tail_sft", {"scope": "sample"}, "scope of whole samples must be batch or dataset"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        methods.get(name, **parameters)
