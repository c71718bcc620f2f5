from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokensel.ops.stats
from tokensel import (
    TokenStats,
    selected_cross_entropy,
    token_stats,
    token_stats_contrast,
    token_stats_from_logits,
    token_stats_pair,
)
from tokensel.ops.checks import check_label_range
from tokensel.ops.products import exact_products

FIELDS = ("lse", "target_logit", "nll", "entropy", "logp_var", "top1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(N=37, V=2300, D=40, dtype=torch.float32, spread=1.0):
    """hidden, weight, labels, bias; every fifth row ignored. 2,300 columns are two blocks, the second one ragged."""
    hidden = torch.randn(N, D) * spread
    weight, bias = torch.randn(V, D) / D**0.5 * 3, torch.randn(V)
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    return hidden.to(dtype), weight.to(dtype), labels, bias.to(dtype)


def truth(hidden, weight, labels, bias=None, softcap=None, logit_scale=1.0, dtype=torch.float64):
    """The definitions, row by row of [N, V] logits in `dtype`; None where the row is ignored."""
    return truth_of_logits(head_of(hidden, weight, bias, softcap, logit_scale, dtype), labels)


def head_of(hidden, weight, bias=None, softcap=None, logit_scale=1.0, dtype=torch.float64):
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def truth_of_logits(z, labels):
    lse = (z - z.amax(-1, keepdim=True)).exp().sum(-1).log() + z.amax(-1)
    log_p = z - lse[:, None]
    p = log_p.exp()
    target = z[torch.arange(len(z)), labels.clamp(min=0)]
    entropy = -(p * log_p).sum(-1)
    return {
        "lse": lse,
        "target_logit": target,
        "nll": lse - target,
        "entropy": entropy,
        "logp_var": (p * (log_p + entropy[:, None]) ** 2).sum(-1),
        "top1": z.amax(-1),
    }


def assert_within_budget(stats, exact, eager, labels, fields=FIELDS):
    """No further from float64 than twice what the eager computation is, plus rounding of the result itself.

    Moments are joined through the lse of each shard, a float32 number: its rounding counts too.
    """
    valid = labels != -100
    for name in fields:
        error = (getattr(stats, name)[valid].double() - exact[name][valid]).abs().max()
        allowed = 2 * (eager[name][valid].double() - exact[name][valid]).abs().max()
        scale = exact[name][valid].abs().max().clamp(min=1)
        lse = exact["lse"][valid].abs().max() if name in ("entropy", "logp_var") else 0
        allowed += torch.finfo(torch.float32).eps * scale * (4 + lse)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


OPTIONS = [
    {},
    {"bias": True},
    {"softcap": 5.0},
    {"logit_scale": 0.25},
    {"bias": True, "softcap": 30.0, "logit_scale": 1.7},
]


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


# What is held


@pytest.mark.parametrize("impl, holds_logits", [("chunked", False), ("reference", True)])
def test_only_the_reference_holds_logits(impl, holds_logits, largest_tensor, monkeypatch):
    monkeypatch.setattr("tokensel.ops.chunked.WORKSPACE_MIB", 0.25)
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


def test_exact_products_puts_its_flag_back():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(KeyError), exact_products(torch.bfloat16):
        assert matmul.fp32_precision == "bf16"
        raise KeyError
    assert matmul.fp32_precision == before
    with exact_products(torch.float32):
        assert matmul.fp32_precision == before


# Bad input

HIDDEN, WEIGHT = torch.zeros(6, 4), torch.zeros(9, 4)
LABELS = torch.tensor([0, 1, -100, 3, 8, 2])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor; got list"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must have a floating-point dtype; got torch.int64"),
        ({"hidden": torch.zeros(6, 5)}, ValueError, r"D = 4 as in weight \[V, D\]; got \[6, 5\]"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight must have shape \[V, D\]; got \[9\]"),
        ({"weight": WEIGHT.half()}, TypeError, "hidden is torch.float32 but weight is torch.float16"),
        ({"labels": LABELS[:5]}, ValueError, r"labels must have shape \[6\]"),
        ({"labels": LABELS.int()}, TypeError, "labels must be torch.int64; got torch.int32"),
        ({"labels": LABELS.where(LABELS != 3, 9)}, ValueError, r"labels\[3\] is 9, outside \[0, 9\)"),
        ({"labels": LABELS.where(LABELS != 3, -1)}, ValueError, r"labels\[3\] is -1"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta but hidden is on cpu"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor; got NoneType"),
        ({"labels": [0] * 6}, TypeError, "labels must be a torch.Tensor; got list"),
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden must have shape \[..., D\].*; got \[4\]"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \[9\]"),
        ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor; got float"),
        ({"bias": torch.zeros(9).long()}, TypeError, "bias must have a floating-point dtype"),
        ({"bias": torch.zeros(9, device="meta")}, ValueError, "bias is on meta but hidden is on cpu"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive; got 0"),
        ({"softcap": -2.0}, ValueError, "softcap must be positive; got -2"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive; got nan"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib must be positive"),
        ({"workspace_mib": -1}, ValueError, "workspace_mib must be positive"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, chunked, reference, fused; got 'fast'"),
        ({"impl": "fused"}, ValueError, "needs a GPU and the tensors are on cpu; use impl='chunked'"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message, no_interpreter):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | change
    with pytest.raises(error, match=message):
        token_stats(**arguments)


def test_bad_input_of_pairs_and_logits_is_named(no_interpreter):
    with pytest.raises(ValueError, match="history weight has 8 vocabulary rows but current weight has 9"):
        token_stats_pair((HIDDEN, WEIGHT), (HIDDEN, WEIGHT[:8]), LABELS)
    logits = torch.zeros(6, 9)
    with pytest.raises(ValueError, match=r"history_logits must have the shape of logits \[6, 9\]; got \[6, 8\]"):
        token_stats_from_logits(logits, LABELS, logits[:, :8])
    with pytest.raises(ValueError, match=r"labels must have shape \[6\]"):
        token_stats_from_logits(logits, LABELS[:5])
    with pytest.raises(TypeError, match="logits must have a floating-point dtype"):
        token_stats_from_logits(logits.long(), LABELS)
    with pytest.raises(TypeError, match=r"history_logits must be a torch.Tensor; got list"):
        token_stats_from_logits(logits, LABELS, [1.0])
    with pytest.raises(ValueError, match="history_logits is on meta but logits is on cpu"):
        token_stats_from_logits(logits, LABELS, logits.to("meta"))
    with pytest.raises(ValueError, match=r"labels\[0, 1\] is 9, outside \[0, 9\) and not ignore_index=-100"):
        token_stats_from_logits(logits.view(3, 2, 9), torch.tensor([[0, 9], [1, 2], [3, 4]]))
    with pytest.raises(ValueError, match="workspace_mib must be positive"):
        token_stats_from_logits(logits, LABELS, workspace_mib=0)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_does_not_round_what_is_float32_on_purpose(impl):
    hidden, weight, labels, _ = make(dtype=torch.bfloat16)
    q, k = torch.randn(1, 2, 9, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    prompt = torch.arange(9)[None] < 4
    keep = torch.rand(len(labels)) < 0.6

    def everything():
        w = weight.clone().requires_grad_()
        loss = selected_cross_entropy(hidden, w, labels, keep, impl=impl)
        with torch.autocast("cpu", enabled=False):  # where PyTorch wants a backward to be
            loss.backward()
        stats = token_stats(hidden, weight, labels, entropy=True, impl=impl)
        mass = tokensel.prompt_attention_mass(q, k, prompt, impl=impl)
        return [loss.detach(), w.grad, stats.nll, stats.entropy, mass]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


def test_bad_input_of_a_contrast_is_named(no_interpreter):
    hidden, weight, labels, _ = make()
    model = (hidden, weight)
    with pytest.raises(ValueError, match="beta must be finite and not negative; got -1"):
        token_stats_contrast(model, model, labels, beta=-1)
    with pytest.raises(TypeError, match="beta must be a number; got None"):
        token_stats_contrast(model, model, labels, beta=None)
    with pytest.raises(ValueError, match="negative weight has 8 vocabulary rows but positive weight has 2300"):
        token_stats_contrast(model, (hidden, weight[:8]), labels)
    with pytest.raises(TypeError, match="one dtype here; got torch.bfloat16 and torch.float32; cast one"):
        token_stats_contrast(model, (hidden.bfloat16(), weight.bfloat16()), labels)


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda")


def test_a_wrong_label_on_a_device_is_asserted_there_and_named_on_request(monkeypatch):
    labels = torch.tensor([[3, -100], [9, 12]]).as_subclass(Elsewhere)
    monkeypatch.delenv("TOKENSEL_CHECK", raising=False)
    with pytest.raises(RuntimeError, match="labels: outside .0, V. and not ignore_index; TOKENSEL_CHECK=1 names it"):
        check_label_range(labels, 10, -100)  # the CPU's assertion is not asynchronous
    monkeypatch.setenv("TOKENSEL_CHECK", "1")
    with pytest.raises(ValueError, match=r"labels\[1, 1\] is 12, outside \[0, 10\) and not ignore_index=-100"):
        check_label_range(labels, 10, -100)
    check_label_range(labels, 13, -100)
