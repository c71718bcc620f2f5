"""What each method must be: formulas in float64, hand-computed cases, limits, gradients and invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from made_signals import GIVEN, NLL, RESPONSE, SAMPLE, SIGNALS, weights

from tokensel import TokenSignals, methods, token_stats
from tokensel.select.rules import AdaptiveThreshold, spread_quota


def given(**changes):
    return TokenSignals(**{"response": RESPONSE, "sample": SAMPLE, **SIGNALS, **changes})


def kept(name, signals=GIVEN, **parameters):
    return weights(name, signals, **parameters).nonzero()[:, 0].tolist()


def best(values, k, among=RESPONSE):
    """Places of the k largest values, by Python."""
    places = [i for i in range(10) if among[i]]
    return sorted(sorted(places, key=lambda i: (-float(values[i]), i))[:k])


# Formulas


def test_rho1_keeps_the_batches_largest_excess_over_the_reference():
    excess = NLL - SIGNALS["reference_nll"]
    assert kept("rho1", rho=0.5) == best(excess, 4)
    per_sample = sorted(best(excess, 3, RESPONSE & (SAMPLE == 0)) + best(excess, 2, RESPONSE & (SAMPLE == 6)))
    assert kept("rho1", rho=0.5, scope="sample") == per_sample


@pytest.mark.parametrize("name", ["token_cleaning", "token_cleaning_iterative"])
def test_token_cleaning_keeps_what_the_reference_predicts_better_than_the_base(name):
    k = 2 if name == "token_cleaning" else 3  # floor of 0.3 · 8, as published, or the ceiling
    assert kept(name, rho=0.3) == best(SIGNALS["base_nll"] - SIGNALS["reference_nll"], k)


def test_forgetting_unlearns_the_rest_by_its_own_count():
    excess = SIGNALS["base_nll"] - SIGNALS["reference_nll"]
    learnt = best(excess, 6)  # ceil(0.7 · 8)
    assert kept("forgetting", given(step=0)) == learnt == kept("forgetting", given(step=9), lambda_max=0)
    for step, strength in ((0, 0.0), (25, 0.05), (100, 0.2), (500, 0.2)):
        w = weights("forgetting", given(step=step), lambda_max=0.2, lambda_steps=100)
        method = methods.get("forgetting")
        loss = (w * NLL).sum() / method.count(RESPONSE, SAMPLE)
        others = [i for i in range(10) if RESPONSE[i] and i not in learnt]
        torch.testing.assert_close(loss, NLL[learnt].mean() - strength * NLL[others].mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("by", ["nll", "entropy"])
@pytest.mark.parametrize("alpha, k", [(0, 8), (0.1, 8), (0.125, 7), (0.25, 6), (0.9, 1)])
def test_eslm_keeps_what_is_at_or_above_the_quantile(by, alpha, k):
    assert kept("eslm", alpha=alpha, by=by) == best(SIGNALS[by], k)


def test_eslm_is_the_quantile_where_it_is_one_of_the_values():
    for alpha in (1 / 4, 1 / 2):
        value = torch.quantile(NLL[RESPONSE], alpha, interpolation="higher")
        at_or_above = [i for i in range(10) if RESPONSE[i] and NLL[i] >= value]
        assert kept("eslm", alpha=alpha) == at_or_above


def test_ada_eslm_moves_alpha_against_the_change_of_risk():
    method = methods.get("ada_eslm", alpha=0.25, speed=1.0, alpha_min=0.1, alpha_max=0.4)
    assert method(GIVEN).nonzero()[:, 0].tolist() == best(NLL, 6)
    assert int(method.count(RESPONSE, SAMPLE)) == 6
    method.rule.after_step()
    assert float(method.rule.alpha) == 0.25  # nothing to compare with yet
    before = float(NLL[best(NLL, 6)].mean())
    assert float(method.rule.cvar) == pytest.approx(before)
    risen = given(nll=NLL * 1.3)
    method(risen)
    method.rule.after_step()
    assert float(method.rule.alpha) == pytest.approx(0.25 * math.exp(-0.3))
    # a risk that falls: alpha rises to its bound
    for power in range(9):
        method(given(nll=NLL * 0.5**power))
        method.rule.after_step()
    assert float(method.rule.alpha) == pytest.approx(0.4)


def test_adaptive_thresholds_resume_and_take_all_ranks():
    first, second = (AdaptiveThreshold(0.25, 1.0, 0.1, 0.4) for _ in range(2))
    for scale in (1.0, 1.2):
        first(NLL * scale, GIVEN)
        first.after_step(lambda sums: 2 * sums)  # two ranks that saw the same
    second.load_state_dict(first.state_dict())
    for rule in (first, second):
        rule(NLL * 1.1, GIVEN)
        rule.after_step()
    assert first.alpha == second.alpha and first.cvar == second.cvar and float(first.alpha) < 0.25


def test_a_step_without_responses_leaves_alpha():
    rule = AdaptiveThreshold(0.25, 1.0, 0.1, 0.4)
    rule(NLL, GIVEN)
    rule.after_step()
    nothing = given(response=torch.zeros(10).bool())
    assert not rule(NLL, nothing).any() and int(rule.count(nothing.response, SAMPLE)) == 0
    rule.after_step()
    assert float(rule.alpha) == 0.25 and rule.cvar.isfinite()


def test_dft_weighs_by_probability_over_all_responses():
    w = weights("dft")
    torch.testing.assert_close(w[RESPONSE], torch.exp(-NLL[RESPONSE]), rtol=1e-6, atol=0)
    assert int(methods.get("dft").count(RESPONSE, SAMPLE)) == 8 and not w[~RESPONSE].any()


@pytest.mark.parametrize("tau", [0, 0.1, 0.45, 0.9])
def test_profit_keeps_what_is_probable_enough_over_all_responses(tau):
    assert kept("profit", tau=tau) == [i for i in range(10) if RESPONSE[i] and math.exp(-NLL[i]) > tau]
    assert int(methods.get("profit", tau=tau).count(RESPONSE, SAMPLE)) == 8


def likeliest_share(nll, V):
    """The share of uniform noise that maximises the likelihood of a sample's tokens, on a grid of a millionth."""
    shares = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)[:-1]
    likelihood = sum(torch.log((1 - shares) * math.exp(-x) + shares / V) for x in nll.tolist())
    return float(shares[likelihood.argmax()])


