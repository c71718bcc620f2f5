"""Rules and methods on random signals: which tokens they keep, how many, and that their place in a batch is nothing."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from threading import Barrier

import torch
from drawn_batches import corpora, layouts
from hypothesis import given
from hypothesis import strategies as st

from tokensel import TokenSignals, methods
from tokensel.documents import BatchLayout, token_keys
from tokensel.select.across import choose_across
from tokensel.select.rules import TopSamples, TopShare, kept_count, spread_quota, top_quota
from tokensel.select.signals import RECORDED

shares = st.one_of(st.sampled_from([1.0, 0.5, 0.6, 0.1, 1 / 3]), st.integers(1, 100).map(lambda n: n / 100))
PARAMETERS = {
    "sstoken": st.fixed_dictionaries(
        {"gamma": st.sampled_from([0.5, 0, 1]), "debias": st.sampled_from([None, "uniform"])}
    ),
    "clean_posterior": st.fixed_dictionaries({"warmup_steps": st.integers(0, 5)}),
    "forgetting": st.fixed_dictionaries({"lambda_steps": st.sampled_from([1, 7]), "rho": shares}),
    "eslm": st.fixed_dictionaries({"alpha": st.sampled_from([0, 0.1, 0.25, 0.9])}),
}
# of random signals
LARGEST = {"nll": 12, "entropy": 5, "logp_var": 3, "renyi2": 3, "mass": 1, "uniform_mass": 1}
# the least and the most weight that a response token may get; others keep a token or do not
RANGES = {
    **dict.fromkeys(("dft", "f_alpha", "deft", "critical_tokens"), (0, 1)),
    **dict.fromkeys(("eaft", "infosft", "soft_weights", "shad_rft"), (0, math.inf)),
    "idft": (-math.inf, 1),
    "rank_tuner": (0, 2),
    "talr": (0.01, 1),
    "forgetting": (-math.inf, 1),
}


def ceiling(rho, n):
    return math.ceil(Fraction(str(rho)).limit_denominator(1_000_000) * n)


def best(score, response, group, quota):
    """Places of the `quota(n)` best of each group's n response tokens, by Python's sort; of equal ones the earlier."""
    kept = set()
    for g in set(group):
        own = [i for i, competes in enumerate(response) if competes and group[i] == g]
        kept |= set(sorted(own, key=lambda i: (-score[i], i))[: quota(len(own))])
    return kept


@st.composite
def scored(draw, finite=True):
    """(score, response, sample), any of 0 to 40 tokens; many scores are equal."""
    n = draw(st.integers(0, 40))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    score = torch.randint(-3, 4, (n,), generator=random).float()
    if draw(st.booleans()):
        score = torch.randn(n, generator=random) * draw(st.sampled_from([1.0, 1e-12, 1e12]))
    response = torch.rand(n, generator=random) < draw(st.sampled_from([0.7, 1.0, 0.0]))
    if not finite:
        score[torch.rand(n, generator=random) < 0.2] = torch.inf
        score[torch.rand(n, generator=random) < 0.2] = -torch.inf
        score[~response] = torch.nan
    sample = torch.randint(0, max(1, min(n, draw(st.integers(1, 9)))), (n,), generator=random)
    return score, response, sample


@given(made=scored(finite=False), rho=shares, scope=st.sampled_from(["sample", "batch"]), floor=st.booleans())
def test_top_share_is_a_sort(made, rho, scope, floor):
    score, response, sample = made
    rule, signals = TopShare(rho, scope, floor=floor), TokenSignals(response, sample)
    quota = (lambda n: math.floor(Fraction(str(rho)).limit_denominator(1_000_000) * n)) if floor else None
    quota = quota or (lambda n: ceiling(rho, n))
    group = sample.tolist() if scope == "sample" else [0] * len(sample)
    kept = rule(score, signals)
    expected = best(score.tolist(), response.tolist(), group, quota)
    assert set(kept.nonzero()[:, 0].tolist()) == expected
    assert int(rule.count(response, sample)) == len(expected)
    assert kept_count(torch.arange(50), rho).tolist() == [ceiling(rho, n) for n in range(50)]


@given(made=scored(), rho=shares, low=shares, high=shares)
def test_samples_that_share_a_budget_spend_it_all(made, rho, low, high):
    score, response, sample = made
    low, high = min(low, rho), max(high, rho)
    n = torch.zeros(len(sample), dtype=torch.int64).index_add_(0, sample, response.long())
    quota = spread_quota(score, response, sample, rho, low, high)
    assert ((quota >= 0) & (quota <= n)).all()
    rule, signals = TopShare(rho, "sample", low, high), TokenSignals(response, sample)
    kept = rule(score, signals)
    assert torch.equal(kept, top_quota(score, response, sample, quota))
    assert int(kept.sum()) == int(rule.count(response, sample)) == ceiling(rho, int(response.sum()))


@given(made=scored(), rho=shares)
def test_whole_samples_are_kept(made, rho):
    score, response, sample = made
    score = score[:1].expand(0) if not len(score) else score[sample]  # a sample's score is on each of its tokens
    kept = TopSamples(rho)(score, TokenSignals(response, sample))
    real = sorted({s for s, competes in zip(sample.tolist(), response.tolist(), strict=True) if competes})
    values = {s: float(score[sample == s][0]) for s in real}
    winners = sorted(real, key=lambda s: (-values[s], s))[: ceiling(rho, len(real))]
    expected = [bool(r) and s in winners for s, r in zip(sample.tolist(), response.tolist(), strict=True)]
    assert kept.tolist() == expected


def signals_of(corpus, dtype, ties, seed):
    """Of each document its tokens' signals, by name; losses of 0, and a little below by rounding, among them."""
    random = torch.Generator().manual_seed(seed)
    documents = []
    for document in corpus:
        made = {name: torch.rand(len(document.ids), generator=random, dtype=torch.float64) * 6 for name in RECORDED}
        for name, most in LARGEST.items():
            made[name] = torch.rand(len(document.ids), generator=random, dtype=torch.float64) * most
        if ties:
            made = {name: values.round() for name, values in made.items()}
            made["nll"][made["nll"] == 3] = -1e-7
        made["rank"] = torch.randint(0, 40, (len(document.ids),), generator=random).double()
        documents.append({name: values.to(dtype) for name, values in made.items()})
    return documents


