"""Statistics that are asked for one by one: Rényi-2 entropy, sum of the logits, rank of the label."""

from __future__ import annotations

import itertools

import kernel_inputs
import pytest
import torch
from kernel_inputs import DEVICE
from oracles import DTYPES, FIELDS, OPTIONS, head_of, make, truth, truth_of_logits

from tokensel import TokenStats, token_stats, token_stats_contrast, token_stats_from_logits, token_stats_pair
from tokensel.ops.products import HAS_TRITON

NAMES = ("renyi2", "logit_sum", "rank")
WANTED = dict.fromkeys(NAMES, True)
IMPLS = ["chunked", "reference"]
KERNELS = ["fused"] if HAS_TRITON else []


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


def made(impl, **shape):
    """Few columns where an interpreter is slow, on the device that has the kernels."""
    return kernel_inputs.make(**shape) if impl == "fused" else make(**shape)


CASES = list(itertools.product((False, True), OPTIONS, DTYPES, IMPLS))
for which in zip(OPTIONS, itertools.cycle(DTYPES)) if HAS_TRITON else []:
    CASES.append((True, *which, "fused"))  # which makes the moments of entropy with these


@pytest.mark.parametrize("entropy, options, dtype, impl", CASES, ids=str)
def test_they_equal_their_definitions(entropy, options, dtype, impl):
    hidden, weight, labels, bias = made(impl, dtype=dtype)
    options = options | ({"bias": bias} if "bias" in options else {})
    stats = token_stats(hidden, weight, labels, entropy=entropy, impl=impl, **WANTED, **options)
    assert_all(stats, head_of(hidden, weight, **options), labels)
    same = token_stats(hidden, weight, labels, entropy=entropy, impl=impl, **options)
    exact = {} if impl == "fused" else {"rtol": 0, "atol": 0}  # whose tile is narrower with more sums
    for name, field in same.fields().items():
        torch.testing.assert_close(getattr(stats, name), field, **exact)


@pytest.mark.parametrize("impl", ["chunked", *KERNELS])
@pytest.mark.parametrize("name", NAMES)
def test_each_comes_alone(name, impl):
    hidden, weight, labels, _ = made(impl, N=9)
    everything = token_stats(hidden, weight, labels, impl=impl, **WANTED)
    stats = token_stats(hidden, weight, labels, impl=impl, **{name: True})
    assert set(stats.fields()) == {"lse", "target_logit", name}
    assert torch.equal(getattr(stats, name), getattr(everything, name))


@pytest.mark.parametrize("impl", [*IMPLS, *KERNELS])
@pytest.mark.parametrize("spread, shift", [(0.0, 0.0), (1000.0, 0.0), (1.0, -1e4), (1.0, 1e4)], ids=str)
def test_flat_peaked_and_far_off_logits(spread, shift, impl):
    hidden, weight, labels, bias = made(impl)
    hidden, bias = hidden * spread, bias + shift
    stats = token_stats(hidden, weight, labels, bias=bias, impl=impl, **WANTED)
    assert_all(stats, head_of(hidden, weight, bias), labels)


