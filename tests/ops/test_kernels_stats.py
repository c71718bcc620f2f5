"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter (small, ragged shapes)."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE, make, summed_magnitude
from oracles import DTYPES, FIELDS, head_of, truth, truth_of_logits

import tokensel.ops.chunked_grad
import tokensel.ops.loss
import tokensel.ops.stats
import tokensel_kernels.attention_mass
import tokensel_kernels.vocab_grad
import tokensel_kernels.vocab_stats
from tokensel import (
    selected_cross_entropy,
    token_stats,
    token_stats_contrast,
    token_stats_from_logits,
    token_stats_pair,
)
from tokensel_kernels import tiles

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")


def assert_within_budget(stats, exact, eager, labels, fields=FIELDS):
    valid = labels != -100
    for name in fields:
        error = (getattr(stats, name)[valid].double() - exact[name][valid]).abs().max()
        allowed = 2 * (eager[name][valid].double() - exact[name][valid]).abs().max()
        allowed += 4 * torch.finfo(torch.float32).eps * exact[name][valid].abs().max().clamp(min=1)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    assert (stats.nll[~valid] == 0).all() and (stats.lse[~valid] == -torch.inf).all()


OPTIONS = [{}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "softcap": 20.0, "logit_scale": 0.6}]
# each of the options under one type, all of them together under each type
CASES = [*zip(OPTIONS, DTYPES, strict=False), *((OPTIONS[-1], dtype) for dtype in DTYPES)]


# Statistics from hidden states


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("options, dtype", CASES, ids=str)
def test_one_launch_gives_the_statistics_of_both_models(options, dtype, tma, monkeypatch):
    if DEVICE == "cpu":
        small = tiles.ProductTile(16, 64, 32, 4, 1, tma=tma, precision="widened")
        for kind in ("stats", "full_stats"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], dtype.itemsize, small)
    hidden, weight, labels, bias = make(dtype=dtype)
    old_hidden, old_weight = make(D=24, dtype=dtype)[:2]  # another hidden size
    options = options | ({"bias": bias} if "bias" in options else {})
    pair = token_stats_pair((hidden, weight), (old_hidden, old_weight), labels, entropy=True, impl="fused", **options)
    for stats, inputs in zip(pair, ((hidden, weight), (old_hidden, old_weight)), strict=True):
        exact, eager = (truth(*inputs, labels, **options, dtype=d) for d in (torch.float64, torch.float32))
        assert_within_budget(stats, exact, eager, labels)
    (plain,) = (token_stats(hidden, weight, labels, impl="fused", **options),)
    assert plain.entropy is None
    torch.testing.assert_close(plain.nll, pair[0].nll)


