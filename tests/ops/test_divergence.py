"""Divergence of a student from a teacher, with its gradient, against float64."""

from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, head_of
from torch.utils.flop_counter import FlopCounterMode

from tokensel import token_divergence, token_stats

KINDS = ("forward_kl", "reverse_kl", "jsd", "tv")
IMPLS = ("chunked", "reference")


def make(N=21, V=2300, D=24, teacher_D=40, dtype=torch.float32, spread=1.0):
    """student's hidden, weight and bias; teacher's hidden and weight; mask."""
    tensors = torch.randn(N, D), torch.randn(V, D) / D**0.5 * 3, torch.randn(V)
    teacher = torch.randn(N, teacher_D) * spread, torch.randn(V, teacher_D) / teacher_D**0.5 * 3
    mask = torch.arange(N) % 4 != 0
    return [t.to(dtype).requires_grad_() for t in tensors], [t.to(dtype) for t in teacher], mask


def definition(inputs, teacher, kind, beta=0.5, temperature=1.0, softcap=None, logit_scale=1.0, dtype=torch.float64):
    """Σ over the vocabulary, by the formulas."""
    p = (head_of(*inputs, softcap, logit_scale, dtype) / temperature).softmax(-1)
    q = (head_of(*teacher, None, softcap, logit_scale, dtype) / temperature).softmax(-1)
    kl = lambda a, b: torch.where(a > 0, a * (a / b).log(), 0).sum(-1)  # noqa: E731
    m = beta * q + (1 - beta) * p
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "tv": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