@pytest.mark.parametrize("V", [1, 2047, 2048, 2049, 4100])
def test_labels_at_the_edges_of_vocabulary_blocks(V):
    labels = torch.tensor([label for label in (0, 1, 2047, 2048, 2049, 4095, 4096, V - 1) if label < V])
    hidden, weight = torch.randn(len(labels), 12).double(), torch.randn(V, 12).double()
    stats, exact = token_stats(hidden, weight, labels, **WANTED), truth(hidden, weight, labels)
    for name in NAMES:
        torch.testing.assert_close(getattr(stats, name), exact[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["chunked", *KERNELS])
def test_the_rank_of_the_most_likely_token_is_zero(impl):
    hidden, weight, _, _ = made(impl, N=9)
    order = (hidden @ weight.T).argsort(-1, descending=True)
    for rank in (0, 1, 7, len(weight) - 1):
        assert (token_stats(hidden, weight, order[:, rank], rank=True, impl=impl).rank == rank).all()


@pytest.mark.parametrize("impl", [*IMPLS, *KERNELS])
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


# The kernel that makes them from hidden states


@pytest.fixture
def few_columns(monkeypatch, poisoned_scratch):
    """Sets how many processors share the columns, and with that the shares that are merged; one tile a slab."""
    pytest.importorskip("triton")
    import tokensel_kernels.vocab_stats
    from tokensel_kernels.tiles import ProductTile

    def shared_by(processors):
        tile = ProductTile(16, 32, 32, 4, 1, precision="widened", processors=processors)
        monkeypatch.setattr(tokensel_kernels.vocab_stats, "GROUP", 1)
        if DEVICE == "cpu":
            monkeypatch.setattr(tokensel_kernels.vocab_stats, "product_tile", lambda *a: tile)

    return shared_by


@pytest.mark.parametrize(
    "processors, softcap, temperature",
    [(1, None, 1.0), (100, None, 2.0), (7, 5.0, 0.5), (1, 32.0, 1.0), (7, 1e4, 1.0)],
)
def test_of_two_models_in_one_launch(processors, softcap, temperature, few_columns):
    """A last slab that is not full, and the second model's largest logits in the last share, one of 17 or fewer."""
    few_columns(processors)
    V = 270 if processors == 100 else 90  # 16 shares are joined at once
    hidden, weight, labels, bias = kernel_inputs.make(N=41, V=V, D=24, dtype=torch.bfloat16)
    other, other_weight = kernel_inputs.make(N=41, V=V, D=12, dtype=torch.bfloat16)[:2]
    other_weight[V - 5 :] *= 5
    head = {"bias": bias * 4, "softcap": softcap, "logit_scale": 0.7}
    models = (hidden, weight), (other, other_weight)
    pair = token_stats_pair(*models, labels, temperature=temperature, impl="fused", **head, **WANTED)
    for stats, (x, w) in zip(pair, models, strict=True):
        assert_all(stats, head_of(x, w, **head) / temperature, labels)


@pytest.mark.parametrize("processors", [1, 100], ids=["one share", "many shares"])
def test_forbidden_tokens_and_an_infinite_hidden_state(processors, few_columns):
    few_columns(processors)
    hidden, weight, labels, bias = kernel_inputs.make(V=150)
    bias[32:96] = -torch.inf  # whole tiles
    labels = torch.where((labels >= 32) & (labels < 96), 7, labels)
    stats = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused", **WANTED)
    exact = token_stats(hidden.double(), weight.double(), labels, bias=bias.double(), impl="chunked", **WANTED)
    torch.testing.assert_close(stats.renyi2.double(), exact.renyi2, rtol=1e-6, atol=1e-6)
    assert torch.equal(stats.rank.double(), exact.rank) and (stats.logit_sum[labels != -100] == -torch.inf).all()
    # past the vocabulary it would multiply zeros
    hidden[3, 5], weight[:, 5] = torch.inf, 1.0
    stats = token_stats(hidden, weight, labels, softcap=5.0, impl="fused", **WANTED)
    assert stats.logit_sum[3] == 150 * 5.0 and stats.rank[3] == 0


def test_a_label_that_is_elsewhere_and_parts_of_a_vocabulary(few_columns):
    """Each part compares with the label's logit in the whole; a label that no part has is below all."""
    few_columns(2)
    from tokensel_kernels.vocab_stats import hidden_stats

    hidden, weight, labels, bias = kernel_inputs.make(V=200)
    labels[1], labels[33] = 200, 2**40
    z = head_of(hidden, weight, bias)
    inside = (labels >= 0) & (labels < 200)
    label_logit = torch.where(inside, z.gather(1, torch.where(inside, labels, 0)[:, None])[:, 0], -torch.inf)
    parts = []
    for start, stop in ((0, 70), (70, 71), (71, 200)):
        fields = hidden_stats(
            [(hidden, weight[start:stop])],
            torch.where(labels == -100, -100, torch.where(labels < start, -1, labels - start)),
            bias=bias[start:stop],
            softcap=None,
            logit_scale=1.0,
            entropy=False,
            ignore_index=-100,
            more=True,
            label_logit=label_logit.float()[None],
        )
        parts.append(TokenStats(*fields[:, 0]))
    merged = TokenStats.merge(parts)
    exact = truth_of_logits(z, labels.clamp(0, 199))
    valid = labels != -100
    for name in ("lse", "entropy", "renyi2", "logit_sum"):
        torch.testing.assert_close(getattr(merged, name)[valid].double(), exact[name][valid], rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.rank, torch.where(inside, exact["rank"], torch.where(valid, 200, 0)).float())
    assert (merged.target_logit[valid & ~inside] == -torch.inf).all()


def test_reruns_are_bitwise_equal_and_rows_without_a_label_are_never_read(few_columns):
    few_columns(3)
    hidden, weight, labels, bias = kernel_inputs.make(dtype=torch.bfloat16)
    first = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused", **WANTED)
    hidden[labels == -100] = torch.nan
    second = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused", **WANTED)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in (*FIELDS, *NAMES))
