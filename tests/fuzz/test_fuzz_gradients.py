"""Losses and log-probabilities of random heads, and their gradients, against float64."""

from __future__ import annotations

import torch
from drawn_heads import heads, impls, small_blocks
from hypothesis import given
from hypothesis import strategies as st
from rounding import Logits, assert_within
from torch.nn.functional import one_hot, pad

from tokensel import logprobs_at, selected_cross_entropy, token_logprobs, token_stats

FINITE = st.sampled_from([None, "plain", "large", "small"])


frozen_inputs = st.sampled_from(["", "", "hidden", "weight", "bias", "weight and bias"])


def trained(head, frozen):
    """The tensors, of which hidden, weight and bias ask for gradients if they are not frozen; these by name."""
    made = head.tensors()
    inputs = {name: getattr(made, name) for name in ("hidden", "weight", "bias") if name not in frozen}
    return made, {name: value.requires_grad_() for name, value in inputs.items() if value is not None}


def truth_of(head, made, valid, *, temperature=True):
    hidden = made.hidden.detach().masked_fill(~valid[..., None], 0)
    options = head.options if temperature else head.options | {"temperature": 1.0}
    return Logits(hidden, made.weight, head.result_dtype, made.bias, **options, blocks=head.blocks)


def weights_of_rows(head, shape, salt=2):
    """Upstream gradients, of which some are 0."""
    random = head.generator(salt)
    return (torch.randn(shape, generator=random) * (torch.rand(shape, generator=random) < 0.7)).to(head.result_dtype)


def check_gradients(loss, made, inputs, truth, exact_loss, mass, rounding):
    """Of `loss` in the inputs, against those of the float64 scalar; mass and rounding as in `gradient_errors`."""
    ours = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
    like = {"hidden": made.hidden, "weight": made.weight, "bias": made.weight}
    d, exact = truth.gradients(exact_loss)
    errors = truth.gradient_errors(d, mass.detach(), rounding.detach(), like)
    for name, gradient in ours.items():
        assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape
        assert_within(f"gradient in {name}", gradient.reshape(exact[name].shape), exact[name], errors[name])


@given(
    head=heads(),
    frozen=frozen_inputs,
    impl=impls,
    entropy=st.booleans(),
    shift=st.booleans(),
    given_stats=st.booleans(),
)
def test_token_logprobs(head, frozen, impl, entropy, shift, given_stats):
    made, inputs = trained(head, frozen)
    labels, options = made.labels, head.options | {"bias": made.bias, "ignore_index": head.ignore_index}
    shift = shift and labels.dim() > 0 and not head.poison  # rows are poisoned where labels are not shifted
    y = pad(labels, (0, 1), value=head.ignore_index)[..., 1:] if shift else labels
    valid = (y != head.ignore_index) & (y < head.V)  # an ignore_index of any size
    with small_blocks(head):
        stats = None
        if given_stats and not shift:
            stats = token_stats(made.hidden, made.weight, labels, entropy=entropy, **options)
        found = token_logprobs(
            made.hidden, made.weight, labels, stats=stats, entropy=entropy, shift=shift, impl=impl, **options
        )
        log_p, entropies = ([] if x is None else [x] for x in found)
        assert bool(entropies) == entropy
        ours = torch.stack(log_p + entropies)  # (1 or 2, ...)
        assert ours.dtype == head.result_dtype and ours.shape[1:] == labels.shape
        ours = torch.cat([ours[..., 1:], ours[..., :1]], -1) if shift else ours  # by rows again
        assert (ours[:, ~valid] == 0).all()
        ours = ours.reshape(len(ours), -1)
        truth = truth_of(head, made, valid)
        at, valid = torch.where(valid, y, 0).reshape(-1).long(), valid.reshape(-1)
        known = truth.statistics(at)
        exact = torch.stack([-known["nll"][0], known["entropy"][0]][: len(ours)])
        for i, name in enumerate(("nll", "entropy")[: len(ours)]):
            assert_within(name, ours[i][valid], exact[i][valid], known[name][1].detach()[valid])
        # a label that cannot be has no gradient that were a number
        upstream = weights_of_rows(head, ours.shape) * valid * exact.isfinite()
        size = upstream.abs().double()
        mass = size[0][:, None] * (truth.p + one_hot(at, head.V))
        if entropy:
            spread = truth.log_p_or_0.abs() + known["entropy"][0][:, None]
            mass = mass + size[1][:, None] * truth.p * (1 + spread)
        loss, total = ((upstream * torch.where(exact.isfinite(), x, 0)).sum() for x in (ours, exact))
        check_gradients(loss, made, inputs, truth, total, mass, 2 * truth.rounding)


def keep_of(head, kind, shape):
    random = head.generator(3)
    kept = torch.rand(shape, generator=random) < 0.6
    if kind == "bool":
        return kept
    return (torch.randn(shape, generator=random) * kept).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)


