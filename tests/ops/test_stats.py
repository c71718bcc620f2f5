from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, FIELDS, OPTIONS, assert_within_budget, make, truth
from torch.utils._python_dispatch import TorchDispatchMode

import tokensel.ops.stats
from tokensel import (
    selected_cross_entropy,
    token_stats,
    token_stats_from_logits,
    token_stats_pair,
)
from tokensel.ops.products import exact_products


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_statistics_equal_their_definitions(options, dtype, impl):
    hidden, weight, labels, bias = make(dtype=dtype)
    options = options | ({"bias": bias} if "bias" in options else {})
    stats = token_stats(hidden, weight, labels, entropy=True, impl=impl, **options)
    # eager in float32: inputs of half precision are exact in it, so bfloat16 logits would not pass here
    eager = truth(hidden, weight, labels, **options, dtype=torch.float32)
    assert_within_budget(stats, truth(hidden, weight, labels, **options), eager, labels)
    assert stats.lse.dtype == torch.float32
    plain = token_stats(hidden, weight, labels, impl=impl, **options)  # without moments: its own, shorter arithmetic
    assert_within_budget(plain, truth(hidden, weight, labels, **options), eager, labels, fields=FIELDS[:3])
    assert plain.entropy is None and plain.logp_var is None and plain.top1 is None


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_float64_stays_float64(impl):
    hidden, weight, labels, bias = make(dtype=torch.float64)
    stats = token_stats(hidden, weight, labels, bias=bias, softcap=9.0, entropy=True, impl=impl)
    exact = truth(hidden, weight, labels, bias, softcap=9.0)
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name)[labels >= 0], exact[name][labels >= 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 1000.0], ids=["flat", "nearly flat", "peaked", "one-hot"])
def test_flat_and_peaked_distributions(spread):
    hidden, weight, labels, _ = make(spread=spread)
    stats = token_stats(hidden, weight, labels, entropy=True)
    plain = token_stats(hidden, weight, labels)
    exact, eager = (truth(hidden, weight, labels, dtype=d) for d in (torch.float64, torch.float32))
    assert_within_budget(stats, exact, eager, labels)
    assert_within_budget(plain, exact, eager, labels, fields=FIELDS[:3])


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_that_are_all_very_negative_or_very_large(shift):
    hidden, weight, labels, bias = make()
    stats = token_stats(hidden, weight, labels, bias=bias + shift, entropy=True)
    plain = token_stats(hidden, weight, labels, bias=bias + shift)
    exact, eager = (truth(hidden, weight, labels, bias + shift, dtype=d) for d in (torch.float64, torch.float32))
    assert_within_budget(stats, exact, eager, labels)
    assert_within_budget(plain, exact, eager, labels, fields=FIELDS[:3])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_ignored_rows_are_zero_and_never_read(impl):
    hidden, weight, labels, _ = make()
    expected = token_stats(hidden, weight, labels, entropy=True, impl="reference")
    hidden[::5] = torch.nan
    stats = token_stats(hidden, weight, labels, entropy=True, impl=impl)
    ignored = labels == -100
    assert (stats.nll[ignored] == 0).all() and (stats.lse[ignored] == -torch.inf).all()
    assert (stats.entropy[ignored] == 0).all() and (stats.logp_var[ignored] == 0).all()
    assert not stats.correct[ignored].any()
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("ignore_index", [-1, 7, 10**6])
def test_ignore_index_may_be_any_number(ignore_index, impl):
    hidden, weight, labels, _ = make()
    labels[labels == 7] = 8
    other = torch.where(labels == -100, ignore_index, labels)
    expected = token_stats(hidden, weight, labels, impl=impl)
    options = {"ignore_index": ignore_index, "impl": impl}
    logits = hidden @ weight.T
    for stats in (
        token_stats(hidden, weight, other, **options),
        *token_stats_pair((hidden, weight), (hidden, weight), other, **options),
        *token_stats_from_logits(logits, other, logits, **options),
    ):
        assert torch.equal(stats.nll == 0, labels == -100)
        torch.testing.assert_close(stats.nll, expected.nll)


@pytest.mark.parametrize("V", [1, 2, 2047, 2048, 2049, 4096, 5000])
def test_labels_at_the_edges_of_vocabulary_blocks(V):
    labels = torch.tensor([label for label in (0, 1, 2046, 2047, 2048, 2049, 4095, 4096, V - 1) if label < V])
    hidden, weight = torch.randn(len(labels), 12).double(), torch.randn(V, 12).double()
    stats, exact = token_stats(hidden, weight, labels, entropy=True), truth(hidden, weight, labels)
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), exact[name], rtol=1e-12, atol=1e-12)


def test_correct_says_whether_the_label_has_the_largest_logit():
    hidden, weight, labels, _ = make()
    best = (hidden @ weight.T).argmax(-1)
    labels = torch.where(torch.arange(len(labels)) % 2 == 0, best, (best + 1) % len(weight))
    stats = token_stats(hidden, weight, labels, entropy=True)
    assert stats.correct.tolist() == (labels == best).tolist()
    assert token_stats(hidden, weight, labels).correct is None