@pytest.mark.parametrize("noise", [[], [9.0], [6.5, 9.0, 7.0]], ids=len)
def test_clean_posterior_is_that_of_the_likeliest_share_of_noise(noise):
    V = 100  # a uniform draw costs 4.6 nats
    clean = torch.tensor([0.1, 2.0, 0.7, 3.0, 1.2, 0.0, 0.4, 1.9]).double()
    nll = torch.cat([clean, torch.tensor(noise).double()])
    one = TokenSignals(torch.ones(len(nll)).bool(), torch.zeros(len(nll)).long(), nll=nll, vocab_size=V)
    share = likeliest_share(nll, V)
    expected = (1 - share) * torch.exp(-nll) / ((1 - share) * torch.exp(-nll) + share / V)
    method = methods.get("clean_posterior", warmup_steps=0)
    torch.testing.assert_close(method.score(one), expected, rtol=0, atol=1e-3)
    assert method(one).tolist() == [1.0] * 8 + [0.0] * len(noise)
    assert (share > 0.05) == bool(noise)  # or the case would say nothing


def test_clean_posterior_judges_a_token_by_its_sample():
    # 6 nats are noise beside noise, and news in a sample that has none
    quiet, noisy = [0.1, 6.0, 0.1, 0.1, 0.1], [0.1, 6.0, 9.0, 9.0, 9.0]
    nll, sample = torch.tensor(quiet + noisy).double(), torch.tensor([0] * 5 + [5] * 5)
    method = methods.get("clean_posterior", warmup_steps=0)
    assert method(TokenSignals(sample >= 0, sample, nll=nll, vocab_size=300)).tolist() == [1] * 5 + [1, 0, 0, 0, 0]


