from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from tokensel import TokenSignals
from tokensel.select.rules import (
    Above,
    AdaptiveThreshold,
    TopShare,
    kept_count,
    responses_per_sample,
    spread_quota,
    top_share,
)

RHOS = [round(0.05 * i, 2) for i in range(1, 21)]


@pytest.mark.parametrize("rho", RHOS)
def test_kept_count_is_the_exact_ceiling(rho):
    n = torch.arange(0, 1001)
    exact = [math.ceil(Fraction(str(rho)) * i) for i in range(1001)]
    assert kept_count(n, rho).tolist() == exact


def test_share_of_ten_is_what_it_says():
    assert [int(kept_count(torch.tensor(10), rho)) for rho in (0.6, 0.7, 0.1, 0.61)] == [6, 7, 1, 7]
    assert int(kept_count(torch.tensor(3), 1 / 3)) == 1


def brute_force(score, response, sample, rho):
    keep = [False] * len(score)
    for s in set(sample):
        own = [i for i in range(len(score)) if sample[i] == s and response[i]]
        best = sorted(own, key=lambda i: (-score[i], i))
        for i in best[: math.ceil(Fraction(str(rho)) * len(own))]:
            keep[i] = True
    return keep


@pytest.mark.parametrize("seed", range(25))
def test_top_share_equals_sorting_each_sample(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 120, (1,), generator=generator))
    score = torch.randint(-3, 4, (n,), generator=generator).float()  # many ties
    score[torch.rand(n, generator=generator) < 0.05] = torch.inf
    score[torch.rand(n, generator=generator) < 0.05] = -torch.inf
    response = torch.rand(n, generator=generator) < 0.7
    sample = torch.randint(0, min(n, 9), (n,), generator=generator)  # interleaved
    rho = RHOS[seed % len(RHOS)]
    keep = top_share(score, response, sample, rho)
    assert keep.tolist() == brute_force(score.tolist(), response.tolist(), sample.tolist(), rho)


@pytest.mark.parametrize("n, rho_min", [(1, 0.5), (2, 0.1), (3, 0.2)])
def test_a_budget_of_few_tokens_whose_scores_are_equal_is_spent(n, rho_min):
    response, sample = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
    rule = TopShare(0.6, rho_min=rho_min, rho_max=1.0)
    kept = rule(torch.ones(n), TokenSignals(response, sample))
    assert kept.sum() == rule.count(response, sample) == math.ceil(0.6 * n)


def test_what_a_sample_has_no_token_for_goes_to_one_before():
    # shares of half a token, three and half a one end at 0.5, 3.5 and 4: to even numbers that is 0, 4 and 4
    sample, score = torch.tensor([0, 1, 1, 1, 4]), torch.tensor([0.0, 0, 5, 9, 0])
    response = torch.ones(5, dtype=torch.bool)
    assert spread_quota(score, response, sample, 0.8, 0.5, 1.0).tolist() == [1, 3, 0, 0, 0]
    rule = TopShare(0.8, rho_min=0.5, rho_max=1.0)
    assert rule(score, TokenSignals(response, sample)).sum() == rule.count(response, sample) == 4


def test_shape_is_kept_and_rows_do_not_mix():
    score = torch.tensor([[1.0, 2, 3, 4], [9, 8, 7, 6]])
    response = torch.tensor([[False, True, True, True], [True, True, True, True]])
    sample = torch.tensor([[0] * 4, [4] * 4])
    keep = top_share(score, response, sample, 0.5)
    assert keep.tolist() == [[False, False, True, True], [True, True, False, False]]


def test_equal_scores_keep_the_earlier_tokens():
    keep = top_share(torch.zeros(10), torch.ones(10).bool(), torch.zeros(10).long(), 0.6)
    assert keep.tolist() == [True] * 6 + [False] * 4


def test_nothing_competes():
    none = torch.zeros(4, dtype=torch.bool)
    assert not top_share(torch.rand(4), none, torch.zeros(4).long(), 0.6).any()
    assert top_share(torch.rand(0), none[:0], torch.zeros(0).long(), 0.6).shape == (0,)
    for rule in (TopShare(0.6, rho_min=0.1, rho_max=1.0), AdaptiveThreshold(0.1, 0.5, 0.01, 0.5)):
        signals = TokenSignals(none, torch.zeros(4).long())
        assert not rule(torch.rand(4), signals).any() and rule.count(none, signals.sample) == 0
        empty = TokenSignals(none[:0], torch.zeros(0).long())
        assert rule(torch.rand(0), empty).shape == (0,) and rule.count(empty.response, empty.sample) == 0


def test_nan_off_the_response_does_not_matter():
    score = torch.tensor([torch.nan, 1.0, 2.0, torch.nan])
    response = torch.tensor([False, True, True, False])
    sample = torch.zeros(4).long()
    assert top_share(score, response, sample, 0.5).tolist() == [False, False, True, False]


def test_a_score_at_the_threshold_is_not_above_it():
    response, score = torch.tensor([True, True, True, False]), torch.tensor([0.4, 0.5, 0.6, 0.6])
    rule = Above(0.5)
    assert rule(score, TokenSignals(response, torch.zeros(4).long())).tolist() == [False, False, True, False]
    assert rule.count(response, torch.zeros(4).long()) == 3


def test_responses_are_counted_by_sample():
    response = torch.tensor([True, False, True, True])
    assert responses_per_sample(response, torch.tensor([0, 0, 2, 2])).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("rho", [0, 0.0, -0.1, 1.0001, math.nan])
def test_a_share_outside_its_range_is_refused(rho):
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\]"):
        kept_count(torch.tensor(10), rho)


@pytest.mark.parametrize("rho", ["0.6", None, True])
def test_a_share_that_is_no_number_is_refused(rho):
    with pytest.raises(TypeError, match="rho must be a number"):
        kept_count(torch.tensor(10), rho)
