"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter (small, ragged shapes)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import types

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import tokensel.ops.chunked
import tokensel.ops.loss
import tokensel.ops.stats
import tokensel_kernels.attention_mass
import tokensel_kernels.vocab_grad
import tokensel_kernels.vocab_stats
from tokensel import (
    prompt_attention_mass,
    selected_cross_entropy,
    token_stats,
    token_stats_from_logits,
    token_stats_pair,
)
from tokensel.ops.token_stats import stats_of_sums
from tokensel_kernels import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = ("lse", "target_logit", "nll", "entropy", "logp_var", "top1")


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch):
    """What a kernel does not write is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(torch.nan) if t.is_floating_point() else t

    for module in (tokensel_kernels.attention_mass, tokensel_kernels.vocab_grad, tokensel_kernels.vocab_stats):
        monkeypatch.setattr(module.torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
        monkeypatch.setattr(module.torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def make(N=37, V=150, D=40, dtype=torch.float32):
    """hidden, weight, labels, bias; every fifth row ignored, and a whole tile of rows."""
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    labels[16:32] = -100
    tensors = (torch.randn(N, D), torch.randn(V, D) / D**0.5 * 3, labels, torch.randn(V))
    return [t.to(DEVICE, dtype if t.is_floating_point() else None) for t in tensors]


def head_of(hidden, weight, bias=None, softcap=None, logit_scale=1.0, dtype=torch.float64):
    z = hidden.to(dtype) @ weight.to(dtype).T
    z = (z if bias is None else z + bias.to(dtype)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def truth(hidden, weight, labels, *head, **options):
    return truth_of_logits(head_of(hidden, weight, *head, **options), labels)


def truth_of_logits(z, labels):
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    lse, entropy = z.logsumexp(-1), -(p * log_p).sum(-1)
    target = z.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    variance = (p * (log_p + entropy[:, None]) ** 2).sum(-1)
    return dict(zip(FIELDS, (lse, target, lse - target, entropy, variance, z.amax(-1)), strict=True))


def assert_within_budget(stats, exact, eager, labels, fields=FIELDS):
    valid = labels != -100
    for name in fields:
        error = (getattr(stats, name)[valid].double() - exact[name][valid]).abs().max()
        allowed = 2 * (eager[name][valid].double() - exact[name][valid]).abs().max()
        allowed += 4 * torch.finfo(torch.float32).eps * exact[name][valid].abs().max().clamp(min=1)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    assert (stats.nll[~valid] == 0).all() and (stats.lse[~valid] == -torch.inf).all()


OPTIONS = [{}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "softcap": 20.0, "logit_scale": 0.6}]


# Statistics from hidden states


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
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
    hidden, weight, labels, _ = make(V=700, dtype=torch.bfloat16)
    expected = token_stats(hidden, weight, labels, entropy=True, impl="reference")
    tile = tiles.ProductTile(16, 64, 32, 4, 1, precision="widened", processors=processors)
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_stats, "product_tile", lambda *a: tile)
    stats = token_stats(hidden, weight, labels, entropy=True, impl="fused")
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=2e-6, atol=5e-6)


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


def widened_product(a, b, out):
    return out.copy_(a.float() @ b.float())


@pytest.fixture
def gpu_chunked(monkeypatch):
    """Chunked as it runs on a GPU; without one, around products of the CPU."""
    monkeypatch.setattr(tokensel.ops.chunked, "GPU_COLUMNS", 64)
    if DEVICE == "cpu":
        for module in (tokensel.ops.stats, tokensel.ops.loss):
            monkeypatch.setattr(module, "on_gpu", lambda like: True)
        monkeypatch.setattr(tokensel.ops.chunked, "product", widened_product)
        monkeypatch.setattr(tokensel.ops.chunked, "add_product", lambda total, a, b: total.add_(a.float() @ b.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("workspace_mib", [256, 0.006], ids=["all rows", "blocks of rows"])
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


@pytest.mark.parametrize("V", [63, 64, 65, 129])
def test_library_products_of_several_blocks_of_the_vocabulary(V, gpu_chunked):
    labels = torch.tensor([label for label in (0, 63, 64, 65, 128) if label < V] + [-100], device=DEVICE)
    hidden, weight = torch.randn(len(labels), 12, device=DEVICE), torch.randn(V, 12, device=DEVICE)
    stats = token_stats(hidden, weight, labels, entropy=True, impl="chunked")
    exact, eager = (truth(hidden, weight, labels, dtype=d) for d in (torch.float64, torch.float32))
    assert_within_budget(stats, exact, eager, labels)
    assert token_stats(hidden[:0], weight, labels[:0], impl="chunked").nll.shape == (0,)


@pytest.mark.parametrize("frozen", [False, True], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "logit_scale": 0.7}], ids=str)
def test_gradients_by_library_products(options, dtype, frozen, gpu_chunked, monkeypatch):
    monkeypatch.setattr(tokensel.ops.chunked, "WORKSPACE_MIB", 0.0023)  # blocks of nine rows
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
    assert torch.equal(token_stats_from_logits(wide[:, :333], labels, impl="fused")[0].nll, alone.nll)


# The backward


def gradients(inputs, labels, keep, impl, **options):
    hidden, weight, bias = (t.detach().clone().requires_grad_() for t in inputs)
    loss = selected_cross_entropy(hidden, weight, labels, keep, bias=bias, impl=impl, **options)
    (loss * -1.7).backward()
    return [loss.detach(), hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("weights", ["bool", "real", "one", "all"])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "logit_scale": 0.7}], ids=str)
def test_gradients_of_kept_rows(options, dtype, tma, weights, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_grad, "BLOCK_COLUMNS", 64)  # three blocks of the vocabulary
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=tma, precision="widened")
        for kind in ("gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], dtype.itemsize, small)
    hidden, weight, labels, bias = make(dtype=dtype)
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    keep = {
        "bool": keep,
        "real": torch.randn(len(labels), device=DEVICE) * keep,
        "one": torch.arange(len(labels), device=DEVICE) == 36,
        "all": torch.ones_like(keep),
    }[weights]
    inputs = (hidden, weight, bias)
    ours = gradients(inputs, labels, keep, "fused", **options)
    exact = gradients([t.double() for t in inputs], labels, keep.double(), "reference", **options)
    # products of the logits' gradient take it in the inputs' type, as every mixed-precision training does
    rounding = torch.finfo(dtype).eps
    eager = gradients(inputs, labels, keep, "reference", **options)
    for name, a, b, c in zip(("loss", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + 2 * rounding * c.abs().max()
        if name == "loss":
            allowed += 4 * torch.finfo(torch.float32).eps * 10  # a sum of terms of up to ten nats
        else:
            allowed += rounding * summed_magnitude(name, inputs, labels, keep, exact, **options)
        assert (a.double() - c).abs().max() <= allowed, f"{name}: {(a.double() - c).abs().max():.3g} > {allowed:.3g}"
    dropped = (keep == 0) | (labels == -100)
    assert (ours[1][dropped] == 0).all()
    again = gradients(inputs, labels, keep, "fused", **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def summed_magnitude(name, inputs, labels, keep, exact, softcap=None, logit_scale=1.0):
    """Largest Σ |dz| |factor|, what half a unit of rounding of each dz can at most make of the result."""
    hidden, weight, bias = (t.double() for t in inputs)
    z = (hidden @ weight.T + bias) * logit_scale
    slope = 1.0
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    w = torch.where(labels != -100, keep.double(), 0)
    onehot = torch.zeros_like(z).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    dz = ((z.softmax(-1) - onehot) * (w / w.abs().sum() * 1.7 * logit_scale)[:, None] * slope).abs()
    product = {"hidden": lambda: dz @ weight.abs(), "weight": lambda: dz.T @ hidden.abs(), "bias": lambda: dz.sum(0)}
    return product[name]().max()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_gradients_of_far_off_logits(tma, shift, monkeypatch):
    """What stands past the kept rows and past the vocabulary must not overflow into what is summed."""
    if DEVICE == "cpu":
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=tma, precision="widened")
        for kind in ("gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], 4, small)
    hidden, weight, labels, bias = make()
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    inputs = (hidden, weight, torch.full_like(bias, shift))
    ours, eager = (gradients(inputs, labels, keep, impl)[1:] for impl in ("fused", "reference"))
    exact = gradients([t.double() for t in inputs], labels, keep.double(), "reference")[1:]
    for a, b, c in zip(ours, eager, exact, strict=True):
        spacing = torch.finfo(torch.float32).eps * 1e4  # of the logits and their lse
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 2 * spacing * c.abs().max()


def test_gradients_of_strided_inputs():
    hidden, weight, labels, bias = make()
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    expected = gradients((hidden, weight, bias), labels, keep, "fused")
    every_other = [torch.stack([t, t * 0], -1)[..., 0] for t in (hidden, bias)]
    tall = weight.T.contiguous().T
    assert not (every_other[0].is_contiguous() or every_other[1].is_contiguous() or tall.is_contiguous())
    x, w, b = (t.detach().requires_grad_() for t in (every_other[0], tall, every_other[1]))
    twice = [torch.stack([t, ~t if t.dtype == torch.bool else t * 0], 1)[:, 0] for t in (labels, keep)]
    loss = selected_cross_entropy(x, w, twice[0], twice[1], bias=b, impl="fused")
    (loss * -1.7).backward()
    for ours, theirs in zip((loss.detach(), x.grad, w.grad, b.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias"])
def test_what_is_frozen_is_skipped(frozen):
    hidden, weight, labels, bias = make()
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    full = dict(
        zip(("loss", "hidden", "weight", "bias"), gradients((hidden, weight, bias), labels, keep, "fused"), strict=True)
    )
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        tensor.requires_grad_(name not in frozen.split(" and "))
    loss = selected_cross_entropy(hidden, weight, labels, keep, bias=bias, impl="fused")
    (loss * -1.7).backward()
    for name, tensor in named.items():
        assert tensor.grad is None if name in frozen.split(" and ") else torch.equal(tensor.grad, full[name])


def test_no_rows_at_all_have_zero_gradients():
    hidden, weight, labels, bias = make()
    none = torch.zeros(0, dtype=torch.bool, device=DEVICE)
    for value in gradients((hidden[:0], weight, bias), labels[:0], none, "fused"):
        assert (value == 0).all()


def test_nothing_kept_has_zero_gradients_and_dropped_rows_are_never_read():
    hidden, weight, labels, bias = make()
    keep = torch.zeros(len(labels), dtype=torch.bool, device=DEVICE)
    for value in gradients((hidden, weight, bias), labels, keep, "fused"):
        assert (value == 0).all()
    keep[33] = True
    expected = gradients((hidden, weight, bias), labels, keep, "fused")
    stats = token_stats(hidden, weight, labels, bias=bias, impl="fused")
    hidden[:33] = torch.nan
    weight.requires_grad_()
    (selected_cross_entropy(hidden, weight, labels, keep, stats=stats, bias=bias, impl="fused") * -1.7).backward()
    assert torch.equal(weight.grad, expected[2])


# Attention mass


def attention_inputs(names, dtype, d=24, Hq=6, Hk=2, S=41, B=2):
    q, k = (torch.randn(B, H, S, d, device=DEVICE).to(dtype) * 2 for H in (Hq, Hk))
    position = torch.arange(S, device=DEVICE).expand(B, S)
    prompt = (position % 17) < 8
    options = {
        "key_mask": torch.stack([position[0] >= 5, position[1] < 35]),
        "segment_ids": torch.stack([(position[0] >= 20).long(), (position[1] >= 9).long() + (position[1] >= 30)]),
        "turn_ids": torch.diff(prompt.long(), prepend=prompt[:, :1].long()).abs().cumsum(-1),
        "query_mask": torch.rand(B, S, device=DEVICE) < 0.7,
        "window": 12,
        "softcap": 3.0,
        "scale": 0.4,
        "sinks": torch.randn(Hq, device=DEVICE) * 2,
    }
    return q, k, prompt, {name: options[name] for name in names}


def lse_of(q, k, prompt, key_mask=None, segment_ids=None, window=None, scale=None, softcap=None, **_):
    S = q.shape[2]
    i, j = torch.arange(S, device=DEVICE)[:, None], torch.arange(S, device=DEVICE)[None]
    sees = ((j <= i) & (i - j < (window or S)))[None]
    sees = sees & (torch.ones_like(prompt) if key_mask is None else key_mask)[:, None]
    if segment_ids is not None:
        sees = sees & (segment_ids[:, :, None] == segment_ids[:, None])
    z = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    z = z * (scale or q.shape[-1] ** -0.5)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z.masked_fill(~sees[:, None], -torch.inf).logsumexp(-1)


NAMES = ("key_mask", "segment_ids", "turn_ids", "query_mask", "window", "softcap", "scale", "sinks")


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("names", [(), NAMES, *itertools.combinations(NAMES, 2)], ids="+".join)
def test_mass_under_every_pair_of_options(names, given_lse):
    q, k, prompt, options = attention_inputs(names, torch.float32)
    exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference", **options)
    lse = lse_of(q, k, prompt, **options).float() if given_lse else None
    mass = prompt_attention_mass(q, k, prompt, lse=lse, impl="fused", **options)
    torch.testing.assert_close(mass, exact.float(), rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_is_as_exact_as_eager_float32(dtype):
    q, k, prompt, options = attention_inputs(("key_mask", "softcap"), dtype)
    exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference", **options)
    eager = prompt_attention_mass(q, k, prompt, impl="reference", **options)
    mass = prompt_attention_mass(q, k, prompt, impl="fused", **options)
    eps = torch.finfo(torch.float32).eps
    assert (mass - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2 * eps


@pytest.mark.parametrize("Hq, Hk", [(1, 1), (4, 4), (6, 2), (8, 1), (7, 7), (5, 1)])
@pytest.mark.parametrize("d", [8, 64, 96, 256])
def test_head_sizes_and_groups(Hq, Hk, d):
    q, k, prompt, options = attention_inputs(("key_mask",), torch.float32, d, Hq, Hk)
    exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference", **options)
    mass = prompt_attention_mass(q, k, prompt, impl="fused", **options)
    torch.testing.assert_close(mass, exact.float(), rtol=5e-6, atol=1e-6)


def test_mass_of_strided_inputs_and_what_padding_holds():
    q, k, prompt, options = attention_inputs(("key_mask",), torch.bfloat16)
    expected = prompt_attention_mass(q, k, prompt, impl="fused", **options)
    padding = ~options["key_mask"]
    q[padding[:, None].expand(q.shape[:3])] = torch.nan
    k[padding[:, None].expand(k.shape[:3])] = torch.nan
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    assert torch.equal(prompt_attention_mass(q, k, prompt, impl="fused", **options), expected)


# Labels that no logit has


OUTSIDE = (-7, -1, 150, 151, 10_000, 2**40, -(2**40))


def surrounded(t):
    """The tensor inside a wider one that is NaN (a label: 3) around it, so that what is read beside it shows."""
    wide = torch.full((t.shape[0] + 64, *t.shape[1:]), torch.nan if t.is_floating_point() else 3, device=DEVICE)
    wide = wide.to(t.dtype)
    wide[32:-32] = t
    return wide[32:-32]


def test_a_label_outside_the_vocabulary_reads_nothing_and_has_no_likelihood():
    hidden, weight, _, bias = (surrounded(t) for t in make(N=len(OUTSIDE) + 1))
    labels = surrounded(torch.tensor([*OUTSIDE, 149], device=DEVICE))
    old_hidden, old_weight = (surrounded(t) for t in make(N=len(labels), D=24)[:2])
    models = [(hidden, weight), (old_hidden, old_weight)]
    head = {"bias": bias, "softcap": None, "logit_scale": 1.0, "entropy": False, "ignore_index": -100}
    logits = [surrounded(x @ w.T) for x, w in models]
    of_logits = torch.full((3, 2, 1, len(labels)), torch.nan, device=DEVICE)
    tokensel_kernels.vocab_stats.write_logits_sums(logits, labels, of_logits[:, :, 0], bias=bias, ignore_index=-100)
    z, old = (z + bias for z in logits)
    for sums, expected in (
        (tokensel_kernels.vocab_stats.hidden_sums(models, labels, **head), (z, old)),
        (of_logits, (z, old)),
    ):
        for stats, truly in zip(stats_of_sums(sums, labels, -100), expected, strict=True):
            torch.testing.assert_close(stats.lse, truly.logsumexp(-1))
            assert (stats.nll[:-1] == torch.inf).all() and stats.nll[-1].isfinite()


def test_the_gradient_of_a_label_outside_the_vocabulary_has_no_one_hot():
    hidden, weight, _, bias = (surrounded(t) for t in make(N=len(OUTSIDE)))
    labels, coefficient = surrounded(torch.tensor(OUTSIDE, device=DEVICE)), torch.ones(len(OUTSIDE), device=DEVICE)
    z = hidden @ weight.T + bias
    lse, p = z.logsumexp(-1), z.softmax(-1)
    head = {"bias": bias, "softcap": None, "logit_scale": 1.0}
    found = tokensel_kernels.vocab_grad.selected_gradients(
        hidden, weight, labels, coefficient, lse, want=(True, True, True), **head
    )
    for ours, truly in zip(found, (p @ weight, p.T @ hidden, p.sum(0)), strict=True):
        torch.testing.assert_close(ours, truly, rtol=1e-5, atol=1e-5)
    dz = torch.full_like(z, torch.nan)
    products = surrounded(hidden @ weight.T)
    tokensel_kernels.vocab_grad.write_block_gradient(products, labels, coefficient, lse, dz, first_column=0, **head)
    torch.testing.assert_close(dz, p)


# The host does not wait


class NoWaiting(TorchDispatchMode):
    """Refuses operators whose result the host has to wait for on a GPU: a value, or a shape that depends on values."""

    REFUSED = {
        "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "nonzero_numpy", "masked_select", "unique",
        "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere",
        "lift_fresh",  # torch.tensor(a number): copied to the device, and waited for
    }  # fmt: skip
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.REFUSED:
            raise AssertionError(f"the host waits for {function}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise AssertionError(f"the host waits for {function} by a mask")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise AssertionError(f"the host waits for {function}")
        self.seen += 1
        return function(*args, **(kwargs or {}))


def _tolist(tensor):
    raise AssertionError("the host waits for tolist")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The way of a GPU: checks are asynchronous, and a launch, in the interpreter many operators, is none."""
    monkeypatch.setattr("tokensel.ops.checks.may_read_values", lambda like: False)
    monkeypatch.setattr("tokensel.select.method.may_read_values", lambda like: False)
    monkeypatch.setattr(torch.Tensor, "tolist", _tolist)  # which no dispatcher sees
    if DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def alone(self, *args, **kwargs):
            with _disable_current_modes():
                return launch(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", alone)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_the_host_waits_for_nothing(tma, on_a_gpu, monkeypatch):
    from tokensel import TokenSignals, methods, uniform_prompt_mass

    if DEVICE == "cpu":
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=tma, precision="widened")
        for kind in ("stats", "full_stats", "gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], 2, small)
    hidden, weight, labels, bias = make(dtype=torch.bfloat16)
    old = make(D=24, dtype=torch.bfloat16)[:2]
    q, k, prompt, options = attention_inputs(NAMES, torch.bfloat16, S=len(labels))
    q, k, prompt = q[:1], k[:1], prompt[:1]
    sample, response = torch.arange(len(labels), device=DEVICE) // 12 * 12, labels != -100
    for name in ("key_mask", "segment_ids", "turn_ids"):
        options[name] = options[name][:1]
    options["query_mask"] = response[None]
    masks = {name: options[name] for name in ("key_mask", "segment_ids", "turn_ids", "window")}
    trained = [t.requires_grad_() for t in (hidden, weight, bias)]
    head = {"bias": bias, "softcap": 20.0, "impl": "fused"}
    with NoWaiting() as mode:
        now, before = token_stats_pair((hidden, weight), old, labels, entropy=True, **head)
        token_stats_from_logits((hidden @ weight.T).detach(), labels, impl="fused")
        signals = {"nll": now.nll, "history_nll": before.nll}
        mass = prompt_attention_mass(q, k, prompt, impl="fused", **options)[0]
        signals |= {"mass": mass, "uniform_mass": uniform_prompt_mass(prompt, **masks)[0]}
        signals = TokenSignals(response, sample, **signals)
        keep = methods.get("sstoken", debias="uniform")(signals)
        loss = selected_cross_entropy(hidden, weight, labels, keep, stats=now, denominator=7.0, **head)
        loss = loss + selected_cross_entropy(hidden, weight, labels, keep.float() * -0.5, stats=now, **head)
        (loss * 3).backward()
    assert all(t.grad.isfinite().all() for t in trained) and mode.seen > 100


def test_what_would_make_the_host_wait_is_refused(on_a_gpu):
    x = torch.arange(4.0, device=DEVICE)
    waits = [
        lambda: x.sum().item(), lambda: bool((x > 1).any()), lambda: x[x > 1], lambda: x.nonzero(),
        lambda: x.masked_select(x > 1), lambda: x.index_put_((x > 1,), -x[:2]), lambda: torch.equal(x, x),
        lambda: torch.tensor(2.0), lambda: x.long().bincount(), lambda: x.tolist(), lambda: x.unique(),
    ]  # fmt: skip
    for wait in waits:
        with pytest.raises(AssertionError, match="the host waits for"), NoWaiting():
            wait()
    hidden, weight, labels, _ = make()
    hidden.requires_grad_()
    keep = labels != -100
    with pytest.raises(AssertionError, match="nonzero"), NoWaiting():  # the CPU's way gathers rows
        selected_cross_entropy(hidden, weight, labels, keep, impl="chunked").backward()


# The choice


def test_bad_choices_are_named(no_interpreter, monkeypatch):
    hidden, weight, labels, _ = make()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="impl='fused' needs a GPU .* TRITON_INTERPRET=1"):
            token_stats(hidden, weight, labels, impl="fused")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="takes float16, bfloat16 or float32, not torch.float64; use impl='chunked'"):
        token_stats(hidden.double(), weight.double(), labels, impl="fused")
    wide = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(ValueError, match="takes head sizes up to 256 .64, 96, .*; q has 257; use impl='chunked'"):
        prompt_attention_mass(wide, wide, torch.zeros(1, 2, dtype=torch.bool, device=DEVICE), impl="fused")
    monkeypatch.setattr("tokensel.ops.checks.HAS_TRITON", False)
    with pytest.raises(ImportError, match="pip install triton; or use impl='chunked'"):
        token_stats(hidden, weight, labels, impl="fused")