def test_clean_posterior_keeps_everything_until_it_is_warm():
    lost = given(nll=NLL * 100)
    cold, warm = (methods.get("clean_posterior", warmup_steps=3)(replace(lost, step=step)) for step in (2, 3))
    assert torch.equal(cold, methods.get("full")(lost)) and warm.sum() < cold.sum()
    for wrong in (-1, 1.5, math.nan, True):
        with pytest.raises(ValueError, match="warmup_steps must be a whole number"):
            methods.get("clean_posterior", warmup_steps=wrong)
    for wrong in (1, -3, 2.0, True, "7"):
        with pytest.raises(ValueError, match="vocab_size must be a whole number"):
            given(vocab_size=wrong)


def test_clean_posterior_does_not_hear_what_the_data_leaves_out():
    # the 6 nats would go with the noise beside them, if that were not gone already
    nll, sample = torch.tensor([0.1, 0.2, 6.0, 9.0, 9.0, 9.0]).double(), torch.zeros(6).long()
    weight = torch.tensor([1.0, 1, 1, 0, 0, 0])
    method = methods.get("clean_posterior", warmup_steps=0)
    alone = TokenSignals(sample == 0, sample, nll=nll, vocab_size=100)
    assert method(alone).tolist() == [1, 1, 0, 0, 0, 0]
    assert method(replace(alone, weight=weight)).tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_clean_posterior_of_a_long_sample_in_half_precision(dtype):
    nll, sample = torch.full((4000,), 1.0), torch.zeros(4000).long()
    nll[::4] = 14.0
    long = TokenSignals(sample == 0, sample, nll=nll.to(dtype), vocab_size=50_000)
    assert torch.equal(methods.get("clean_posterior", warmup_steps=0)(long), (nll < 2).float())


def test_clean_posterior_of_losses_beyond_all_bounds():
    nll = torch.tensor([0.0, 1e-30, 1e4, 3e38, 3e38])
    everything = TokenSignals(torch.ones(5).bool(), torch.tensor([0, 0, 0, 3, 4]), nll=nll, vocab_size=2)
    method = methods.get("clean_posterior", warmup_steps=0)
    assert method(everything).tolist() == [1, 1, 0, 0, 0]
    assert method(TokenSignals(torch.zeros(5).bool(), everything.sample, nll=nll, vocab_size=2)).sum() == 0


def test_min_k_pp_is_the_standardised_log_probability():
    score = methods.get("min_k_pp").score(GIVEN)
    expected = (-NLL + SIGNALS["entropy"]) / SIGNALS["logp_var"].sqrt()
    torch.testing.assert_close(score, expected)
    flat = methods.get("min_k_pp").score(given(logp_var=torch.zeros(10).double()))
    assert (flat == 0).all()


def test_min_k_pp_of_a_distribution_that_is_known():
    logits = torch.tensor([[1.0, 0.0, -2.0, 0.5]]).double()
    p = logits.softmax(-1)
    mean = (p * p.log()).sum()
    sigma = ((p * p.log() ** 2).sum() - mean**2).sqrt()
    eye = torch.eye(4).double()
    stats = token_stats(logits, eye, torch.tensor([2]), entropy=True, impl="reference")
    signals = TokenSignals(
        torch.ones(1).bool(), torch.zeros(1).long(), nll=stats.nll, entropy=stats.entropy, logp_var=stats.logp_var
    )
    torch.testing.assert_close(methods.get("min_k_pp").score(signals)[0], (p[0, 2].log() - mean) / sigma)