def test_leading_dimensions_and_strides_do_not_matter():
    hidden, weight, labels, _ = make(N=36)
    flat = token_stats(hidden, weight, labels, entropy=True)
    wide = torch.full((36, 80), torch.nan)
    wide[:, ::2] = hidden
    strided_weight = weight.T.contiguous().T
    strided_labels = labels[:, None].expand(36, 2).contiguous()[:, 0]
    assert not (wide[:, ::2].is_contiguous() or strided_weight.is_contiguous() or strided_labels.is_contiguous())
    strided = token_stats(wide[:, ::2], strided_weight, strided_labels, entropy=True)
    batched = token_stats(hidden.view(3, 4, 3, -1), weight, labels.view(3, 4, 3), entropy=True)
    for name in FIELDS:
        torch.testing.assert_close(getattr(strided, name), getattr(flat, name))
        assert torch.equal(getattr(batched, name), getattr(flat, name).view(3, 4, 3))


def test_a_small_workspace_splits_rows_and_changes_nothing():
    hidden, weight, labels, _ = make()
    whole = token_stats(hidden, weight, labels, entropy=True)
    split = token_stats(hidden, weight, labels, entropy=True, workspace_mib=0.03)  # three rows of 2,048 columns
    for name in FIELDS:
        torch.testing.assert_close(getattr(split, name), getattr(whole, name))


def test_a_workspace_without_room_for_a_row_is_named():
    hidden, weight, labels, _ = make(N=4)
    V = len(weight)
    with pytest.raises(ValueError, match=f"workspace_mib=1e-06 holds no row of 1 x {min(V, 2048)} float32 logits"):
        token_stats(hidden, weight, labels, workspace_mib=1e-6)
    with pytest.raises(ValueError, match="it needs at least 0.0") as error:
        token_stats_from_logits(hidden @ weight.T, labels, workspace_mib=1e-6)
    token_stats_from_logits(hidden @ weight.T, labels, workspace_mib=float(str(error.value).split()[-1]))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", ["ignored", "none"])
def test_nothing_to_score_is_not_nan(rows, entropy, impl):
    hidden, weight, labels, _ = make()
    labels = torch.full_like(labels, -100)
    if rows == "none":
        hidden, labels = hidden[:0], labels[:0]
    options = {"entropy": entropy, "impl": impl}
    for stats in (
        token_stats(hidden, weight, labels, **options),
        *token_stats_pair((hidden, weight), (hidden, weight), labels, **options),
        token_stats_from_logits(hidden @ weight.T, labels, **options)[0],
    ):
        assert stats.nll.tolist() == [0.0] * len(labels)
        if entropy:
            assert stats.entropy.tolist() == stats.logp_var.tolist() == [0.0] * len(labels)
            assert not stats.correct.any()


def test_rerun_is_bitwise_equal_and_scratch_is_not_read(monkeypatch):
    hidden, weight, labels, bias = make(dtype=torch.bfloat16)
    first = token_stats(hidden, weight, labels, bias=bias, entropy=True)
    empty = torch.empty
    monkeypatch.setattr(tokensel.ops.stats.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    second = token_stats(hidden, weight, labels, bias=bias, entropy=True)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


# What is held


@pytest.mark.parametrize("impl, holds_logits", [("chunked", False), ("reference", True)])
def test_only_the_reference_holds_logits(impl, holds_logits, largest_tensor, monkeypatch):
    monkeypatch.setattr("tokensel.ops.chunked_grad.WORKSPACE_MIB", 0.25)
    N, V, D = 300, 5000, 16
    hidden, weight, labels, _ = make(N, V, D)
    hidden.requires_grad_(), weight.requires_grad_()
    keep = torch.rand(N) < 0.9
    with largest_tensor:
        stats = token_stats(hidden, weight, labels, impl=impl, workspace_mib=0.25)
        selected_cross_entropy(hidden, weight, labels, keep, stats=stats, impl=impl).backward()
    assert (largest_tensor.elements >= 0.7 * N * V) == holds_logits
    if not holds_logits:
        assert largest_tensor.elements == V * D  # the gradient of the head


class LargestFloat32(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("impl, holds_copy", [("chunked", False), ("reference", True)])
def test_only_the_reference_holds_a_float32_copy_of_logits(impl, holds_copy):
    logits, labels = torch.randn(300, 5000).bfloat16(), torch.randint(0, 5000, (300,))
    with LargestFloat32() as largest:
        token_stats_from_logits(logits, labels, logits, entropy=True, impl=impl, workspace_mib=0.25)
    assert (largest.elements >= logits.numel()) == holds_copy
    if not holds_copy:
        assert largest.elements <= 0.25 * 2**20 / 4


@pytest.mark.parametrize("units", [False, True], ids=["emulated bfloat16", "bfloat16 units"])
def test_exact_products_puts_its_flag_back(units, monkeypatch):
    monkeypatch.setattr("tokensel.ops.products.multiplies_bfloat16", lambda: units)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    assert before != "bf16"
    with pytest.raises(KeyError), exact_products(torch.bfloat16):
        assert matmul.fp32_precision == ("bf16" if units else before)
        raise KeyError
    assert matmul.fp32_precision == before
    with exact_products(torch.float32):
        assert matmul.fp32_precision == before
