"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter (small, ragged shapes)."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE, gradients, make, summed_magnitude
from oracles import DTYPES

import tokensel_kernels.attention_mass
import tokensel_kernels.vocab_grad
import tokensel_kernels.vocab_stats
from tokensel import (
    selected_cross_entropy,
    token_stats,
)
from tokensel_kernels import tiles

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")


# The backward


WEIGHTS, OPTIONS = ("bool", "real", "one", "all"), ({}, {"softcap": 6.0, "logit_scale": 0.7})
# every type with every kind of weights; among these any two of type, weights, options and way of loading meet
CASES = [
    pytest.param(dtype, weights, OPTIONS[(d + w) % 2], (d + w // 2) % 2 == 1, id=f"{dtype}-{weights}")
    for d, dtype in enumerate(DTYPES)
    for w, weights in enumerate(WEIGHTS)
]


@pytest.mark.parametrize("dtype, weights, options, tma", CASES)
def test_gradients_of_kept_rows(dtype, weights, options, tma, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_grad, "BLOCK_BYTES", 1)  # three blocks of the vocabulary
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
    # a logit z in float32 is off by eps |z|, and exp(z - lse) by that share of itself
    logit = float((hidden.double() @ weight.double().T + bias.double()).abs().max())
    share = rounding + torch.finfo(torch.float32).eps * logit
    eager = gradients(inputs, labels, keep, "reference", **options)
    for name, a, b, c in zip(("loss", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + 2 * rounding * c.abs().max()
        if name == "loss":
            allowed += 4 * torch.finfo(torch.float32).eps * 10  # a sum of terms of up to ten nats
        else:
            allowed += share * summed_magnitude(name, inputs, labels, keep, exact, **options)
        assert (a.double() - c).abs().max() <= allowed, f"{name}: {(a.double() - c).abs().max():.3g} > {allowed:.3g}"
    dropped = (keep == 0) | (labels == -100)
    assert (ours[1][dropped] == 0).all()
    again = gradients(inputs, labels, keep, "fused", **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


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