def all_of(values, inputs, upstream):
    return [values.detach(), *torch.autograd.grad((values * upstream).sum(), inputs)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "logit_scale": 0.7, "temperature": 1.8}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_definition(kind, options, dtype, impl):
    inputs, teacher, mask = make(dtype=dtype)
    upstream = torch.randn(len(mask)) * (torch.rand(len(mask)) < 0.7) * mask
    hidden, weight, bias = inputs
    values = token_divergence((hidden, weight), teacher, mask, kind=kind, bias=bias, impl=impl, **options)
    assert values.dtype == torch.float32 and (values[~mask] == 0).all() and (values >= -1e-5).all()
    ours = all_of(values, inputs, upstream)
    exact, eager = (
        all_of(definition(inputs, teacher, kind, **options, dtype=d) * mask, inputs, upstream)
        for d in (torch.float64, torch.float32)
    )
    logits = float(exact[0].max()) + 20
    for name, a, b, c in zip(("value", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        error, largest = (a.double() - c).abs().max(), c.abs().max()
        allowed = (
            2 * (b.double() - c).abs().max() + torch.finfo(torch.float32).eps * logits * max(float(largest), 1) * 4
        )
        allowed += 0 if name == "value" else 2 * torch.finfo(dtype).eps * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradcheck_in_float64(kind):
    inputs, teacher, mask = make(N=6, V=11, D=5, teacher_D=3, dtype=torch.float64)

    def values(hidden, weight, bias):
        return token_divergence((hidden, weight), teacher, mask, kind=kind, bias=bias, beta=0.3, softcap=4.0)

    assert torch.autograd.gradcheck(values, inputs)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_the_mixture_leans_to_either_side(beta):
    inputs, teacher, mask = make(dtype=torch.float64)
    values = token_divergence(inputs[:2], teacher, mask, kind="jsd", beta=beta, bias=inputs[2])
    torch.testing.assert_close(values, definition(inputs, teacher, "jsd", beta) * mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_does_not_differ_from_itself(kind):
    (hidden, weight, _), _, mask = make(dtype=torch.float64)
    values = token_divergence((hidden, weight), (hidden, weight), mask, kind=kind)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(values.sum(), (hidden, weight))
    assert all(float(g.abs().max()) < 1e-10 for g in gradients)


def test_a_teacher_that_is_sure_is_a_label():
    """KL(q, p) of a one-hot q is the label's nll."""
    (hidden, weight, _), _, mask = make(V=50, dtype=torch.float64)
    labels = torch.randint(0, 50, (len(mask),))
    sure = torch.nn.functional.one_hot(labels, 50).double() * 1e4, torch.eye(50).double()
    values = token_divergence((hidden, weight), sure, mask)
    torch.testing.assert_close(values[mask], token_stats(hidden, weight, labels).nll[mask])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_neither_can_say_have_no_part(kind, impl):
    inputs, teacher, mask = make(V=40, dtype=torch.float64)
    hidden, weight, bias = inputs
    without = token_divergence((hidden, weight[:39]), (teacher[0], teacher[1][:39]), mask, kind=kind, bias=bias[:39])
    never = torch.zeros(40).double()
    never[39] = -torch.inf
    cut = {"bias": bias + never, "teacher_head": {"bias": never}}
    values = token_divergence((hidden, weight), teacher, mask, kind=kind, impl=impl, **cut)
    torch.testing.assert_close(values, without)
    for ours, expected in zip(*(torch.autograd.grad(v.sum(), inputs) for v in (values, without)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_rows_that_do_not_count_or_have_no_upstream_gradient_cost_nothing():
    (hidden, weight, _), teacher, mask = make()
    with torch.no_grad():
        hidden[~mask] = torch.nan
    values = token_divergence((hidden, weight), teacher, mask)
    upstream = torch.zeros(len(mask))
    upstream[[1, 2]] = 1.0
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as products:
        (values * upstream).sum().backward()
    assert products.get_total_flops() == 2 * 2 * (3 * weight.numel() + teacher[1].numel())
    assert hidden.grad[[1, 2]].isfinite().all() and not hidden.grad[3:].any()


def test_small_blocks_change_nothing(monkeypatch):
    inputs, teacher, mask = make(dtype=torch.float64)
    whole = all_of(token_divergence(inputs[:2], teacher, mask, bias=inputs[2]), inputs, 1.0)
    for module in ("divergence", "chunked_grad"):
        monkeypatch.setattr(f"tokensel.ops.{module}.WORKSPACE_MIB", 0.05)  # a few rows of 2,048 columns
    torch.testing.assert_close(all_of(token_divergence(inputs[:2], teacher, mask, bias=inputs[2]), inputs, 1.0), whole)


def test_nothing_that_counts_is_zero_with_zero_gradients():
    inputs, teacher, mask = make()
    values = token_divergence(inputs[:2], teacher, torch.zeros_like(mask), bias=inputs[2])
    assert not values.any() and not any(g.any() for g in torch.autograd.grad(values.sum(), inputs))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kind": "kl"}, ValueError, "kind must be one of forward_kl, reverse_kl, jsd, tv; got 'kl'"),
        ({"beta": 1.0}, ValueError, r"beta must be in \(0, 1\); got 1.0"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive; got 0"),
        ({"teacher_head": {"softcap": -1.0}}, ValueError, r"teacher_head\['softcap'\] must be positive"),
        ({"teacher_head": {"scale": 3}}, ValueError, "teacher_head has no 'scale'; it takes bias, softcap"),
        ({"impl": "fused"}, ValueError, "impl must be one of auto, chunked, reference; got 'fused'"),
        ({"mask": torch.ones(21)}, TypeError, "mask must be torch.bool; got torch.float32"),
        ({"mask": torch.ones(20).bool()}, ValueError, r"mask must have shape \[21\]"),
    ],
)
def test_bad_input_is_named(change, error, message):
    inputs, teacher, mask = make(V=30)
    arguments = {"mask": mask} | change
    with pytest.raises(error, match=message):
        token_divergence(inputs[:2], teacher, **arguments)


def test_a_teacher_that_does_not_fit_is_named():
    inputs, (hidden, weight), mask = make(V=30)
    with pytest.raises(ValueError, match="teacher weight has 29 vocabulary rows but student weight has 30"):
        token_divergence(inputs[:2], (hidden, weight[:29]), mask)
    with pytest.raises(ValueError, match=r"teacher hidden must have shape \[21, 40\].*; got \[20, 40\]"):
        token_divergence(inputs[:2], (hidden[:20], weight), mask)
    with pytest.raises(TypeError, match="student is torch.float32 but teacher is torch.float64; cast one of them"):
        token_divergence(inputs[:2], (hidden.double(), weight.double()), mask)
