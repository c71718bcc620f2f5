"""Divergence of a student from a teacher, with its gradient, against float64."""

from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, head_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tokensel.ops.divergence
from tokensel import logprobs_at, token_divergence, token_stats, top_logprobs
from tokensel.ops import reference
from tokensel.ops.logits_blocks import LogitsBlocks

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


def assert_within_budget(ours, eager, exact, dtype):
    """Twice the eager error, and roundings of float32 logits and of gradients in their own type."""
    logits = float(exact[0].max()) + 20
    for name, a, b, c in zip(("value", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        error, largest = (a.double() - c).abs().max(), c.abs().max()
        allowed = (
            2 * (b.double() - c).abs().max() + torch.finfo(torch.float32).eps * logits * max(float(largest), 1) * 4
        )
        allowed += 0 if name == "value" else 2 * torch.finfo(dtype).eps * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def stats_of(inputs, teacher, mask, **options):
    """TokenStats of student and teacher, whose labels are of no interest."""
    labels = torch.where(mask, 3, -100)
    (hidden, weight, bias), teacher = inputs, token_stats(*teacher, labels, **options)
    return token_stats(hidden, weight, labels, bias=bias, **options), teacher


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
    assert_within_budget(ours, eager, exact, dtype)


@pytest.mark.parametrize("known", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradcheck_in_float64(kind, known):
    inputs, teacher, mask = make(N=6, V=11, D=5, teacher_D=3, dtype=torch.float64)
    options = {"softcap": 4.0, "temperature": 1.3}

    def values(hidden, weight, bias):
        stats = stats_of((hidden, weight, bias), teacher, mask, **options) if known else None
        options_of_kind = {"kind": kind, "beta": 0.3, "stats": stats, **options}
        return token_divergence((hidden, weight), teacher, mask, bias=bias, **options_of_kind)

    assert torch.autograd.gradcheck(values, inputs, fast_mode=True)


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


class Largest(TorchDispatchMode):
    """Of all tensors that operators give, how many numbers the largest has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        self.numbers = max(self.numbers, *(t.numel() for t in tensors), 0)
        return results


@pytest.mark.parametrize("call", [*KINDS, "recorded", "at ids", "top"])
def test_nothing_of_the_width_of_the_vocabulary_is_held(call):
    inputs, teacher, mask = make(N=200, V=9000, D=2, teacher_D=3)
    top = top_logprobs(*teacher, 20)
    with Largest() as largest:
        if call == "top":
            top_logprobs(*teacher, 20)
        elif call == "at ids":
            logprobs_at(*inputs[:2], top.ids).sum().backward()
        else:
            of, kind = (teacher, call) if call in KINDS else (top, "jsd")
            token_divergence(inputs[:2], of, mask, kind=kind).sum().backward()
    assert largest.numbers <= 200 * 2048


def test_the_backward_makes_all_of_a_teachers_blocks_in_one_place(monkeypatch):
    inputs, teacher, mask = make(V=9000)
    values, places = token_divergence(inputs[:2], teacher, mask, bias=inputs[2]), set()
    block = LogitsBlocks.__call__
    spied = lambda *args: places.add((z := block(*args)).data_ptr()) or z  # noqa: E731
    monkeypatch.setattr(LogitsBlocks, "__call__", spied)
    values.sum().backward()
    assert len(places) == 1


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


IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_counted(kind, grad, monkeypatch):
    """Both models' once for the KL divergences or with statistics, else twice; no slopes without a gradient."""
    inputs, teacher, mask = make()
    once = 2 * int(mask.sum()) * (inputs[1].numel() + teacher[1].numel())
    slopes, sweep = [], tokensel.ops.divergence._compare
    spied = lambda *args, slope: slopes.append(slope) or sweep(*args, slope=slope)  # noqa: E731
    monkeypatch.setattr("tokensel.ops.divergence._compare", spied)
    for stats, sweeps in ((None, 1 if kind.endswith("kl") else 2), (stats_of(inputs, teacher, mask), 1)):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as products:
            values = token_divergence(inputs[:2], teacher, mask, kind=kind, stats=stats, bias=inputs[2])
        assert products.get_total_flops() == sweeps * once and values.requires_grad == grad
    assert set(slopes) == {grad and not kind.endswith("kl")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_known_normalisers_change_nothing(kind, dtype):
    inputs, teacher, mask = make(dtype=dtype)
    options = {"softcap": 6.0, "logit_scale": 0.7, "temperature": 1.8}
    stats = stats_of(inputs, teacher, mask, **options)
    without, values = (
        token_divergence(inputs[:2], teacher, mask, kind=kind, bias=inputs[2], stats=of, **options)
        for of in (None, stats)
    )
    torch.testing.assert_close(values, without, rtol=1e-5, atol=2e-6)
    for ours, expected in zip(*(torch.autograd.grad(v.sum(), inputs) for v in (values, without)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_equal_logits_do_not_cancel(kind, shift):
    """Against the same in float64 from logits that float32 holds as they are."""
    student, teacher = (torch.randint(-8, 9, (9, 5000)).float() for _ in range(2))
    mask = torch.ones(9, dtype=torch.bool)
    models = [(torch.eye(9), (z + shift).T.contiguous()) for z in (student, teacher)]
    log_p, log_q = (z.double().log_softmax(-1) for z in (student, teacher))
    exact = reference.divergence_terms(log_p, log_q, kind, 0.5)[0].sum(-1)
    values = token_divergence(*models, mask, kind=kind)
    # of two float32 lse, to which the shift comes back
    assert (values - exact).abs().max() < 4 * torch.finfo(torch.float32).eps * abs(shift) * max(1, exact.max())
    small = token_divergence(*((x, w - shift) for x, w in models), mask, kind=kind)
    torch.testing.assert_close(small, exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_peaked_students_and_teachers(kind):
    (hidden, weight, _), (teacher_hidden, teacher_weight), mask = make(spread=200.0)
    hidden = (hidden * 200).detach().requires_grad_()
    values = token_divergence((hidden, weight), (teacher_hidden, teacher_weight), mask, kind=kind)
    log_p, log_q = (
        head_of(h, w, dtype=torch.float64).log_softmax(-1)
        for h, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    exact = reference.divergence_terms(log_p, log_q, kind, 0.5)[0].sum(-1) * mask
    torch.testing.assert_close(values, exact.float(), rtol=1e-4, atol=1e-3)
    ours, expected = (torch.autograd.grad(v.sum(), hidden)[0] for v in (values, exact))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("student, teacher", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float64")])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_two_types_are_compared_in_the_wider_one(kind, student, teacher):
    inputs, _, mask = make(dtype=getattr(torch, student))
    _, of_teacher, _ = make(dtype=getattr(torch, teacher))
    wide = torch.promote_types(getattr(torch, student), getattr(torch, teacher))
    values = token_divergence(inputs[:2], of_teacher, mask, kind=kind, bias=inputs[2])
    assert values.dtype == wide
    widened = [t.detach().to(wide).requires_grad_() for t in inputs]
    expected = token_divergence(widened[:2], [t.to(wide) for t in of_teacher], mask, kind=kind, bias=widened[2])
    assert torch.equal(values, expected)
    gradients = (torch.autograd.grad(v.sum(), i) for v, i in ((values, inputs), (expected, widened)))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact.to(ours.dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_student_that_cannot_say_what_the_teacher_does_is_infinitely_far(impl):
    (hidden, weight, _), teacher, mask = make(V=4200)
    bias = torch.zeros(4200)
    bias[:2048] = -torch.inf  # a whole block
    for kind, far in (("forward_kl", True), ("reverse_kl", False), ("jsd", False)):
        values = token_divergence((hidden, weight), teacher, mask, kind=kind, bias=bias, impl=impl)[mask]
        assert (values == torch.inf).all() if far else values.isfinite().all()


def test_rows_that_do_not_count_or_have_no_upstream_gradient_cost_nothing():
    (hidden, weight, _), teacher, mask = make()
    with torch.no_grad():
        hidden[~mask] = torch.nan
    values = token_divergence((hidden, weight), teacher, mask)
    upstream = torch.zeros(len(mask))
    upstream[[1, 2]] = 1.0
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as products:
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
    stats = stats_of(inputs, (hidden, weight), mask)
    with pytest.raises(ValueError, match="the student's stats have no lse for a row that counts; give it a label"):
        token_divergence(inputs[:2], (hidden, weight), torch.ones_like(mask), stats=stats)
    with pytest.raises(ValueError, match=r"lse of the teacher's stats must have shape \[21\]"):
        token_divergence(inputs[:2], (hidden, weight), mask, stats=(stats[0], stats[1].view((21, 1))))


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_bias_that_changes_before_the_backward_is_noticed(of):
    hidden, head, bias = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8), torch.randn(30)
    given = {"bias": bias} if of == "student" else {"teacher_head": {"bias": bias}}
    mask = torch.ones(5, dtype=torch.bool)
    divergence = token_divergence((hidden, head), (torch.randn(5, 6), torch.randn(30, 6)), mask, **given)
    bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        divergence.sum().backward()
    logp = logprobs_at(hidden, head, torch.zeros(5, 1, dtype=torch.int64), bias=bias)
    bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_what_is_no_model_is_named():
    hidden, head, mask = torch.randn(5, 8), torch.randn(30, 8), torch.ones(5, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"teacher must be \(hidden, weight\); got Tensor"):
        token_divergence((hidden, head), hidden, mask)
    with pytest.raises(TypeError, match=r"or TopLogprobs\(logp, ids\) where it was recorded"):
        token_divergence((hidden, head), (torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.int64)), mask)
    stats = token_stats(hidden, head, mask.long())
    with pytest.raises(TypeError, match=r"stats must be \(TokenStats of the student, TokenStats of the teacher\)"):
        token_divergence((hidden, head), (hidden, head), mask, stats=stats)
