"""Divergence from the recorded top-k log-probabilities of a teacher, with its gradient, against float64."""

from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, head_of
from test_divergence import all_of, assert_within_budget
from torch.utils.flop_counter import FlopCounterMode

from tokensel import TopLogprobs, logprobs_at, token_divergence, top_logprobs

KINDS = ("forward_kl", "reverse_kl", "jsd", "tv")
IMPLS = ("chunked", "reference")


def make(N=21, V=2300, D=24, K=9, dtype=torch.float32, record=torch.float32):
    """student's hidden, weight and bias; what was recorded of a teacher; the teacher; mask."""
    tensors = torch.randn(N, D), torch.randn(V, D) / D**0.5 * 3, torch.randn(V)
    teacher = torch.randn(N, 40, dtype=torch.float64), torch.randn(V, 40, dtype=torch.float64) / 40**0.5 * 3
    found = top_logprobs(*teacher, K)
    mask = torch.arange(N) % 4 != 0
    return [t.to(dtype).requires_grad_() for t in tensors], found._replace(logp=found.logp.to(record)), teacher, mask


def definition(inputs, teacher, kind, add_tail=True, beta=0.5, dtype=torch.float64, temperature=1.0, **head):
    """Σ over K tokens, and the rest as one more, by the formulas."""
    p = (head_of(*inputs, dtype=dtype, **head) / temperature).softmax(-1)
    q = teacher.logp.to(dtype).exp()
    there = q > 0
    p_of = torch.where(there, p.gather(-1, torch.where(there, teacher.ids, 0)), 0)
    if add_tail:
        rest = p.scatter(-1, torch.where(there, teacher.ids, teacher.ids.amax(-1, keepdim=True)), 0).sum(-1)
        p, q = torch.cat([p_of, rest[..., None]], -1), torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    else:
        p, q = p_of / p_of.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    kl = lambda a, b: torch.where(a > 0, a * (a / b).log(), 0).sum(-1)  # noqa: E731
    m = beta * q + (1 - beta) * p
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "tv": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "logit_scale": 0.7, "temperature": 1.8}], ids=str)
@pytest.mark.parametrize("add_tail", [True, False], ids=["tail", "no tail"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_definition(kind, add_tail, options, dtype, impl):
    inputs, teacher, _, mask = make(dtype=dtype)
    upstream = torch.randn(len(mask)) * (torch.rand(len(mask)) < 0.7) * mask
    options = options | {"kind": kind, "add_tail": add_tail}
    values = token_divergence(inputs[:2], teacher, mask, bias=inputs[2], impl=impl, **options)
    assert values.dtype == torch.float32 and (values[~mask] == 0).all() and (values >= -1e-5).all()
    ours = all_of(values, inputs, upstream)
    exact, eager = (
        all_of(definition(inputs, teacher, **options, dtype=d) * mask, inputs, upstream)
        for d in (torch.float64, torch.float32)
    )
    assert_within_budget(ours, eager, exact, dtype)


@pytest.mark.parametrize("add_tail", [True, False], ids=["tail", "no tail"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradcheck_in_float64(kind, add_tail):
    inputs, teacher, _, mask = make(N=6, V=11, D=5, K=4, dtype=torch.float64, record=torch.float64)

    def values(hidden, weight, bias):
        options = {"kind": kind, "add_tail": add_tail, "beta": 0.3, "softcap": 4.0, "temperature": 1.4}
        return token_divergence((hidden, weight), teacher, mask, bias=bias, **options)

    assert torch.autograd.gradcheck(values, inputs, fast_mode=True)


@pytest.mark.parametrize("add_tail", [True, False], ids=["tail", "no tail"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_recorded_in_full_is_the_teacher(kind, add_tail):
    inputs, recorded, teacher, mask = make(V=30, K=30, dtype=torch.float64, record=torch.float64)
    live, ours = (
        token_divergence(inputs[:2], of, mask, kind=kind, bias=inputs[2], teacher_head=head, **options)
        for of, head, options in ((teacher, {}, {}), (recorded, None, {"add_tail": add_tail}))
    )
    torch.testing.assert_close(ours, live, rtol=1e-7, atol=1e-9)
    gradients = [torch.autograd.grad((v**2).sum(), inputs) for v in (ours, live)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_tail_it_grows_with_k_to_the_whole_divergence(kind):
    inputs, _, teacher, mask = make(V=300, dtype=torch.float64)
    values = [token_divergence(inputs[:2], top_logprobs(*teacher, k), mask, kind=kind) for k in (1, 8, 64, 299)]
    values.append(token_divergence(inputs[:2], teacher, mask, kind=kind))
    # what is left of the last tail, 1 - Σ q, is half rounding
    assert (torch.stack(values).diff(dim=0)[:, mask] > -1e-6).all()
    torch.testing.assert_close(values[-2], values[-1], rtol=1e-4, atol=1e-6)


def test_what_verl_sums_is_made_of_the_log_probabilities_at_the_ids():
    inputs, teacher, _, mask = make(dtype=torch.float64)
    q = teacher.logp.exp()
    truncated = (q * (teacher.logp - logprobs_at(*inputs[:2], teacher.ids, bias=inputs[2]))).sum(-1)
    tail = 1 - q.sum(-1)
    p_tail = 1 - logprobs_at(*inputs[:2], teacher.ids, bias=inputs[2]).exp().sum(-1)
    values = token_divergence(inputs[:2], teacher, mask, bias=inputs[2])
    torch.testing.assert_close(truncated[mask] + (tail * (tail / p_tail).log())[mask], values[mask], check_dtype=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("add_tail", [True, False], ids=["tail", "no tail"])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_without_a_token_have_no_part(kind, add_tail, impl):
    inputs, teacher, _, mask = make(dtype=torch.float64)
    nothing = torch.full_like(teacher.logp[:, :2], -torch.inf)
    padded = TopLogprobs(torch.cat([teacher.logp, nothing], 1), torch.cat([teacher.ids, 0 * teacher.ids[:, :2] - 7], 1))
    without, values = (
        token_divergence(inputs[:2], of, mask, kind=kind, add_tail=add_tail, bias=inputs[2], impl=impl)
        for of in (teacher, padded)
    )
    torch.testing.assert_close(values, without)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), inputs) for v in (values, without)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.0, 300.0])
def test_flat_and_peaked_students_of_a_peaked_teacher(kind, spread):
    """The teacher's tail is less than float32 can tell from 0, the student's is all or nothing."""
    (hidden, weight, _), _, _, mask = make()
    hidden = (hidden.detach() * spread).requires_grad_()
    labels = torch.randint(0, 2300, (21, 1))
    teacher = TopLogprobs(torch.zeros(21, 1), labels)
    values = token_divergence((hidden, weight), teacher, mask, kind=kind)
    gradients = torch.autograd.grad(values.sum(), (hidden, weight))
    assert values.isfinite().all() and (values >= 0).all() and all(g.isfinite().all() for g in gradients)
    if kind == "forward_kl":  # a label
        torch.testing.assert_close(values, -logprobs_at(hidden, weight, labels)[:, 0] * mask)


def test_the_teacher_is_a_constant_and_may_be_recorded_in_half_precision():
    inputs, teacher, _, mask = make(K=40)
    rounded = teacher._replace(logp=teacher.logp.bfloat16().requires_grad_(), ids=teacher.ids.int())
    values = token_divergence(inputs[:2], rounded, mask)
    wide = TopLogprobs(rounded.logp.detach().float(), teacher.ids)
    assert torch.equal(values, token_divergence(inputs[:2], wide, mask))
    values.sum().backward()
    assert rounded.logp.grad is None and inputs[0].grad.any()


def test_it_costs_one_product_and_three_of_rows_with_a_gradient():
    (hidden, weight, _), teacher, _, mask = make()
    with torch.no_grad():
        hidden[~mask] = torch.nan
    teacher.ids[~mask] = -1
    with FlopCounterMode(display=False) as products:
        values = token_divergence((hidden, weight), teacher, mask)
    assert products.get_total_flops() == 2 * int(mask.sum()) * weight.numel()
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as products:
        values[[1, 2]].sum().backward()
    assert products.get_total_flops() == 2 * 2 * 3 * weight.numel()
    assert hidden.grad[[1, 2]].isfinite().all() and not hidden.grad[3:].any()


def test_nothing_that_counts_is_zero_with_zero_gradients():
    inputs, teacher, _, mask = make()
    values = token_divergence(inputs[:2], teacher, torch.zeros_like(mask), bias=inputs[2])
    assert not values.any() and not any(g.any() for g in torch.autograd.grad(values.sum(), inputs))


def changed(teacher, name, row, entry, value):
    field = getattr(teacher, name).clone()
    field[row, entry] = value
    return teacher._replace(**{name: field})


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda t: changed(t, "ids", 2, 3, 30), ValueError, r"teacher.ids has 30 in row 1 of .*, outside \[0, 30\)"),
        (lambda t: changed(t, "ids", 1, 1, t.ids[1, 0]), ValueError, r"teacher.ids name token \d+ twice in row 0"),
        (lambda t: t._replace(logp=t.logp + 9), ValueError, "sum up to a probability of .* in row 0 .* over the whole"),
        (lambda t: t._replace(logp=t.logp - torch.inf), ValueError, "teacher.logp sum up to a probability of 0 in row"),
        (lambda t: changed(t, "logp", 3, 0, torch.nan), ValueError, "sum up to a probability of nan in row 2"),
        (lambda t: t._replace(ids=t.ids.float()), TypeError, "teacher.ids must be torch.int64 or torch.int32"),
        (lambda t: t._replace(logp=t.logp.long()), TypeError, "teacher.logp must have a floating-point dtype"),
        (lambda t: TopLogprobs(t.logp[:20], t.ids[:20]), ValueError, r"teacher.ids must have shape \[21, K\]"),
        (lambda t: t._replace(logp=t.logp[:, :3]), ValueError, r"teacher.logp must have shape \[21, 9\]"),
        (
            lambda t: TopLogprobs(*(x.repeat(1, 4) for x in t)),
            ValueError,
            "teacher.ids have 36 tokens a row, .* 30 rows",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_named(change, error, message):
    inputs, teacher, _, mask = make(V=30)
    with pytest.raises(error, match=message):
        token_divergence(inputs[:2], change(teacher), mask)


def test_options_of_the_other_kind_of_teacher_are_named():
    inputs, recorded, teacher, mask = make(V=30)
    with pytest.raises(ValueError, match="stats and teacher_head belong to a teacher of hidden states"):
        token_divergence(inputs[:2], recorded, mask, teacher_head={"softcap": 3.0})
    with pytest.raises(ValueError, match="add_tail=False belongs to a recorded teacher"):
        token_divergence(inputs[:2], teacher, mask, add_tail=False)


def test_half_precision_cannot_tell_a_tail():
    hidden, head, mask = torch.randn(5, 8), torch.randn(30, 8), torch.ones(5, dtype=torch.bool)
    teacher = top_logprobs(torch.randn(5, 8), head, 4)
    coarse = teacher._replace(logp=teacher.logp.bfloat16())
    with pytest.raises(ValueError, match="too coarse for the tail of kind='reverse_kl'"):
        token_divergence((hidden, head), coarse, mask, kind="reverse_kl")
    for how in ({"kind": "reverse_kl", "add_tail": False}, {"kind": "jsd"}):
        near = token_divergence((hidden, head), teacher, mask, **how)
        torch.testing.assert_close(token_divergence((hidden, head), coarse, mask, **how), near, rtol=0.05, atol=0.01)