def test_soft_weights_are_a_softmax_in_each_sample():
    rel = SIGNALS["history_nll"] - NLL
    for sign in (1, -1):
        w = weights("soft_weights", temperature=0.7, rel_sign=sign)
        for sample in (0, 6):
            own = RESPONSE & (SAMPLE == sample)
            expected = torch.softmax(sign * rel[own] / 0.7, 0) * own.sum()
            torch.testing.assert_close(w[own], expected, rtol=1e-6, atol=0)
    assert not w[~RESPONSE].any()


def test_shad_rft_weighs_the_means_of_two_groups():
    reasoning = RESPONSE & (SIGNALS["shuffled_nll"] > SIGNALS["base_nll"])
    boilerplate = RESPONSE & ~reasoning
    assert 0 < reasoning.sum() < 8
    means = torch.stack([NLL[reasoning].mean(), NLL[boilerplate].mean()])
    for temperature in (0.3, 1.0, math.inf):
        loss = (weights("shad_rft", temperature=temperature) * NLL).sum() / 8
        torch.testing.assert_close(loss, (torch.softmax(means / temperature, 0) * means).sum(), rtol=1e-6, atol=0)
    alone = given(shuffled_nll=SIGNALS["base_nll"] - 1)  # everything boilerplate: its mean
    torch.testing.assert_close((weights("shad_rft", alone) * NLL).sum() / 8, NLL[RESPONSE].mean(), rtol=1e-6, atol=0)


def test_t_shirt_keeps_whole_samples_by_selective_ifd():
    change = SIGNALS["base_nll"] - SIGNALS["alone_nll"]
    expected = {}
    for sample, n in ((0, 5), (6, 3)):
        places = best(change.abs(), math.ceil(0.5 * n), RESPONSE & (SAMPLE == sample))
        expected[sample] = float(change[places].mean().exp())
    score = methods.get("t_shirt").score(GIVEN)
    for sample, value in expected.items():
        assert score[RESPONSE & (SAMPLE == sample)].tolist() == pytest.approx(
            [value] * int((SAMPLE == sample).sum() - 1)
        )
    winner = max(expected, key=expected.get)
    assert kept("t_shirt", rho=0.5) == (RESPONSE & (SAMPLE == winner)).nonzero()[:, 0].tolist()
    assert kept("t_shirt", rho=1.0) == RESPONSE.nonzero()[:, 0].tolist()


def test_ties_between_samples_go_to_the_earlier_one():
    same = given(base_nll=torch.ones(10).double(), alone_nll=torch.zeros(10).double())
    assert kept("t_shirt", same, rho=0.5) == [1, 2, 3, 4, 5]


def test_critical_tokens_weigh_rejected_answers_by_one_minus_the_estimate():
    s = torch.exp(-SIGNALS["contrast_nll"])
    rejected = SAMPLE == 6
    w = weights("critical_tokens", given(weight=torch.where(rejected, -1.0, 1.0)))
    method = methods.get("critical_tokens")
    loss = (w * NLL).sum() / method.count(RESPONSE, SAMPLE)
    chosen_nll = NLL[RESPONSE & ~rejected].mean()
    rejected_nll = ((1 - s) * NLL)[RESPONSE & rejected].mean()
    torch.testing.assert_close(loss, (chosen_nll - rejected_nll) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("critical_tokens")[1], (1 - s[1]) / 5, rtol=1e-6, atol=0)


def test_weighted_takes_the_datas_weights_as_they_are():
    w = torch.tensor([0.5, 1, -2, 0, 1, 1, 0.5, 1, 3, 1])
    method, count = methods.get("weighted"), methods.get("weighted", denominator="count")
    assert torch.equal(method(given(weight=w)), torch.where(RESPONSE, w, 0))
    assert float(method.count(RESPONSE, SAMPLE, w)) == 11 and int(count.count(RESPONSE, SAMPLE, w)) == 9
    assert torch.equal(method(GIVEN), RESPONSE.float()) and int(method.count(RESPONSE, SAMPLE)) == 8