@pytest.mark.parametrize("N, V, D", [(1, 1, 16), (16, 64, 32), (17, 65, 33), (3, 200, 7), (40, 129, 8), (33, 64, 100)])
def test_shapes_that_are_no_multiple_of_anything(N, V, D):
    hidden, weight = torch.randn(N, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    labels = torch.randint(0, V, (N,), device=DEVICE)
    stats = token_stats(hidden, weight, labels, entropy=True, impl="fused")
    exact, eager = (truth(hidden, weight, labels, dtype=d) for d in (torch.float64, torch.float32))
    assert_within_budget(stats, exact, eager, labels)


@pytest.mark.parametrize("scale", [0.0, 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_flat_peaked_and_far_off_logits(scale, shift):
    hidden, weight, labels, bias = make()
    hidden, bias = hidden * scale, bias * 0 + shift
    stats = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused")
    exact, eager = (truth(hidden, weight, labels, bias, dtype=d) for d in (torch.float64, torch.float32))
    assert_within_budget(stats, exact, eager, labels)


@pytest.mark.parametrize("processors", [1, 2, 7, 100])
def test_any_number_of_vocabulary_shares_merges_to_the_same(processors, monkeypatch):
    hidden, weight, labels, _ = make(V=1200, dtype=torch.bfloat16)  # more shares than are joined at once
    expected = token_stats(hidden, weight, labels, entropy=True, impl="reference")
    tile = tiles.ProductTile(16, 64, 32, 4, 1, precision="widened", processors=processors)
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_stats, "product_tile", lambda *a: tile)
    stats = token_stats(hidden, weight, labels, entropy=True, impl="fused")
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("entropy", [False, True])
def test_more_rows_than_a_slab_holds(entropy, monkeypatch):
    """Rows with a label are gathered a slab at a time; the last slab is not full, and one may be empty."""
    monkeypatch.setattr(tokensel_kernels.vocab_stats, "GROUP", 1)
    hidden, weight, labels, bias = make(N=70, dtype=torch.bfloat16)
    old = make(D=24, dtype=torch.bfloat16)[1]
    old_hidden = torch.randn(70, 24, device=DEVICE).bfloat16()
    pair = token_stats_pair(
        (hidden, weight), (old_hidden, old), labels, bias=bias, softcap=9.0, entropy=entropy, impl="fused"
    )
    for stats, inputs in zip(pair, ((hidden, weight), (old_hidden, old)), strict=True):
        exact, eager = (truth(*inputs, labels, bias, softcap=9.0, dtype=d) for d in (torch.float64, torch.float32))
        assert_within_budget(stats, exact, eager, labels, FIELDS if entropy else FIELDS[:3])


def test_a_certain_token_has_no_negative_loss():
    """Its logit and the log-sum-exp are sums of the same products in two orders."""
    weight = torch.randn(150, 40, device=DEVICE).bfloat16()
    hidden, labels = weight * 50, torch.arange(150, device=DEVICE)
    assert (token_stats(hidden, weight, labels, impl="fused").nll >= 0).all()


def test_the_label_s_logit_is_the_largest_where_it_is():
    hidden, weight, labels, bias = make(dtype=torch.bfloat16)
    logits = hidden.double() @ weight.double().T + bias.double()
    labels = torch.where(labels == -100, labels, logits.argmax(-1))
    stats = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused")
    assert torch.equal(stats.correct, labels != -100)


@pytest.mark.parametrize("softcap", [32.0, 33.0, 1e4, 1e9])
def test_a_softcap_of_any_size(softcap):
    """A large one hardly bends the logits, and its rounding must not grow with it."""
    hidden, weight, labels, bias = make()
    options = {"bias": bias, "softcap": softcap}
    exact, eager = (truth(hidden, weight, labels, **options, dtype=d) for d in (torch.float64, torch.float32))
    for entropy in (False, True):
        stats = token_stats(hidden, weight, labels, **options, entropy=entropy, impl="fused")
        assert_within_budget(stats, exact, eager, labels, FIELDS if entropy else FIELDS[:3])


def test_an_infinite_hidden_state_meets_no_column_that_is_not_there():
    """Under a softcap its logits are numbers; past the vocabulary it would multiply zeros."""
    hidden, weight, labels, bias = make(V=150)
    hidden[3, 5] = torch.inf
    weight[:, 5] = weight[:, 5].abs() + 0.1
    labels[3] = 7
    stats = token_stats(hidden, weight, labels, bias=bias, softcap=5.0, impl="fused")
    exact = truth(hidden, weight, labels, bias, softcap=5.0, dtype=torch.float64)
    torch.testing.assert_close(stats.lse[3].double(), exact["lse"][3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("low", [-1e30, -torch.inf])
@pytest.mark.parametrize("where", ["first", "last", "a share"])
@pytest.mark.parametrize("processors", [1, 100], ids=["one share", "many shares"])
def test_tokens_that_are_forbidden_leave_the_others_moments(low, where, processors, monkeypatch):
    """A bias that forbids part of the vocabulary: its square is no number, and no likelihood is left of it."""
    tile = tiles.ProductTile(16, 64, 16, 4, 1, precision="widened", processors=processors)
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_stats, "product_tile", lambda *a: tile)
    hidden, weight, labels, bias = make(V=300)
    forbidden = {"first": slice(0, 70), "last": slice(260, 300), "a share": slice(64, 192)}[where]
    bias[forbidden] = low
    allowed = torch.ones(300, dtype=torch.bool, device=DEVICE)
    allowed[forbidden] = False
    labels = torch.where(labels == -100, labels, torch.arange(300, device=DEVICE)[allowed][labels.clamp(min=0) % 100])
    stats = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused")
    exact, eager = (
        truth(hidden, weight, labels, bias.clamp(min=-1e4), dtype=d) for d in (torch.float64, torch.float32)
    )
    assert_within_budget(stats, exact, eager, labels)


@pytest.mark.parametrize("row_tiles, column_tiles", [(1, 1), (2, 501), (32, 501), (32, 1000), (7, 33)])
def test_shares_of_the_vocabulary_fill_whole_waves(row_tiles, column_tiles):
    from tokensel_kernels.vocab_stats import FILL, vocabulary_share

    def time(share):
        programs = row_tiles * -(-column_tiles // share)
        return -(-programs // 132) * (share + FILL)

    share = vocabulary_share(row_tiles, column_tiles, 132)
    assert time(share) == min(map(time, range(1, column_tiles + 1)))
    if row_tiles == 32:  # many waves: the last costs little
        assert time(share) < 1.04 * row_tiles * column_tiles / 132


def test_reruns_are_bitwise_equal_and_ignored_rows_are_never_read():
    hidden, weight, labels, bias = make(dtype=torch.bfloat16)
    first = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused")
    hidden[16:32] = torch.nan
    hidden[0] = torch.nan
    second = token_stats(hidden, weight, labels, bias=bias, entropy=True, impl="fused")
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


@pytest.mark.parametrize("rows", ["ignored", "none"])
def test_nothing_to_score(rows):
    hidden, weight, labels, _ = make()
    labels = torch.full_like(labels, -100)
    hidden, labels = (hidden, labels) if rows == "ignored" else (hidden[:0], labels[:0])
    assert token_stats(hidden, weight, labels, entropy=True, impl="fused").nll.tolist() == [0.0] * len(labels)
    assert token_stats_from_logits(hidden @ weight.T, labels, impl="fused")[0].nll.tolist() == [0.0] * len(labels)


def test_strided_inputs():
    hidden, weight, labels, _ = make(N=36)
    expected = token_stats(hidden, weight, labels, impl="reference").nll
    wide = torch.randn(36, 81, device=DEVICE)
    wide[:, 1::2] = hidden
    tall = weight.T.contiguous().T
    torch.testing.assert_close(token_stats(wide[:, 1::2], tall, labels, impl="fused").nll, expected)
    every_other = torch.stack([labels, labels * 0], 1)[:, 0]
    torch.testing.assert_close(token_stats(hidden, weight, every_other, impl="fused").nll, expected)
    logits = token_stats_from_logits(hidden @ weight.T, every_other, impl="fused")[0].nll
    torch.testing.assert_close(logits, expected)
    batched = token_stats(hidden.view(4, 9, -1), weight, labels.view(4, 9), impl="fused").nll
    torch.testing.assert_close(batched, expected.view(4, 9))


# The chunked implementation on a GPU


@pytest.mark.parametrize(
    "workspace_mib, options, dtype",
    [(256, {}, DTYPES[0]), (256, OPTIONS[-1], DTYPES[-1]), *((0.006, *case) for case in CASES[-len(DTYPES) :])],
    ids=str,
)
def test_library_products_of_both_models_are_read_once(workspace_mib, options, dtype, gpu_chunked):
    hidden, weight, labels, bias = make(dtype=dtype)
    old_hidden, old_weight = make(D=24, dtype=dtype)[:2]
    options = options | ({"bias": bias} if "bias" in options else {})
    models, options = ((hidden, weight), (old_hidden, old_weight)), options | {"workspace_mib": workspace_mib}
    pair = token_stats_pair(*models, labels, entropy=True, impl="chunked", **options)
    alone = token_stats(hidden, weight, labels, impl="chunked", **options)
    torch.testing.assert_close(alone.nll, pair[0].nll)
    del options["workspace_mib"]
    for stats, inputs in zip(pair, models, strict=True):
        exact, eager = (truth(*inputs, labels, **options, dtype=d) for d in (torch.float64, torch.float32))
        assert_within_budget(stats, exact, eager, labels)


def assert_contrast_within_budget(stats, models, labels, beta, **options):
    truths = []
    for dtype in (torch.float64, torch.float32):
        positive, negative = (head_of(*model, **options, dtype=dtype) for model in models)
        truths.append(truth_of_logits((1 + beta) * positive - beta * negative, labels))
    assert_within_budget(stats, *truths, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
@pytest.mark.parametrize("workspace_mib", [256, 0.006], ids=["all rows", "blocks of rows"])
def test_the_contrast_by_library_products(workspace_mib, options, dtype, gpu_chunked):
    hidden, weight, labels, bias = make(dtype=dtype)
    models = ((hidden, weight), make(D=24, dtype=dtype)[:2])
    options = options | ({"bias": bias} if "bias" in options else {})
    common = {"entropy": True, "impl": "chunked", "workspace_mib": workspace_mib}
    stats = token_stats_contrast(*models, labels, beta=0.7, **common, **options)
    assert_contrast_within_budget(stats, models, labels, 0.7, **options)


@pytest.mark.parametrize("V", [63, 64, 65, 129])
def test_library_products_of_several_blocks_of_the_vocabulary(V, gpu_chunked):
    labels = torch.tensor([label for label in (0, 63, 64, 65, 128) if label < V] + [-100], device=DEVICE)
    hidden, weight = torch.randn(len(labels), 12, device=DEVICE), torch.randn(V, 12, device=DEVICE)
    stats = token_stats(hidden, weight, labels, entropy=True, impl="chunked")
    exact, eager = (truth(hidden, weight, labels, dtype=d) for d in (torch.float64, torch.float32))
    assert_within_budget(stats, exact, eager, labels)
    assert token_stats(hidden[:0], weight, labels[:0], impl="chunked").nll.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options, frozen",
    [({}, True), ({"softcap": 6.0, "logit_scale": 0.7}, False), ({"softcap": 1e9}, False)],
    ids=["head frozen", "head trained", "large softcap"],
)
def test_gradients_by_library_products(options, dtype, frozen, gpu_chunked, monkeypatch):
    monkeypatch.setattr(tokensel.ops.chunked_grad, "WORKSPACE_MIB", 0.0023)  # blocks of nine rows
    hidden, weight, labels, bias = make(dtype=dtype)
    keep = torch.randn(len(labels), device=DEVICE) * (torch.rand(len(labels), device=DEVICE) < 0.6)
    names = ("hidden",) if frozen else ("hidden", "weight", "bias")
    found = []
    for impl, wide in (("chunked", dtype), ("reference", dtype), ("reference", torch.float64)):
        inputs = dict(zip(("hidden", "weight", "bias"), (t.to(wide) for t in (hidden, weight, bias)), strict=True))
        for name in names:
            inputs[name] = inputs[name].clone().requires_grad_()
        x, w, b = inputs.values()
        loss = selected_cross_entropy(x, w, labels, keep.to(wide), bias=b, impl=impl, **options)
        (loss * -1.7).backward()
        found.append([inputs[name].grad for name in names])
    exact = found[2]
    for name, ours, eager, truly in zip(names, *found, strict=True):
        rounding = torch.finfo(dtype).eps
        allowed = 2 * (eager.double() - truly).abs().max() + 2 * rounding * truly.abs().max()
        allowed += rounding * summed_magnitude(name, (hidden, weight, bias), labels, keep, exact, **options)
        assert (ours.double() - truly).abs().max() <= allowed, name


# Statistics from logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_logits_there_are(dtype):
    logits = torch.full((2, 40), torch.finfo(dtype).min, dtype=dtype, device=DEVICE)
    logits[1, 3] = 0.0
    labels = torch.tensor([5, 3], device=DEVICE)
    stats, _ = token_stats_from_logits(logits, labels, entropy=True, impl="fused")
    expected, _ = token_stats_from_logits(logits, labels, entropy=True, impl="reference")
    for name in FIELDS:
        ours, truly = getattr(stats, name)[1:], getattr(expected, name)[1:]
        torch.testing.assert_close(ours, truly, atol=1e-6, rtol=1e-6)
    assert torch.equal(stats.nll[0], expected.nll[0]) and stats.correct.all() and stats.entropy.isfinite().all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_from_logits_of_one_and_two_models(dtype, entropy):
    labels = make(N=12, V=333)[2]
    logits, old = ((torch.randn(12, 333, device=DEVICE) * 3).to(dtype) for _ in range(2))
    before = logits.clone()
    both = token_stats_from_logits(logits, labels, old, entropy=entropy, impl="fused")
    fields = FIELDS if entropy else FIELDS[:3]
    for stats, z in zip(both, (logits, old), strict=True):
        assert_within_budget(
            stats, truth_of_logits(z.double(), labels), truth_of_logits(z.float(), labels), labels, fields
        )
    alone, nothing = token_stats_from_logits(logits, labels, impl="fused")
    assert nothing is None and torch.equal(alone.nll, both[0].nll)
    assert torch.equal(logits, before)
    wide = torch.randn(12, 400, device=DEVICE).to(dtype)
    wide[:, :333] = logits
    # threads that begin elsewhere add up in another order
    torch.testing.assert_close(token_stats_from_logits(wide[:, :333], labels, impl="fused")[0].nll, alone.nll)


def test_warps_of_their_own_give_the_same(monkeypatch):
    """A tile's sums are then a share of their own, of which there may be more than programs."""
    hidden, weight, labels, bias = make(V=720, dtype=torch.bfloat16)
    expected = token_stats(hidden, weight, labels, bias=bias, softcap=9.0, impl="fused")
    tile = tiles.ProductTile(16, 64, 32, 4, 1, precision="widened", specialize=True)
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_stats, "product_tile", lambda *a: tile)
    stats = token_stats(hidden, weight, labels, bias=bias, softcap=9.0, impl="fused")
    torch.testing.assert_close(stats.lse, expected.lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(stats.target_logit, expected.target_logit)
