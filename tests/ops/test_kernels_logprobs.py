"""Log-probabilities and entropies by the kernels, with gradients: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE, make
from oracles import DTYPES

import tokensel_kernels.vocab_grad
from tokensel import selected_cross_entropy, token_logprobs
from tokensel_kernels import tiles
from tokensel_kernels.gather_rows import gather_rows

pytest.importorskip("triton.language")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")

# any two of type, options and way of loading meet
CASES = [
    (torch.float32, {}, True),
    (torch.bfloat16, {"temperature": 0.6}, False),
    (torch.float16, {"softcap": 6.0, "temperature": 1.7}, True),
    (torch.float32, {"softcap": 6.0, "logit_scale": 0.7}, False),
    (torch.bfloat16, {"softcap": 50.0}, True),
    (torch.float16, {}, False),
]


def all_of(inputs, labels, upstream, impl, **options):
    """log p, entropy, and the gradients of Σ upstream · value in hidden, weight and bias."""
    hidden, weight, bias = (t.detach().clone().requires_grad_() for t in inputs)
    results = token_logprobs(hidden, weight, labels, bias=bias, entropy=True, impl=impl, **options)
    sum((u * values).sum() for u, values in zip(upstream, results, strict=True)).backward()
    return [*(values.detach() for values in results), hidden.grad, weight.grad, bias.grad]


def check(inputs, labels, upstream, dtype, impl, **options):
    """Against float64, in units of what rounding each element of the logits' gradient may make of the result."""
    ours = all_of(inputs, labels, upstream, impl, **options)
    wide = [t.double() for t in inputs]
    exact = all_of(wide, labels, upstream, "reference", **options)
    eager = all_of(inputs, labels, upstream, "reference", **options)
    logits = (wide[0] @ wide[1].T + wide[2]) / options.get("temperature", 1.0)
    single, rounding = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    # dz of a row is at most |of log p| (1 + p) + |of the entropy| p (|log p| + H), and p |log p| at most 1 / e
    dz = upstream[0].abs() * 2 + upstream[1].abs() * (1 + exact[1])
    dz = torch.where(labels != -100, dz, 0).double() / options.get("temperature", 1.0)
    share = rounding + single * float(logits.abs().max()) * 4
    bound = {"hidden": dz.max() * wide[1].abs().max(), "weight": dz @ wide[0].abs().amax(1), "bias": dz.sum()}
    for name, a, b, c in zip(("log p", "entropy", *bound), ours, eager, exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + 2 * (rounding if name in bound else single * 10) * c.abs().max()
        allowed += share * bound[name] if name in bound else 0
        assert (a.double() - c).abs().max() <= allowed, f"{name}: {(a.double() - c).abs().max():.3g} > {allowed:.3g}"
    return ours


def small_tiles(monkeypatch, dtype, tma):
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_grad, "BLOCK_BYTES", 1)  # blocks of the vocabulary
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=tma, precision="widened")
        for kind in ("gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], dtype.itemsize, small)


def some_rows(labels):
    """Upstream gradients (2, N): of both, of one, of the other, of none."""
    upstream = torch.randn(2, len(labels), device=DEVICE)
    upstream[0, ::3] = 0
    upstream[1, ::2] = 0
    return upstream


@pytest.mark.parametrize("dtype, options, tma", CASES, ids=str)
def test_fused_equals_the_definition(dtype, options, tma, monkeypatch):
    small_tiles(monkeypatch, dtype, tma)
    hidden, weight, labels, bias = make(dtype=dtype)
    upstream = some_rows(labels)
    ours = check((hidden, weight, bias), labels, upstream, dtype, "fused", **options)
    untouched = ((upstream == 0).all(0)) | (labels == -100)
    assert untouched.any() and not ours[2][untouched].any()
    again = all_of((hidden, weight, bias), labels, upstream, "fused", **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "temperature": 1.7}], ids=str)
def test_chunked_on_a_gpu_equals_the_definition(dtype, options, gpu_chunked):
    hidden, weight, labels, bias = make(dtype=dtype)
    check((hidden, weight, bias), labels, some_rows(labels), dtype, "chunked", **options)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_far_off_logits_and_tokens_that_cannot_be(shift, tma, monkeypatch):
    small_tiles(monkeypatch, torch.float32, tma)
    hidden, weight, labels, bias = make()
    bias = torch.full_like(bias, shift)
    bias[::7] = -torch.inf
    labels = torch.where((labels >= 0) & (labels % 7 == 0), labels + 1, labels)
    for value in all_of((hidden, weight, bias), labels, some_rows(labels), "fused"):
        assert value.isfinite().all()


def test_rows_that_have_other_terms_to_learn_from_are_gathered_too():
    hidden, _, labels, _ = make(N=40, D=24)
    coefficient, lse = torch.zeros(2, 40, device=DEVICE)
    terms = torch.zeros(3, 40, device=DEVICE)
    coefficient[3], terms[0, [3, 17]], terms[1, [17, 38]], terms[2, 39] = 1.0, 2.0, 3.0, 4.0
    kept = gather_rows(hidden, labels, coefficient, lse, 150, 1.0, 16, terms)
    assert kept.count.tolist() == [4] and torch.equal(kept.x[:4], hidden[[3, 17, 38, 39]])
    assert kept.terms[:, :4].tolist() == [[2, 2, 0, 0], [0, 3, 3, 0], [0, 0, 0, 4]]


def losses_of(inputs, labels, keep, impl, **options):
    """A smoothed loss of each row with z-loss, and its gradients."""
    hidden, weight, bias = inputs = [t.detach().clone().requires_grad_() for t in inputs]
    terms = {"label_smoothing": 0.2, "z_loss": 0.01, "reduction": "none"}
    losses = selected_cross_entropy(hidden, weight, labels, keep, bias=bias, impl=impl, **terms, **options)
    losses.sum().backward()
    return [losses.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options, tma", [({}, True), ({"softcap": 6.0, "logit_scale": 0.7}, False)], ids=str)
@pytest.mark.parametrize("impl", ["fused", "chunked"])
def test_smoothed_labels_and_z_loss(impl, options, tma, dtype, monkeypatch, request):
    if impl == "fused":
        small_tiles(monkeypatch, dtype, tma)
    else:
        request.getfixturevalue("gpu_chunked")
    hidden, weight, labels, bias = make(dtype=dtype)
    keep = torch.randn(len(labels), device=DEVICE)
    keep[::3] = 0
    ours = losses_of((hidden, weight, bias), labels, keep, impl, **options)
    wide = [t.double() for t in (hidden, weight, bias)]
    exact = losses_of(wide, labels, keep, "reference", **options)
    eager = losses_of((hidden, weight, bias), labels, keep, "reference", **options)
    single, rounding = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    logit = (wide[0] @ wide[1].T + wide[2]).abs().max()
    # dz of a row is at most |keep| (2 + twice the z-loss' lse)
    dz = torch.where(labels != -100, keep.abs() * (2 + 0.02 * logit), 0).double()
    share = rounding + single * float(logit) * 4
    bound = {"hidden": dz.max() * wide[1].abs().max(), "weight": dz @ wide[0].abs().amax(1), "bias": dz.sum()}
    for name, a, b, c in zip(("loss", *bound), ours, eager, exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + 2 * (rounding if name in bound else single * 10) * c.abs().max()
        allowed += share * bound[name] if name in bound else 0
        assert (a.double() - c).abs().max() <= allowed, f"{name}: {(a.double() - c).abs().max():.3g} > {allowed:.3g}"
    assert not ours[1][(keep == 0) | (labels == -100)].any()