def signals_in(batch, documents, step):
    """What a method is given of a batch; NaN stands where no token is."""
    layout = BatchLayout.of_segments(batch.ids, batch.labels, **batch.bounds)
    tensors = {name: batch.put([made[name] for made in documents], torch.nan) for name in documents[0]}
    key = token_keys(batch.ids, **batch.bounds)
    return TokenSignals(layout.response, layout.sample, key=key, vocab_size=40, step=step, **tensors)


@given(
    corpus=corpora,
    layout=layouts,
    name=st.sampled_from(methods.names()),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    step=st.integers(0, 9),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_every_method(corpus, layout, name, ties, dtype, step, seed, data):
    """Shape, range, nothing off the response, and of those that keep a share exactly it, by a plain sort."""
    method = methods.get(name, **data.draw(PARAMETERS.get(name, st.just({}))))
    batch = layout.of(corpus)
    signals = signals_in(batch, signals_of(corpus, dtype, ties, seed), step)
    response, weights = signals.response, method(signals)
    assert weights.dtype == torch.float32 and weights.shape == batch.ids.shape
    assert (weights[~response] == 0).all() and weights.isfinite().all()
    of_response = weights[response]
    if name in RANGES:
        low, high = RANGES[name]
        assert (of_response >= low - 1e-6).all() and (of_response <= high + 1e-6).all()
    else:
        assert ((of_response == 0) | (of_response == 1)).all()
    flat = [x.flatten().tolist() for x in (method.score(signals), response, signals.sample)]
    share = method.rule if isinstance(method.rule, TopShare) else None
    if share:
        group = flat[2] if share.scope == "sample" else [0] * len(flat[2])
        expected = best(flat[0], flat[1], group, lambda n: int(share.quota(torch.tensor(n))))
        assert set(weights.flatten().nonzero()[:, 0].tolist()) == expected
        assert int(method.count(response, signals.sample)) == len(expected)
    if name == "ada_eslm":
        assert int(method.count(response, signals.sample)) == int(weights.sum())
    if name == "soft_weights" and response.any():
        torch.testing.assert_close(of_response.sum(), response.sum().float())


@given(
    corpus=corpora,
    layout=layouts,
    name=st.sampled_from(methods.names()),
    step=st.integers(0, 9),
    seed=st.integers(0, 2**20),
)
def test_weights_of_the_data_are_factors(corpus, layout, name, step, seed):
    """A token to which the data gives 0 does not compete, and does not count."""
    method, batch = methods.get(name), layout.of(corpus)
    signals = signals_in(batch, signals_of(corpus, torch.float64, False, seed), step)
    random = torch.Generator().manual_seed(seed)
    given = torch.randint(-2, 3, batch.ids.shape, generator=random).float() / 2
    weights = method(replace(signals, weight=given))
    competing = replace(signals, response=signals.response & (given != 0), weight=given)
    scored = method.score(replace(signals, weight=given))  # of all tokens, those that do not compete among them
    torch.testing.assert_close(weights, method.rule(scored, competing).float() * given)
    assert (weights[~competing.response] == 0).all()
    if isinstance(method.rule, TopShare):
        of_prompt = torch.where(signals.response, 0, given).abs().sum()
        assert float(method.count(signals.response, signals.sample, given) - of_prompt) == int((weights != 0).sum())


class Output(dict):
    """As a model's output is read, by name or attribute."""

    __getattr__ = dict.__getitem__


@given(share=shares, ranks=st.integers(1, 3), batches=st.integers(1, 2), ties=st.booleans(), seed=st.integers(0, 2**20))
def test_ranks_choose_as_one_batch_would(share, ranks, batches, ties, seed):
    """Micro-batches of any size, against one sort of all tokens: first micro-batches of all ranks, then second ones."""
    random, slots, meeting = torch.Generator().manual_seed(seed), [None] * ranks, Barrier(ranks)

    def output():
        shape = tuple(torch.randint(1, 5, (2,), generator=random).tolist())
        score = torch.randn(shape, generator=random)
        response = torch.rand(shape, generator=random) < 0.7
        sample = torch.arange(shape[0])[:, None].expand(shape) * shape[1]
        return Output(score=score.round() if ties else score, response=response, sample=sample)

    def weights_of(rank):
        def gather(tensor):
            slots[rank] = tensor
            meeting.wait(60)
            joined = torch.cat(slots)
            meeting.wait(60)
            return joined

        own = outputs[rank]
        return choose_across(methods.get("rho1", rho=share), own, [torch.ones_like(o.score) for o in own], gather, rank)

    outputs = [[output() for _ in range(batches)] for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:
        chosen = list(threads.map(weights_of, range(ranks)))
    in_order = [(b, r) for b in range(batches) for r in range(ranks)]
    score, response = (
        torch.cat([outputs[r][b][n].flatten() for b, r in in_order]).tolist() for n in ("score", "response")
    )
    expected = best(score, response, [0] * len(score), lambda n: ceiling(share, n))
    assert all(chosen[r][b].shape == outputs[r][b].score.shape for b, r in in_order)
    kept = torch.cat([chosen[r][b].flatten() for b, r in in_order])
    assert set(kept.nonzero()[:, 0].tolist()) == expected


@given(
    corpus=corpora,
    first=layouts,
    second=layouts,
    name=st.sampled_from(methods.names()),
    step=st.integers(0, 9),
    seed=st.integers(0, 2**20),
)
def test_a_methods_weights_do_not_depend_on_batch_order_padding_or_packing(corpus, first, second, name, step, seed):
    """Where no two scores are equal, of which the earlier wins."""
    corpus = list({tuple(d.ids): d for d in corpus}.values())  # equal documents have equal draws
    documents = signals_of(corpus, torch.float64, False, seed)
    taken = []
    for layout in (first, second):
        batch = layout.of(corpus)
        taken.append(batch.take(methods.get(name)(signals_in(batch, documents, step))))
    for i, weights in taken[0].items():
        torch.testing.assert_close(taken[1][i], weights)
