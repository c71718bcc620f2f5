from __future__ import annotations

import itertools

import pytest
import torch
from oracles import DTYPES, FIELDS, OPTIONS, assert_within_budget, head_of, make, truth, truth_of_logits

from tokensel import (
    TokenStats,
    token_stats,
    token_stats_contrast,
    token_stats_from_logits,
    token_stats_pair,
)

# Merging


def shards(z, labels, cuts):
    """Statistics of the columns between `cuts`; a label outside has no logit in the shard."""
    parts = []
    for low, high in itertools.pairwise(cuts):
        inside = (labels >= low) & (labels < high)
        part, _ = token_stats_from_logits(z[:, low:high], torch.where(inside, labels - low, 0), entropy=True)
        target = torch.where(inside, part.target_logit, -torch.inf)
        parts.append(TokenStats(part.lse, target, part.entropy, part.logp_var, part.top1))
    return parts


def test_shards_of_the_vocabulary_merge_in_any_order():
    hidden, weight, labels, bias = make(V=301, dtype=torch.float64)
    z = hidden @ weight.T + bias
    z[3] = z[3] + 500  # nothing may cancel
    exact = truth_of_logits(z, labels)
    parts = shards(z, labels, [0, 1, 7, 150, 301])
    valid = labels != -100
    for order in itertools.permutations(parts):
        merged = TokenStats.merge(order)
        for name in FIELDS:
            torch.testing.assert_close(getattr(merged, name)[valid], exact[name][valid], rtol=1e-10, atol=1e-10)
    nested = TokenStats.merge([TokenStats.merge(parts[:2]), TokenStats.merge(parts[2:])])
    torch.testing.assert_close(nested.logp_var[valid], exact["logp_var"][valid])


@pytest.mark.parametrize("shift", [0.0, -1e4, 1e4])
def test_merged_shards_are_as_exact_as_the_whole(shift):
    labels = make()[2]
    z = torch.randn(37, 2300) * 3 + shift
    z[1, 2000] += 60  # one shard holds all of a row's mass
    parts = shards(z, labels, [0, 3, 900, 2299, 2300])
    exact, eager = truth_of_logits(z.double(), labels), truth_of_logits(z, labels)
    assert_within_budget(TokenStats.merge(parts), exact, eager, labels)
    plain = TokenStats.merge([TokenStats(p.lse, p.target_logit) for p in parts])
    assert_within_budget(plain, exact, eager, labels, fields=FIELDS[:3])
    assert plain.entropy is None and plain.logp_var is None and plain.top1 is None


def test_an_ignored_row_is_the_identity_of_merge():
    hidden, weight, labels, _ = make()
    stats = token_stats(hidden, weight, labels, entropy=True)
    nothing = token_stats(hidden, weight, torch.full_like(labels, -100), entropy=True)
    for parts in ([stats, nothing], [nothing, stats], [stats]):
        merged = TokenStats.merge(parts)
        for name in FIELDS:
            torch.testing.assert_close(getattr(merged, name), getattr(stats, name))


def test_merge_refuses_what_does_not_fit():
    hidden, weight, labels, _ = make()
    with pytest.raises(ValueError, match="parts is empty"):
        TokenStats.merge([])
    with pytest.raises(ValueError, match="different fields"):
        TokenStats.merge([token_stats(hidden, weight, labels), token_stats(hidden, weight, labels, entropy=True)])


# Pairs and logits


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_pair_is_two_models_of_any_hidden_size(impl):
    hidden, weight, labels, bias = make()
    old_hidden, old_weight = torch.randn(37, 24), torch.randn(2300, 24)
    options = {"bias": bias, "softcap": 20.0, "logit_scale": 0.5}
    now, old = token_stats_pair((hidden, weight), (old_hidden, old_weight), labels, entropy=True, impl=impl, **options)
    for stats, inputs in ((now, (hidden, weight)), (old, (old_hidden, old_weight))):
        exact, eager = (truth(*inputs, labels, **options, dtype=d) for d in (torch.float64, torch.float32))
        assert_within_budget(stats, exact, eager, labels)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_contrast_of_two_models_is_its_definition(options, dtype, impl):
    hidden, weight, labels, bias = make(dtype=dtype)
    models = ((hidden, weight), make(D=24, dtype=dtype)[:2])
    options = options | ({"bias": bias} if "bias" in options else {})
    for beta in (1.0, 0.3):
        found = []
        for wide in (torch.float64, torch.float32):
            z, old = (head_of(*model, **options, dtype=wide) for model in models)
            found.append(truth_of_logits((1 + beta) * z - beta * old, labels))
        common = {"entropy": True, "impl": impl, "workspace_mib": 0.3}  # blocks of rows, too
        stats = token_stats_contrast(*models, labels, beta=beta, **common, **options)
        assert_within_budget(stats, *found, labels)
        assert (stats.nll[labels == -100] == 0).all()