def test_a_chip_that_is_too_old_is_named(no_interpreter, monkeypatch):
    chip = {"name": "Tesla V100", "major": 7, "minor": 0, "multi_processor_count": 80}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**chip))
    tiles._gpu_family.cache_clear()
    with pytest.raises(ValueError, match="compute capability 8.0 or newer; Tesla V100 has 7.0; use impl='chunked'"):
        tiles.chip_family(torch.device("cuda", 0))
    for major, family in ((8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (12, "sm_80")):
        tiles._gpu_family.cache_clear()
        chip["major"] = major
        assert tiles.chip_family(torch.device("cuda", 0)) == (family, 80)
    tiles._gpu_family.cache_clear()


@pytest.mark.parametrize("rows", [0.0, 0.99])
def test_a_workspace_that_holds_no_row_is_named(rows, gpu_chunked):
    hidden, weight, labels, _ = make()
    row = 2 * 64 * 4 / 2**20  # two models' 64 columns of float32
    common = {"impl": "chunked", "workspace_mib": row * rows or 1e-9}
    with pytest.raises(ValueError, match="holds no row of 2 x 64 float32 logits; it needs at least 0.0010"):
        token_stats_pair((hidden, weight), (hidden, weight), labels, **common)


# The table of tiles


def test_tiles_are_written_as_they_are_read(tmp_path):
    shipped = tiles.read_tiles(tiles.SHIPPED)
    assert set(shipped) == set(tiles.FAMILIES) and all(set(kinds) == set(tiles.KINDS) for kinds in shipped.values())
    tiles.write_tiles(tmp_path / "again.json", shipped)
    assert (tmp_path / "again.json").read_text() == tiles.SHIPPED.read_text()


def test_a_file_of_tiles_goes_before_the_table(tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    mine = tiles.ProductTile(64, 128, 64, 4, 5, tma=True)
    tiles.write_tiles(file, {"sm_90": {"stats": {2: mine}}})
    monkeypatch.setenv("TOKENSEL_TILES", str(file))
    table, shipped = tiles._load(), tiles.read_tiles(tiles.SHIPPED)
    assert table["sm_90"]["stats"] == {2: mine, 4: shipped["sm_90"]["stats"][4]}
    assert table["sm_90"]["matmul"] == shipped["sm_90"]["matmul"] and table["sm_80"] == shipped["sm_80"]
    monkeypatch.delenv("TOKENSEL_TILES")
    assert tiles._load()["sm_90"] == shipped["sm_90"]


GOOD = {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3, "tma": False}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read"),
        ("[]", r"a family must be of sm_80, sm_90, sm_100, gfx942; got \[\]"),
        ({"sm_12": {}}, "a family must be of sm_80, .*; got {'sm_12'"),
        ({"sm_90": {"stat": {}}}, "a kind of sm_90 must be of stats, full_stats, .*; got {'stat'"),
        ({"sm_90": {"stats": {"bf16": GOOD}}}, "a size of sm_90 stats must be of half, float32; got {'bf16'"),
        ({"sm_90": {"stats": {"half": {"rows": 64}}}}, "sm_90 stats half must be all of rows, columns, depth, warps"),
        ({"sm_90": {"attention": {"half": GOOD}}}, "sm_90 attention half must be all of rows, keys, warps, stages;"),
        (
            {"sm_90": {"stats": {"half": GOOD | {"rows": 96}}}},
            "rows of .* must be a power of two; got 96",
        ),
        ({"sm_90": {"stats": {"half": GOOD | {"depth": 8}}}}, "depth of sm_90 stats half must be at least 16; got 8"),
        ({"sm_90": {"stats": {"half": GOOD | {"warps": 0}}}}, "warps .* a positive whole number; got 0"),
        ({"sm_90": {"stats": {"half": GOOD | {"stages": "3"}}}}, "stages .* a positive whole number; got '3'"),
        ({"sm_90": {"stats": {"half": GOOD | {"tma": 1}}}}, "tma of sm_90 stats half must be true or false; got 1"),
        ({"sm_80": {"stats": {"half": GOOD | {"tma": True}}}}, "tma of sm_80 .* false: the chip has no such unit"),
        (
            {"sm_90": {"matmul": {"half": GOOD | {"depth": 256}}}},
            "depth of sm_90 matmul half must be a divisor",
        ),
    ],
)
def test_a_bad_file_of_tiles_is_named(content, message, tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("TOKENSEL_TILES", str(file))
    with pytest.raises(ValueError, match=f"tiles of .*mine.json.*{message}"):
        tiles._load()
    file.unlink()
    with pytest.raises(ValueError, match="mine.json cannot be read: .*No such file"):
        tiles._load()


def test_tuning_takes_the_fastest_tile_that_runs(tmp_path, monkeypatch):
    from triton.runtime.errors import OutOfResources

    from tokensel_kernels import tune

    family = tiles.chip_family(torch.device(DEVICE))[0]
    start = tiles.ProductTile(16, 64, 16, 4, 3, precision="widened")
    table = {kind: {4: start} for kind in tiles.KINDS}
    table["attention"] = {4: tiles.AttentionTile(16, 16, 4, 1, "widened")}
    monkeypatch.setitem(tiles.TILES, family, table)
    timed = tune.calls(20, 70, 24, 8, torch.float32, DEVICE)
    once, said = set(timed), []

    def milliseconds(call):  # rows of 32, few stages and depths of 64 are fast, but attention holds no more than 16
        kind = next(kind for kind in timed if timed[kind] is call)
        if kind in once:
            once.remove(kind), call()
        tile = table[kind][4]
        if kind == "attention" and tile.rows > 16:
            raise OutOfResources(1, 2, "shared memory")
        return abs(tile.rows - 32) / 16 + tile.stages + abs(getattr(tile, "depth", 64) - 64) / 16

    timed = {kind: (lambda call=call: call()) for kind, call in timed.items()}  # two kinds have one call
    found = tune.tune(timed, family, 4, milliseconds=milliseconds, tell=said.append)[family]
    assert not once and set(found) == set(tiles.KINDS)
    best = dataclasses.replace(start, rows=32, depth=64, stages=1)
    for kind in ("stats", "full_stats", "gradient"):
        assert found[kind][4] == best == table[kind][4]
    assert found["matmul"][4] == dataclasses.replace(best, depth=32)  # gradients of 32 rows are zero no further
    assert found["attention"][4].rows == 16
    assert any("attention: AttentionTile(rows=32" in line and "does not run: out of resource" in line for line in said)
    tiles.write_tiles(tmp_path / "tuned.json", {"sm_90": found})
    written = tiles.read_tiles(tmp_path / "tuned.json")["sm_90"]
    assert written["stats"][4] == dataclasses.replace(best, precision="ieee")


def test_a_tile_of_the_table_that_does_not_run_is_an_error(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from tokensel_kernels import tune

    def fail(error):
        raise error

    family = tiles.chip_family(torch.device(DEVICE))[0]
    timed = {"stats": lambda: None}
    with pytest.raises(RuntimeError, match="the table's own tile of stats, ProductTile.* does not run"):
        tune.tune(timed, family, 4, milliseconds=lambda call: fail(OutOfResources(1, 2, "shared memory")))
    with pytest.raises(RuntimeError, match="an illegal memory access"):  # not the tile's fault
        tune.tune(timed, family, 4, milliseconds=lambda call: fail(RuntimeError("an illegal memory access")))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_tuning_needs_a_gpu(tmp_path, capsys):
    from tokensel.cli import main

    assert main(["tune", "--output", str(tmp_path / "mine.json")]) == 2
    assert "tokensel tune times kernels on the GPU at hand, and PyTorch finds none" in capsys.readouterr().err
    (tmp_path / "mine.json").touch()
    assert main(["tune", "--output", str(tmp_path / "mine.json")]) == 2
    assert "mine.json exists; move it away" in capsys.readouterr().err


# The whole step


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_training_step_with_the_kernels_is_the_reference_step(family, layout):
    tiny = pytest.importorskip("tiny")
    from tokensel import Selection, apply_to, methods

    batch = getattr(tiny, layout)(tiny.samples())
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    history = torch.rand(batch["labels"].shape, device=DEVICE) * 4
    results = []
    for impl in ("fused", "reference"):
        model = tiny.causal_lm(family, torch.float32).to(DEVICE)
        apply_to(model)
        out = model(**batch, history_nll=history, selection=Selection(methods.get("sstoken"), impl=impl))
        out.loss.backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (ours, gradients_ours), (reference, gradients_reference) = results
    assert torch.equal(ours.weights, reference.weights)
    for name in ("loss", "nll", "score", "mass"):
        torch.testing.assert_close(getattr(ours, name), getattr(reference, name), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradients_ours, gradients_reference, rtol=1e-3, atol=1e-6)
