"""What the cross-entropy may be made of beside nll: smoothed labels, z-loss, one loss a row, a head of another type."""

from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, head_of
from test_loss import assert_within_budget, gradients, make
from torch.nn.functional import cross_entropy

from tokensel import selected_cross_entropy, token_logprobs, token_stats, token_stats_pair

TERMS = [{"label_smoothing": 0.1}, {"z_loss": 0.02}, {"label_smoothing": 0.3, "z_loss": 1e-3}]


def definition(inputs, labels, keep, label_smoothing=0.0, z_loss=0.0, dtype=torch.float64, **head):
    """keep · loss of each row, by PyTorch's own function on [N, V] logits."""
    z = head_of(*inputs, **head, dtype=dtype)
    loss = cross_entropy(z, labels, reduction="none", label_smoothing=label_smoothing) + z_loss * z.logsumexp(-1) ** 2
    return torch.where(labels != -100, keep.to(dtype) * loss, 0)


def everything(losses, inputs, upstream):
    return [losses.detach(), *gradients((losses * upstream.to(losses.dtype)).sum(), inputs)]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("head", [{}, {"softcap": 6.0, "logit_scale": 0.7}], ids=str)
def test_each_row_equals_the_definition(head, terms, dtype, impl):
    inputs, labels, keep = make(dtype=dtype)
    keep = torch.randn(len(labels)) * keep
    upstream = torch.randn(len(labels))
    hidden, weight, bias = inputs
    options = {"bias": bias, "reduction": "none", "impl": impl}
    ours = everything(
        selected_cross_entropy(hidden, weight, labels, keep, **options, **terms, **head), inputs, upstream
    )
    exact = everything(definition(inputs, labels, keep, **terms, **head), inputs, upstream)
    eager = everything(definition(inputs, labels, keep, **terms, **head, dtype=torch.float32), inputs, upstream)
    assert_within_budget(ours, eager, exact, dtype, size=30.0)
    assert ours[0].shape == labels.shape and not ours[0][labels == -100].any()


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_the_sum_is_that_of_the_rows(given, terms):
    inputs, labels, keep = make(dtype=torch.float64)
    hidden, weight, bias = inputs
    stats = token_stats(hidden, weight, labels, bias=bias, logit_sum=True) if given else None
    loss = selected_cross_entropy(hidden, weight, labels, keep, stats=stats, denominator=7, bias=bias, **terms)
    exact = definition(inputs, labels, keep, **terms).sum() / 7
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradients(loss, inputs), gradients(exact, inputs))


def test_gradcheck_in_float64():
    inputs, labels, _ = make(N=7, V=11, D=5, dtype=torch.float64)
    weights = torch.randn(7, dtype=torch.float64)

    def loss(hidden, weight, bias):
        options = {"softcap": 4.0, "logit_scale": 0.7, "reduction": "none", "label_smoothing": 0.2, "z_loss": 0.1}
        return selected_cross_entropy(hidden, weight, labels, weights, bias=bias, **options)

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_class_weights_are_weights_of_rows():
    inputs, labels, _ = make(dtype=torch.float64)
    of_class = torch.rand(len(inputs[1]), dtype=torch.float64)
    keep = of_class[labels.clamp(min=0)]
    ours = selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2])
    torch.testing.assert_close(ours, cross_entropy(head_of(*inputs), labels, weight=of_class))


def test_dropped_rows_may_be_anything_and_cost_nothing():
    inputs, labels, keep = make()
    with torch.no_grad():
        inputs[0][~keep] = torch.nan
    loss = selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2], label_smoothing=0.1, z_loss=0.1)
    d_hidden, d_weight, _ = gradients(loss, inputs)
    assert loss.isfinite() and d_weight.isfinite().all() and not d_hidden[~keep].any()
    nothing = selected_cross_entropy(*inputs[:2], labels, keep & False, label_smoothing=0.1, z_loss=0.1)
    assert nothing == 0