def test_the_default_contrast_is_that_of_critical_tokens():
    """softmax(2 z_pos - z_neg)[y], of log-probabilities as of logits."""
    hidden, weight, labels, _ = make(dtype=torch.float64)
    models = ((hidden, weight), make(dtype=torch.float64)[:2])
    log_p, old_log_p = ((x @ w.T).log_softmax(-1) for x, w in models)
    estimate = (2 * log_p - old_log_p).softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    found = token_stats_contrast(*models, labels).nll.neg().exp()
    valid = labels != -100
    torch.testing.assert_close(found[valid], estimate[valid])


def test_a_pair_of_the_same_model_has_no_difference_at_all():
    hidden, weight, labels, _ = make(dtype=torch.bfloat16)
    now, old = token_stats_pair((hidden, weight), (hidden, weight), labels)
    assert torch.equal(now.nll, old.nll)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_statistics_from_logits(dtype, impl):
    labels = make()[2]
    logits, old_logits = ((torch.randn(37, 2300) * 3).to(dtype) for _ in range(2))
    before = logits.clone(), old_logits.clone()
    both = token_stats_from_logits(logits, labels, old_logits, entropy=True, impl=impl, workspace_mib=0.02)
    for stats, z in zip(both, before, strict=True):
        eager = truth_of_logits(z.float(), labels)
        assert_within_budget(stats, truth_of_logits(z.double(), labels), eager, labels)
    assert torch.equal(logits, before[0]) and torch.equal(old_logits, before[1])
    assert token_stats_from_logits(logits, labels, impl=impl)[1] is None


@pytest.mark.parametrize("dtype, shift", [(torch.float32, -1e4), (torch.float32, 1e4), (torch.float16, 6e4)], ids=str)
def test_statistics_from_logits_of_any_size(dtype, shift):
    labels = make()[2]
    logits = (torch.randn(2300, 37) * 30 + shift).to(dtype).T  # strided too
    stats, _ = token_stats_from_logits(logits, labels, entropy=True)
    exact, eager = (truth_of_logits(logits.to(d), labels) for d in (torch.float64, torch.float32))
    assert_within_budget(stats, exact, eager, labels)


def test_logits_with_leading_dimensions():
    labels = make(N=36)[2]
    logits = torch.randn(36, 50)
    labels = torch.where(labels == -100, labels, labels % 50)
    flat, _ = token_stats_from_logits(logits, labels, entropy=True)
    batched, _ = token_stats_from_logits(logits.view(4, 9, 50), labels.view(4, 9), entropy=True)
    assert all(torch.equal(getattr(batched, name), getattr(flat, name).view(4, 9)) for name in FIELDS)


def test_logits_of_rows_that_all_count_are_not_overwritten_either():
    logits = torch.randn(8, 50)
    before = logits.clone()
    token_stats_from_logits(logits, torch.arange(8), logits, entropy=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_contrast_with_itself_or_with_nothing_is_the_model(impl):
    hidden, weight, labels, _ = make(dtype=torch.bfloat16)
    expected = token_stats(hidden, weight, labels, impl=impl).nll
    same = token_stats_contrast((hidden, weight), (hidden, weight), labels, beta=1.5, impl=impl).nll
    torch.testing.assert_close(same, expected, rtol=1e-5, atol=1e-5)
    other = make(D=24, dtype=torch.bfloat16)[:2]
    assert torch.equal(token_stats_contrast((hidden, weight), other, labels, beta=0.0, impl=impl).nll, expected)
    none = torch.full_like(labels, -100)
    assert (token_stats_contrast((hidden, weight), other, none, impl=impl).nll == 0).all()
    empty = [(h[:0], w) for h, w in ((hidden, weight), other)]
    assert token_stats_contrast(*empty, labels[:0], impl=impl).nll.shape == (0,)


def test_a_fused_contrast_is_refused_with_what_there_is():
    hidden, weight, labels, _ = make()
    with pytest.raises(ValueError, match="impl='fused' has no contrast of two models; use impl='chunked'"):
        token_stats_contrast((hidden, weight), (hidden, weight), labels, impl="fused")