@pytest.mark.parametrize("name", ["dft", "critical_tokens", "rel"])
def test_weights_are_float32_also_where_the_data_gives_some(name):
    assert NLL.dtype == torch.float64  # as the losses of a float64 model are
    w = torch.ones(10, dtype=torch.float64)
    assert methods.get(name)(given(weight=w)).dtype == methods.get(name)(GIVEN).dtype == torch.float32


def test_weights_of_the_data_are_factors_of_a_selection_and_zero_does_not_compete():
    w = torch.tensor([0, 1, -2, 0, 1, 1, 0, 1, 3, 1.0])
    competing = RESPONSE & (w != 0)
    plain = methods.get("rel", rho=0.5)(given(response=competing))
    method = methods.get("rel", rho=0.5)
    assert torch.equal(method(given(weight=w)), plain * w)
    assert int(method.count(RESPONSE, SAMPLE, w)) == int(plain.sum()) == 2 + 2
    prompt = torch.where(RESPONSE, 1.0, 0.25)  # what prompt tokens weigh is added to what is kept
    assert float(method.count(RESPONSE, SAMPLE, prompt)) == 3 + 2 + 2 * 0.25


# Limits

EVERYTHING = [
    ("random", {"rho": 1}),
    ("sstoken", {"rho": 1}),
    ("rho1", {"rho": 1}),
    ("token_cleaning", {"rho": 1}),
    ("forgetting", {"rho": 1}),
    ("eslm", {"alpha": 0}),
    ("ada_eslm", {"alpha": 0, "alpha_min": 0}),
    ("profit", {"tau": 0}),
    ("clean_posterior", {}),  # no token here costs much more than a uniform draw
    ("clean_posterior", {"warmup_steps": 5001}),
    ("min_k_pp", {"rho": 1}),
    ("soft_weights", {"temperature": math.inf}),
    ("t_shirt", {"rho": 1}),
    ("weighted", {}),
]


@pytest.mark.parametrize("name, parameters", EVERYTHING, ids=lambda x: x if isinstance(x, str) else "")
def test_the_limit_is_ordinary_fine_tuning(name, parameters):
    method, full = methods.get(name, **parameters), methods.get("full")
    torch.testing.assert_close(method(given(step=5000)), full(GIVEN), rtol=1e-6, atol=0)
    count = method.count(RESPONSE, SAMPLE)
    assert count is None or int(count) == int(full.count(RESPONSE, SAMPLE))


def test_bounds_that_meet_are_the_plain_share():
    for rho in (0.4, 0.6):
        plain = methods.get("rel", rho=rho)
        bound = methods.get("rel", rho=rho, rho_min=rho, rho_max=rho)
        assert abs(int(bound(GIVEN).sum()) - int(plain(GIVEN).sum())) <= 1  # one ceiling against one a sample


def test_samples_share_a_budget_by_the_spread_of_their_scores():
    sample = torch.arange(4).repeat_interleave(25) * 25
    response = torch.rand(100) < 0.9
    score = torch.rand(100) * torch.tensor([0.01, 0.5, 1.0, 4.0]).repeat_interleave(25)
    quota = spread_quota(score, response, sample, 0.5, 0.2, 0.9)
    n = torch.stack([response[sample == s].sum() for s in (0, 25, 50, 75)])
    shares = quota[[0, 25, 50, 75]] / n
    assert quota.sum() == math.ceil(0.5 * int(n.sum())) and quota[[1, 26, 99]].sum() == 0
    assert (shares.diff() >= -1 / n.min()).all()
    assert shares.min() >= 0.2 - 1 / n.min() and shares.max() <= 0.9 + 1 / n.min()
    assert shares[0] < 0.26 and shares[3] > 0.84
    flat = spread_quota(torch.ones(100), response, sample, 0.5, 0.2, 0.9)  # no spread at all: within the bounds
    assert (flat[[0, 25, 50, 75]] <= n).all()
