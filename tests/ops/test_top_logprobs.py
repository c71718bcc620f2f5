"""The k likeliest tokens of a row and log-probabilities of given ones, with their gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, head_of, make
from torch.utils.flop_counter import FlopCounterMode

from tokensel import TopLogprobs, logprobs_at, token_logprobs, top_logprobs

IMPLS = ("chunked", "reference")
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 6.0, "logit_scale": 0.7, "temperature": 1.8}]


def inputs_of(dtype=torch.float32, K=9, **sizes):
    """hidden, weight and bias; ids (N, K), of which the first is named twice; mask."""
    hidden, weight, labels, bias = make(dtype=dtype, **sizes)
    ids = torch.randint(0, len(weight), (len(hidden), K))
    ids[:, -1] = ids[:, 0]
    return [t.requires_grad_() for t in (hidden, weight, bias)], ids, labels != -100


def log_softmax_of(inputs, temperature=1.0, softcap=None, logit_scale=1.0, dtype=torch.float64):
    return (head_of(*inputs, softcap, logit_scale, dtype) / temperature).log_softmax(-1)


def rounding_of(log_p):
    """Of float32 logits and an lse of a few tens of nats."""
    return 4 * torch.finfo(torch.float32).eps * (float(log_p.detach().abs().max()) + 10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", [1, 40, 2300])
def test_the_likeliest_equal_the_definition(k, options, dtype, impl):
    inputs, _, mask = inputs_of(dtype)
    found = top_logprobs(*inputs[:2], k, mask=mask, bias=inputs[2], impl=impl, **options)
    assert isinstance(found, TopLogprobs) and found.logp.shape == found.ids.shape == (len(mask), k)
    assert found.logp.dtype == torch.float32 and found.ids.dtype == torch.int64 and not found.logp.requires_grad
    assert (found.logp[~mask] == -torch.inf).all() and (found.ids[~mask] == 0).all()
    logp, ids = found.logp[mask], found.ids[mask]
    assert (logp.diff(dim=1) <= 0).all() and (ids.sort(1).values.diff(dim=1) > 0).all()
    exact, eager = (log_softmax_of(inputs, **options, dtype=d)[mask] for d in (torch.float64, torch.float32))
    best, of_eager = exact.topk(k).values, eager.double().topk(k).values
    allowed = 2 * (of_eager - best).abs().max() + rounding_of(exact)
    assert (logp - best).abs().max() <= allowed
    assert (exact.gather(1, ids) - best).abs().max() <= 2 * allowed  # near ties may change their places


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [1, 5, 64, 2500, 5000])
def test_of_equal_logits_the_smaller_id_comes_first(k, impl):
    """Whole numbers, which no product rounds; a row of zeros, where all are equal."""
    hidden, weight = torch.randint(-2, 3, (11, 3)).float(), torch.randint(-2, 3, (5000, 3)).float()
    hidden[4] = 0
    expected = (hidden @ weight.T).sort(dim=1, descending=True, stable=True)
    found = top_logprobs(hidden, weight, k, impl=impl)
    assert torch.equal(found.ids, expected.indices[:, :k])
    torch.testing.assert_close(found.logp, (hidden @ weight.T).log_softmax(1).gather(1, found.ids))


@pytest.mark.parametrize("descending", [False, True])
def test_the_order_of_the_vocabulary_does_not_matter(descending):
    """All of the largest in the last block, or in the first."""
    V = 7000
    weight = torch.arange(V).float()[:, None] / V
    hidden = torch.tensor([[-3.0 if descending else 3.0], [0.5]])
    found = top_logprobs(hidden, weight, 30)
    best = torch.arange(30) if descending else V - 1 - torch.arange(30)
    assert torch.equal(found.ids[0], best) and torch.equal(found.ids[1], V - 1 - torch.arange(30))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spread, shift", [(1000.0, 0.0), (0.0, 0.0), (1.0, 1e4), (1.0, -1e4)], ids=str)
def test_peaked_flat_and_far_off_logits(spread, shift, impl):
    (hidden, weight, bias), ids, _ = inputs_of(spread=spread)
    bias = bias.detach() + shift
    exact, eager = (log_softmax_of([hidden, weight, bias], dtype=d) for d in (torch.float64, torch.float32))
    allowed = 2 * (eager - exact).abs().max() + rounding_of(exact) + torch.finfo(torch.float32).eps * abs(shift) * 4
    found = top_logprobs(hidden, weight, 7, bias=bias, impl=impl)
    assert (found.logp - exact.topk(7).values).abs().max() <= allowed
    values = logprobs_at(hidden, weight, ids, bias=bias, impl=impl)
    assert (values - exact.gather(1, ids)).abs().max() <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_that_cannot_be_come_last(impl):
    (hidden, weight, bias), _, _ = inputs_of(V=4200, dtype=torch.float64)
    bias = bias.detach()
    bias[:4190] = -torch.inf  # two whole blocks, and some of the third
    found = top_logprobs(hidden, weight, 12, bias=bias, impl=impl)
    exact = (head_of(hidden, weight) + bias).log_softmax(-1)
    torch.testing.assert_close(found.logp[:, :10], exact.topk(10).values)
    assert (found.logp[:, 10:] == -torch.inf).all() and (found.ids[:, 10:] == torch.tensor([0, 1])).all()
    ids = torch.tensor([0, 4195, 4199]).expand(len(hidden), 3)
    values = logprobs_at(hidden, weight, ids, bias=bias, impl=impl)
    torch.testing.assert_close(values, exact[:, [0, 4195, 4199]])
    gradient = torch.autograd.grad((values[:, 1:] * torch.tensor([2.0, -1.0])).sum(), hidden)[0]
    expected = torch.autograd.grad((exact[:, [4195, 4199]] * torch.tensor([2.0, -1.0])).sum(), hidden)[0]
    torch.testing.assert_close(gradient, expected)


def all_of(values, inputs, upstream):
    return [values.detach(), *torch.autograd.grad((values * upstream).sum(), inputs)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_at_given_ids_equal_the_definition(options, dtype, impl):
    inputs, ids, mask = inputs_of(dtype)
    upstream = torch.randn(ids.shape) * (torch.rand(len(ids), 1) < 0.7)
    values = logprobs_at(*inputs[:2], ids, mask=mask, bias=inputs[2], impl=impl, **options)
    assert values.dtype == torch.float32 and values.shape == ids.shape and (values[~mask] == 0).all()
    ours = all_of(values, inputs, upstream)
    exact, eager = (
        all_of(log_softmax_of(inputs, **options, dtype=d).gather(1, ids) * mask[:, None], inputs, upstream)
        for d in (torch.float64, torch.float32)
    )
    for name, a, b, c in zip(("values", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        error, largest = (a.double() - c).abs().max(), c.abs().max()
        allowed = 2 * (b.double() - c).abs().max() + rounding_of(exact[0]) * max(1, largest)
        allowed += 0 if name == "values" else 2 * torch.finfo(dtype).eps * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("named", ["some", "all"])
def test_gradcheck_in_float64(named):
    inputs, ids, mask = inputs_of(torch.float64, N=6, V=7, D=5)
    ids = torch.arange(7).expand(6, 7) if named == "all" else ids

    def values(hidden, weight, bias):
        options = {"bias": bias, "softcap": 4.0, "logit_scale": 0.7, "temperature": 1.6}
        return logprobs_at(hidden, weight, ids, mask=mask, **options)

    assert torch.autograd.gradcheck(values, inputs, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_id_a_row_is_a_label(impl):
    inputs, _, _ = inputs_of(torch.float64)
    labels = torch.randint(0, 2300, (37,), dtype=torch.int32)
    values = logprobs_at(*inputs[:2], labels[:, None], bias=inputs[2], softcap=9.0, impl=impl)[:, 0]
    expected, _ = token_logprobs(*inputs[:2], labels, bias=inputs[2], softcap=9.0)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(*(torch.autograd.grad((v**2).sum(), inputs) for v in (values, expected)))


def test_other_shapes_strides_and_blocks_change_nothing(monkeypatch):
    (hidden, weight, bias), ids, mask = inputs_of(torch.float64, N=36)
    whole = logprobs_at(hidden, weight, ids, mask=mask, bias=bias), top_logprobs(hidden, weight, 50, mask=mask)
    monkeypatch.setattr("tokensel.ops.logprobs.WORKSPACE_MIB", 0.05)  # a few rows of 2,048 columns
    strided = torch.stack([hidden, hidden], -1)[..., 0].view(4, 9, -1)
    values = logprobs_at(strided, weight, ids.view(4, 9, -1), mask=mask.view(4, 9), bias=bias)
    torch.testing.assert_close(values, whole[0].view(4, 9, -1))
    found = top_logprobs(strided, weight, 50, mask=mask.view(4, 9), workspace_mib=0.05)
    torch.testing.assert_close(found, TopLogprobs(*(t.view(4, 9, -1) for t in whole[1])))


def test_rows_that_do_not_count_may_be_anything_and_cost_nothing():
    (hidden, weight, _), ids, mask = inputs_of()
    with torch.no_grad():
        hidden[~mask] = torch.nan
    ids[~mask] = -5
    with FlopCounterMode(display=False) as products:
        found, values = top_logprobs(hidden, weight, 9, mask=mask), logprobs_at(hidden, weight, ids, mask=mask)
    assert products.get_total_flops() == 2 * 2 * int(mask.sum()) * weight.numel()
    assert found.logp[mask].isfinite().all() and values.isfinite().all()
    upstream = torch.zeros(values.shape)
    upstream[1, 2], upstream[2] = 1.0, torch.randn(9)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as products:
        (values * upstream).sum().backward()
    assert products.get_total_flops() == 2 * 2 * 3 * weight.numel()
    assert hidden.grad[[1, 2]].any(1).all() and not hidden.grad[3:].any() and not hidden.grad[0].any()


def test_nothing_that_counts_is_zero_with_zero_gradients():
    inputs, ids, mask = inputs_of()
    found = top_logprobs(*inputs[:2], 4, mask=torch.zeros_like(mask))
    assert (found.logp == -torch.inf).all() and not found.ids.any()
    values = logprobs_at(*inputs[:2], ids, mask=torch.zeros_like(mask), bias=inputs[2])
    assert not values.any() and not any(g.any() for g in torch.autograd.grad(values.sum(), inputs))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": 31}, ValueError, r"k must be in \[1, 30\], the vocabulary; got 31"),
        ({"k": 0}, ValueError, r"k must be in \[1, 30\]"),
        ({"k": 2.0}, TypeError, "k must be an int; got 2.0"),
        ({"temperature": 0}, ValueError, "temperature must be positive; got 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"workspace_mib": 0.0}, ValueError, "workspace_mib must be positive"),
        ({"impl": "fused"}, ValueError, "impl must be one of auto, chunked, reference; got 'fused'"),
        ({"mask": torch.ones(37)}, TypeError, "mask must be torch.bool; got torch.float32"),
        ({"mask": torch.ones(36).bool()}, ValueError, r"mask must have shape \[37\]"),
    ],
)
def test_bad_input_of_the_likeliest_is_named(change, error, message):
    inputs, _, _ = inputs_of(V=30)
    arguments = {"k": 4} | change
    with pytest.raises(error, match=message):
        top_logprobs(*inputs[:2], **arguments)


def test_bad_ids_are_named():
    inputs, ids, mask = inputs_of(V=30)
    for wrong in (-1, 30):
        ids[7, 2] = wrong
        with pytest.raises(ValueError, match=rf"ids has {wrong} in row 7 of those that count, outside \[0, 30\)"):
            logprobs_at(*inputs[:2], ids)
    with pytest.raises(ValueError, match="in row 5 of those that count"):  # rows 0 and 5 do not
        logprobs_at(*inputs[:2], ids, mask=mask)
    with pytest.raises(TypeError, match="ids must be torch.int64 or torch.int32; got torch.float32"):
        logprobs_at(*inputs[:2], ids.float())
    for shape in ((37,), (36, 9), (37, 0)):
        with pytest.raises(ValueError, match=r"ids must have shape \[37, K\]"):
            logprobs_at(*inputs[:2], torch.zeros(shape, dtype=torch.int64))
    values = logprobs_at(*inputs[:2], ids.clamp(0, 29))
    with pytest.raises(ValueError, match="the gradient of the log-probabilities is nan in row 2"):
        (values * torch.where(torch.arange(37) == 2, torch.nan, 1.0)[:, None]).sum().backward()