@given(
    head=heads(bias=FINITE, temperature=1.0),
    frozen=frozen_inputs,
    impl=impls,
    keep=st.sampled_from(["bool", "real", "bfloat16"]),
    denominator=st.sampled_from([None, 7, 0.5, 0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    reduction=st.sampled_from(["sum", "none"]),
    given_stats=st.booleans(),
)
def test_selected_cross_entropy(head, frozen, impl, keep, denominator, smoothing, z_loss, reduction, given_stats):
    made, inputs = trained(head, frozen)
    options = {"bias": made.bias, "ignore_index": head.ignore_index, "softcap": head.softcap}
    options["logit_scale"] = head.logit_scale
    keep, valid = keep_of(head, keep, made.labels.shape), made.valid
    keep = keep.masked_fill(~valid, torch.nan) if keep.is_floating_point() else keep | ~valid  # never counts
    with small_blocks(head):
        stats = token_stats(made.hidden, made.weight, made.labels, logit_sum=True, **options) if given_stats else None
        terms = {"label_smoothing": smoothing, "z_loss": z_loss, "reduction": reduction, "denominator": denominator}
        ours = selected_cross_entropy(
            made.hidden, made.weight, made.labels, keep, stats=stats, impl=impl, **terms, **options
        )
        assert ours.dtype == head.result_dtype
        truth = truth_of(head, made, valid, temperature=False)
        weight = torch.where(valid, keep, 0).double().reshape(-1)
        divisor = (weight.abs().sum() if reduction == "sum" else 1) if denominator is None else denominator
        weight = weight / divisor if divisor else weight * 0  # nothing to divide by: a loss of 0
        at = torch.where(valid, made.labels, 0).reshape(-1).long()
        known = truth.statistics(at)
        (nll, of_nll), (lse, of_lse), (total, of_total) = (known[name] for name in ("nll", "lse", "logit_sum"))
        rows = (1 - smoothing) * nll + smoothing * (lse - total / head.V) + z_loss * lse**2
        of_rows = of_nll + smoothing * (of_lse + of_total / head.V) + 2 * z_loss * lse.abs() * of_lse
        size = nll + smoothing * (nll + lse.abs() + total.abs() / head.V) + z_loss * lse**2
        # the weights' own sum and quotient, and the sum of the losses
        of_rows = (of_rows + truth.eps * (8 + len(rows)) * size) * weight.abs()
        exact, allowed = (x if reduction == "none" else x.sum() for x in (weight * rows, of_rows.detach()))
        upstream = weights_of_rows(head, exact.shape)
        assert_within("loss", ours.reshape(exact.shape), exact, allowed)
        scale = upstream.abs().double() * weight.abs()
        mass = (1 + 2 * z_loss * lse.abs())[:, None] * truth.p + one_hot(at, head.V) + smoothing / head.V
        loss, of_all = (upstream * ours.reshape(exact.shape)).sum(), (upstream * exact).sum()
        rounding = 2 * truth.rounding + truth.eps * (8 + len(rows))
        check_gradients(loss, made, inputs, truth, of_all, mass * scale[:, None], rounding)


@given(head=heads(), frozen=frozen_inputs, impl=impls, named=st.integers(1, 6), int32=st.booleans())
def test_logprobs_at(head, frozen, impl, named, int32):
    """Ids in any order, some of them twice; those of rows that do not count are not read."""
    made, inputs = trained(head, frozen)
    random, mask = head.generator(4), made.valid
    ids = torch.randint(0, head.V, (*mask.shape, named), generator=random)
    given_ids = ids.masked_fill(~mask[..., None], 10**6)
    with small_blocks(head):
        ours = logprobs_at(
            made.hidden,
            made.weight,
            given_ids.int() if int32 else given_ids,
            mask=mask,
            bias=made.bias,
            impl=impl,
            **head.options,
        )
        assert ours.dtype == head.result_dtype and ours.shape == ids.shape and (ours[~mask] == 0).all()
        truth = truth_of(head, made, mask)
        at, mask, ours = ids.reshape(-1, named), mask.reshape(-1), ours.reshape(-1, named)
        exact = truth.log_p.gather(-1, at)
        allowed = truth.rounding[:, None] + truth.error.gather(-1, at)
        allowed = allowed + 2 * truth.eps * truth.z.gather(-1, at).abs()
        assert_within("log p", ours[mask], exact[mask], allowed.detach()[mask])
        upstream = weights_of_rows(head, exact.shape) * mask[:, None] * exact.isfinite()
        size = upstream.abs().double()
        mass = size.sum(-1, keepdim=True) * truth.p
        mass = mass.scatter_add(-1, at, size)
        loss, total = ((upstream * torch.where(exact.isfinite(), x, 0)).sum() for x in (ours, exact))
        check_gradients(loss, made, inputs, truth, total, mass, 2 * truth.rounding)