def test_a_sum_of_logits_alone_keeps_its_row():
    """Terms that cancel in p leave the constant of the smoothing."""
    inputs, labels, _ = make(N=1, V=30, dtype=torch.float64)
    labels[0] = 3
    hidden, weight, bias = inputs
    lse = token_stats(hidden, weight, labels, bias=bias).lse
    upstream, terms = torch.ones(1), {"label_smoothing": 0.5, "z_loss": float(-1 / (2 * lse[0]))}
    if lse[0] > 0:  # of negative weights then
        terms["z_loss"] *= -1
        with torch.no_grad():
            bias -= 2 * lse[0]
    ours = selected_cross_entropy(hidden, weight, labels, upstream, bias=bias, reduction="none", **terms)
    exact = definition(inputs, labels, upstream, **terms)
    torch.testing.assert_close(gradients(ours.sum(), inputs), gradients(exact.sum(), inputs))


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("types", MIXED, ids=str)
def test_a_head_of_another_type_is_multiplied_in_the_wider_one(types):
    (hidden, weight, bias), labels, keep = make()
    hidden, weight = hidden.detach().to(types[0]).requires_grad_(), weight.detach().to(types[1]).requires_grad_()
    inputs, wide = (hidden, weight, bias), torch.promote_types(*types)
    upstream = torch.randn(len(labels))

    def all_of(hidden, weight):
        log_p, entropy = token_logprobs(hidden, weight, labels, bias=bias, entropy=True)
        loss = selected_cross_entropy(hidden, weight, labels, keep, bias=bias)
        of_both = (gradients(value, inputs) for value in ((upstream * log_p + entropy).sum(), loss))
        return [log_p.detach(), loss.detach(), *(gradient for of_one in of_both for gradient in of_one)]

    ours = all_of(hidden, weight)
    same = all_of(hidden.to(wide), weight.to(wide))
    torch.testing.assert_close(ours, same)
    assert [gradient.dtype for gradient in ours[2:4]] == list(types)
    stats = token_stats(hidden, weight, labels, entropy=True)
    torch.testing.assert_close(
        stats.fields(), token_stats(hidden.to(wide), weight.to(wide), labels, entropy=True).fields()
    )
    other = (hidden.to(wide), weight.to(wide))
    for ours, same in zip(token_stats_pair((hidden, weight), other, labels), 2 * [stats], strict=True):
        torch.testing.assert_close(ours.lse, same.lse)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\); got -0.1"),
        ({"z_loss": -1e-4}, r"z_loss must be in \[0, inf\); got -0.0001"),
        ({"z_loss": float("nan")}, r"z_loss must be in"),
        ({"reduction": "mean"}, r"reduction must be 'sum' or 'none'; got 'mean'"),
    ],
)
def test_bad_input(wrong, message):
    (hidden, weight, _), labels, keep = make()
    with pytest.raises(ValueError, match=message):
        selected_cross_entropy(hidden, weight, labels, keep, **wrong)


def test_statistics_without_what_the_loss_needs():
    (hidden, weight, _), labels, keep = make()
    stats = token_stats(hidden, weight, labels)
    with pytest.raises(
        ValueError, match="label_smoothing needs stats.logit_sum; make the statistics with logit_sum=True"
    ):
        selected_cross_entropy(hidden, weight, labels, keep, stats=stats, label_smoothing=0.1)


def test_fused_takes_one_type():
    (hidden, weight, _), labels, keep = make()
    with pytest.raises(ValueError, match="one type, not torch.float32 and torch.bfloat16; use impl='chunked'"):
        selected_cross_entropy(hidden, weight.bfloat16(), labels, keep, impl="fused")


@pytest.mark.parametrize("make_loss", [selected_cross_entropy, token_logprobs])
def test_statistics_of_other_labels_are_refused(make_loss):
    (hidden, weight, _), labels, _ = make()
    stats = token_stats(hidden, weight, labels)
    rows = (
        hidden,
        weight,
        labels.clamp(min=0),
        *([torch.ones(len(labels))] if make_loss is selected_cross_entropy else []),
    )
    with pytest.raises(ValueError, match=r"stats have no lse for labels\[0\]; make them with the same labels"):
        make_loss(*rows, stats=stats)
    with pytest.raises(TypeError, match="stats must be TokenStats of one model; got tuple"):
        make_loss(*rows, stats=(stats, stats))


def test_weights_and_denominators_are_numbers():
    (hidden, weight, _), labels, keep = make()
    keep = keep.float()
    keep[0] = torch.nan  # an ignored row
    assert selected_cross_entropy(hidden, weight, labels, keep).isfinite()
    keep[7] = torch.nan
    with pytest.raises(ValueError, match="keep is nan in row 7; it must be finite"):
        selected_cross_entropy(hidden, weight, labels, keep)
    with pytest.raises(TypeError, match="denominator must be a number; got 'x'"):
        selected_cross_entropy(hidden, weight, labels, keep > 0, denominator="x")
