"""Log-probabilities and entropies with their gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, head_of, make
from torch.utils.flop_counter import FlopCounterMode

from tokensel import selected_cross_entropy, token_logprobs, token_stats

IMPLS = ("chunked", "reference")
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 6.0, "temperature": 2.5},
    {"softcap": 30.0, "logit_scale": 2.0, "temperature": 1.3},
]


def inputs_of(dtype=torch.float32, **sizes):
    hidden, weight, labels, bias = make(dtype=dtype, **sizes)
    return [t.requires_grad_() for t in (hidden, weight, bias)], labels


def definition(inputs, labels, temperature=1.0, softcap=None, logit_scale=1.0, dtype=torch.float64):
    """(log p, entropy) from [N, V] logits, 0 on ignored rows."""
    log_p = torch.log_softmax(head_of(*inputs, softcap, logit_scale, dtype) / temperature, -1)
    valid = labels != -100
    target = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return tuple(torch.where(valid, values, 0) for values in (target, -(log_p.exp() * log_p).sum(-1)))


def all_of(results, inputs, upstream):
    """Values, and the gradients of Σ upstream · value."""
    loss = sum((u * values).sum() for u, values in zip(upstream, results, strict=True))
    return [*(values.detach() for values in results), *torch.autograd.grad(loss, inputs)]


def assert_within_budget(ours, eager, exact, dtype, size):
    """Twice the eager error, a rounding of the result to its type, and of a float32 lse of `size` nats."""
    names = ["log p", "entropy"][: len(ours) - 3] + ["hidden", "weight", "bias"]
    for name, a, b, c in zip(names, ours, eager, exact, strict=True):
        error, largest = (a.double() - c).abs().max(), c.abs().max()
        value = name in ("log p", "entropy")
        allowed = 2 * (b.double() - c).abs().max() + torch.finfo(torch.float32).eps * size * (4 if value else largest)
        allowed += 0 if value else 2 * torch.finfo(dtype).eps * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["log p", "and entropy"])
def test_values_and_gradients_equal_the_definition(entropy, options, dtype, impl):
    inputs, labels = inputs_of(dtype)
    upstream = torch.randn(1 + entropy, len(labels)) * (torch.rand(1 + entropy, len(labels)) < 0.6)
    results = token_logprobs(*inputs[:2], labels, bias=inputs[2], entropy=entropy, impl=impl, **options)
    assert results[0].dtype == torch.float32 and results[0].shape == labels.shape
    assert (results[1] is not None) == entropy
    ours = all_of([values for values in results if values is not None], inputs, upstream)
    exact, eager = (
        all_of(definition(inputs, labels, **options, dtype=d)[: 1 + entropy], inputs, upstream)
        for d in (torch.float64, torch.float32)
    )
    assert_within_budget(ours, eager, exact, dtype, size=float(exact[0].abs().max()) + 10)
    assert (results[0][labels == -100] == 0).all()


def test_gradcheck_in_float64():
    inputs, labels = inputs_of(torch.float64, N=7, V=11, D=5)
    options = {"entropy": True, "softcap": 4.0, "logit_scale": 0.7, "temperature": 1.6}

    def both(hidden, weight, bias):
        return token_logprobs(hidden, weight, labels, bias=bias, **options)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("of", ["log p", "entropy"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_rows_without_an_upstream_gradient_cost_nothing(of, frozen):
    (hidden, weight, _), labels = inputs_of()
    weight.requires_grad_(not frozen)
    results = token_logprobs(hidden, weight, labels, entropy=True)
    upstream = torch.zeros(len(labels))
    upstream[[3, 4, 8]] = torch.tensor([1.0, -2.0, 1e-30])
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as products:
        (results[of == "entropy"] * upstream).sum().backward()
    assert products.get_total_flops() == (2 if frozen else 3) * 2 * 3 * weight.numel()
    assert not hidden.grad[[0, 1, 2, 5, 6, 7]].any() and hidden.grad[[3, 4]].any(1).all()


def test_the_selected_cross_entropy_is_a_sum_of_them():
    inputs, labels = inputs_of(torch.float64)
    weights = torch.randn(len(labels), dtype=torch.float64)
    log_p, _ = token_logprobs(*inputs[:2], labels, bias=inputs[2])
    ours = -(weights * log_p).sum() / 7
    loss = selected_cross_entropy(*inputs[:2], labels, weights, bias=inputs[2], denominator=7)
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(loss, inputs))


def test_a_temperature_divides_the_logits_of_all_statistics():
    inputs, labels = inputs_of(torch.float64)
    hidden, weight, bias = inputs
    tempered = token_stats(hidden, weight, labels, bias=bias, softcap=5.0, temperature=2.0, entropy=True)
    logits = head_of(hidden, weight, bias, softcap=5.0) / 2
    valid = labels != -100
    torch.testing.assert_close(tempered.lse[valid], logits.logsumexp(-1)[valid])
    torch.testing.assert_close(tempered.top1[valid], logits.amax(-1)[valid])
    log_p, entropy = definition(inputs, labels, softcap=5.0, temperature=2.0)
    torch.testing.assert_close(tempered.nll, -log_p)
    torch.testing.assert_close(tempered.entropy, entropy)


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_may_be_anything(impl):
    inputs, labels = inputs_of(torch.float64)
    upstream = torch.randn(2, len(labels))
    exact = all_of(definition(inputs, labels), inputs, upstream)
    with torch.no_grad():
        inputs[0][labels == -100] = torch.nan
    ours = all_of(token_logprobs(*inputs[:2], labels, bias=inputs[2], entropy=True, impl=impl), inputs, upstream)
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_that_cannot_be_has_no_part_in_the_entropy(impl):
    inputs, labels = inputs_of(torch.float64, N=6, V=10, D=4)
    hidden, weight, bias = inputs
    labels, upstream = labels.clamp(max=8), torch.randn(2, 6)
    exact = all_of(definition((hidden, weight[:9], bias[:9]), labels), inputs, upstream)
    with torch.no_grad():
        inputs[2][9] = -torch.inf
    results = token_logprobs(hidden, weight, labels, bias=bias, entropy=True, impl=impl)
    torch.testing.assert_close(all_of(results, inputs, upstream), exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_that_are_aligned_with_the_tokens(impl):
    (hidden, weight, bias), labels = inputs_of(torch.float64, N=24)
    hidden, labels = hidden.view(3, 8, -1), labels.view(3, 8)
    log_p, entropy = token_logprobs(hidden, weight, labels, bias=bias, entropy=True, shift=True, impl=impl)
    aligned = token_logprobs(hidden[:, :-1], weight, labels[:, 1:], bias=bias, entropy=True, impl=impl)
    for ours, expected in zip((log_p, entropy), aligned, strict=True):
        torch.testing.assert_close(ours[:, 1:], expected)
        assert not ours[:, 0].any()
    upstream = torch.randn(3, 8)
    ours, expected = (log_p * upstream).sum(), (aligned[0] * upstream[:, 1:]).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, [hidden, weight, bias]) for loss in (ours, expected)))


@pytest.mark.parametrize("V", [50, 2300], ids=["one block", "two, whose entropies merge"])
def test_a_row_that_overflowed_and_is_masked_harms_nothing(V):
    inputs, labels = inputs_of(torch.float64, V=V)
    hidden, weight, bias = inputs
    rows = torch.arange(len(labels)) != 3
    upstream = torch.randn(2, len(labels)) * rows
    exact = all_of(definition(inputs, labels), inputs, upstream)[2:]
    with torch.no_grad():
        hidden[3] = torch.nan
    results = token_logprobs(hidden, weight, labels, bias=bias, entropy=True)
    loss = sum((torch.where(rows, values, 0) * u).sum() for values, u in zip(results, upstream, strict=True))
    torch.testing.assert_close(list(torch.autograd.grad(loss, inputs)), exact)


def test_statistics_may_be_given_and_have_to_fit():
    (hidden, weight, _), labels = inputs_of()
    stats = token_stats(hidden, weight, labels, entropy=True, temperature=0.7)
    results = token_logprobs(hidden, weight, labels, stats=stats, entropy=True, temperature=0.7)
    expected = token_logprobs(hidden, weight, labels, entropy=True, temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    without = token_stats(hidden, weight, labels)
    for options, message in (
        ({"stats": without, "entropy": True}, "stats have no entropy"),
        ({"stats": without, "shift": True}, "stats are of rows, and shift=True takes labels of tokens"),
        ({"stats": without, "temperature": -1.0}, "temperature must be positive"),
        ({"stats": without, "softcap": -3.0}, "softcap must be positive"),
        ({"stats": token_stats(hidden[1:], weight, labels[1:])}, r"stats.lse must have shape \[37\]"),
    ):
        with pytest.raises(ValueError, match=message):
            token_logprobs(hidden, weight, labels, **options)


def test_a_sequence_of_no_tokens():
    (hidden, weight, _), labels = inputs_of()
    log_p, entropy = token_logprobs(hidden[:0].view(2, 0, 40), weight, labels[:0].view(2, 0), entropy=True, shift=True)
    assert log_p.shape == entropy.shape == (2, 0)


def test_int32_labels_and_a_single_row():
    (hidden, weight, _), labels = inputs_of()
    log_p, _ = token_logprobs(hidden, weight, labels)
    assert torch.equal(token_logprobs(hidden, weight, labels.int())[0], log_p)
    one, entropy = token_logprobs(hidden[3], weight, labels[3], entropy=True)
    assert one.shape == entropy.shape == ()
    torch.testing.assert_close(one, log_p[3])


def test_nothing_to_learn_from_gives_zero_gradients():
    (hidden, weight, bias), labels = inputs_of()
    log_p, entropy = token_logprobs(hidden, weight, torch.full_like(labels, -100), bias=bias, entropy=True)
    (log_p.sum() + entropy.sum()).backward()
    assert not any(t.grad.any() for t in (hidden, weight, bias)) and not log_p.any()


@pytest.mark.parametrize("of", ["log-probabilities", "entropies"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_an_upstream_gradient_that_is_not_finite_is_named(value, of):
    (hidden, weight, _), labels = inputs_of()
    results = token_logprobs(hidden, weight, labels, entropy=True)
    upstream = torch.ones(len(labels))
    upstream[6] = value
    with pytest.raises(ValueError, match=f"the gradient of the {of} is {value} in row 6; it must be finite"):
        results[of == "entropies"].backward(upstream)


def test_bad_input_is_named():
    (hidden, weight, _), labels = inputs_of()
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        token_logprobs(hidden, weight, labels, temperature=0.0)
    with pytest.raises(ValueError, match=r"labels must have shape \[37\]"):
        token_logprobs(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"shift=True takes labels \[..., S\] of sequences"):
        token_logprobs(hidden[3], weight, labels[3], shift=True)
