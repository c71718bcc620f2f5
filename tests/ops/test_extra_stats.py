"""Statistics that are asked for one by one: Rényi-2 entropy, sum of the logits, rank of the label."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE
from oracles import DTYPES, OPTIONS, head_of, make, truth, truth_of_logits

from tokensel import TokenStats, token_stats, token_stats_contrast, token_stats_from_logits, token_stats_pair
from tokensel.ops.products import HAS_TRITON

NAMES = ("renyi2", "logit_sum", "rank")
WANTED = dict.fromkeys(NAMES, True)
IMPLS = ["chunked", "reference"]


def assert_all(stats, z, labels):
    """No further from float64 than twice the eager error, and a rounding of the result and of each term of a sum.

    z: (N, V) float64 logits. Those as close to the label's as their rounding may stand on either side of it.
    """
    valid, eps = labels != -100, torch.finfo(torch.float32).eps
    exact, eager = (truth_of_logits(z.to(d), labels) for d in (torch.float64, torch.float32))
    size = z[valid].abs().max()
    for name, terms in (("renyi2", 8 + 2 * exact["lse"][valid].abs().max()), ("logit_sum", 2 * z.shape[1] * size)):
        error = (getattr(stats, name)[valid].double() - exact[name][valid]).abs().max()
        allowed = 2 * (eager[name][valid].double() - exact[name][valid]).abs().max() + eps * terms
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    label, close = exact["target_logit"][:, None], 8 * eps * size
    least, most = (z > label + close).sum(-1), (z > label - close).sum(-1) - 1
    assert ((stats.rank >= least) & (stats.rank <= most))[valid].all()
    for name in NAMES:
        assert (getattr(stats, name)[~valid] == 0).all() and getattr(stats, name).dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_they_equal_their_definitions(entropy, options, dtype, impl):
    hidden, weight, labels, bias = make(dtype=dtype)
    options = options | ({"bias": bias} if "bias" in options else {})
    stats = token_stats(hidden, weight, labels, entropy=entropy, impl=impl, **WANTED, **options)
    assert_all(stats, head_of(hidden, weight, **options), labels)
    same = token_stats(hidden, weight, labels, entropy=entropy, impl=impl, **options)
    for name, field in same.fields().items():
        torch.testing.assert_close(getattr(stats, name), field, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_each_comes_alone(name):
    hidden, weight, labels, _ = make()
    everything = token_stats(hidden, weight, labels, **WANTED)
    stats = token_stats(hidden, weight, labels, **{name: True})
    assert set(stats.fields()) == {"lse", "target_logit", name}
    assert torch.equal(getattr(stats, name), getattr(everything, name))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spread, shift", [(0.0, 0.0), (1000.0, 0.0), (1.0, -1e4), (1.0, 1e4)], ids=str)
def test_flat_peaked_and_far_off_logits(spread, shift, impl):
    hidden, weight, labels, bias = make(spread=spread)
    bias = bias + shift
    stats = token_stats(hidden, weight, labels, bias=bias, impl=impl, **WANTED)
    assert_all(stats, head_of(hidden, weight, bias), labels)


@pytest.mark.parametrize("V", [1, 2047, 2048, 2049, 4100])
def test_labels_at_the_edges_of_vocabulary_blocks(V):
    labels = torch.tensor([label for label in (0, 1, 2047, 2048, 2049, 4095, 4096, V - 1) if label < V])
    hidden, weight = torch.randn(len(labels), 12).double(), torch.randn(V, 12).double()
    stats, exact = token_stats(hidden, weight, labels, **WANTED), truth(hidden, weight, labels)
    for name in NAMES:
        torch.testing.assert_close(getattr(stats, name), exact[name], rtol=1e-9, atol=1e-9)


def test_the_rank_of_the_most_likely_token_is_zero():
    hidden, weight, _, _ = make()
    order = (hidden @ weight.T).argsort(-1, descending=True)
    for rank in (0, 1, 7, 2299):
        assert (token_stats(hidden, weight, order[:, rank], rank=True).rank == rank).all()


@pytest.mark.parametrize("impl", [*IMPLS, *(["fused"] if HAS_TRITON else [])])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 130, 517])
def test_of_logits_that_exist(V, dtype, impl):
    logits, old = (torch.randn(9, V, device=DEVICE).mul(4).to(dtype) for _ in range(2))
    labels = torch.randint(0, V, (9,), device=DEVICE)
    labels[4] = -100
    for stats, z in zip(token_stats_from_logits(logits, labels, old, impl=impl, **WANTED), (logits, old), strict=True):
        assert_all(stats, z.double(), labels)
        assert torch.equal(stats.rank, truth_of_logits(z.float(), labels)["rank"] * (labels >= 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_as_it_runs_on_a_gpu(dtype, request):
    pytest.importorskip("triton")
    request.getfixturevalue("gpu_chunked")
    hidden, weight, labels, bias = (t.to(DEVICE) for t in make(V=150, dtype=dtype))
    other = torch.randn(37, 24, device=DEVICE).to(dtype), torch.randn(150, 24, device=DEVICE).to(dtype)
    pair = token_stats_pair((hidden, weight), other, labels, bias=bias, softcap=9.0, **WANTED)
    for stats, (x, w) in zip(pair, ((hidden, weight), other), strict=True):
        assert_all(stats, head_of(x, w, bias, 9.0), labels)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_a_pair_and_of_a_contrast(impl):
    hidden, weight, labels, _ = (t.double() if t.is_floating_point() else t for t in make(V=2300))
    other = torch.randn(37, 24).double(), torch.randn(2300, 24).double()
    pair = token_stats_pair((hidden, weight), other, labels, impl=impl, **WANTED)
    valid = labels != -100
    for stats, (x, w) in zip(pair, ((hidden, weight), other), strict=True):
        exact = truth(x, w, labels)
        for name in NAMES:
            torch.testing.assert_close(getattr(stats, name)[valid], exact[name][valid])
    contrast = token_stats_contrast((hidden, weight), other, labels, beta=0.5, impl=impl, **WANTED)
    exact = truth_of_logits(1.5 * hidden @ weight.T - 0.5 * other[0] @ other[1].T, labels)
    for name in NAMES:
        torch.testing.assert_close(getattr(contrast, name)[valid], exact[name][valid])


def test_shards_of_the_vocabulary_merge():
    z = torch.randn(11, 90).double() * 5
    z[3] += 1e4
    labels = torch.randint(0, 90, (11,))
    parts = []
    for start, stop in ((0, 40), (40, 41), (41, 90)):
        of_part = truth_of_logits(z[:, start:stop], (labels - start).clamp(0, stop - start - 1))
        target = z.gather(1, labels[:, None])
        of_part["rank"] = (z[:, start:stop] > target).sum(-1).double()
        parts.append(TokenStats(of_part["lse"], of_part["target_logit"], **{name: of_part[name] for name in NAMES}))
    merged, exact = TokenStats.merge(parts), truth_of_logits(z, labels)
    for name in NAMES:
        torch.testing.assert_close(getattr(merged, name), exact[name], rtol=1e-9, atol=1e-9)


def test_what_has_no_kernel_says_so():
    hidden, weight, labels, _ = make()
    with pytest.raises(ValueError, match="impl='fused' has no renyi2, rank; use impl='chunked'"):
        token_stats(hidden, weight, labels, renyi2=True, rank=True, impl="fused")
