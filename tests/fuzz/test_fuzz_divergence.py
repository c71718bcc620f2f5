"""Divergences from a teacher, live or recorded, and the likeliest tokens that are recorded, against float64."""

from __future__ import annotations

import math

import torch
from drawn_heads import DTYPES, heads, impls, small_blocks
from hypothesis import given
from hypothesis import strategies as st
from rounding import Logits, assert_within
from test_fuzz_gradients import check_gradients, frozen_inputs, trained, truth_of, weights_of_rows

from tokensel import TopLogprobs, token_divergence, token_stats, top_logprobs

kinds = st.sampled_from(["forward_kl", "reverse_kl", "jsd", "tv"])


@given(head=heads(), impl=impls, share=st.floats(0, 1))
def test_top_logprobs(head, impl, share):
    made, k = head.tensors(), max(1, round(share * head.V))
    mask = made.valid
    with small_blocks(head):
        found = top_logprobs(
            made.hidden,
            made.weight,
            k,
            mask=mask,
            bias=made.bias,
            impl=impl,
            workspace_mib=head.workspace_mib(),
            **head.options,
        )
    assert isinstance(found, TopLogprobs) and found.logp.shape == found.ids.shape == (*mask.shape, k)
    assert found.logp.dtype == head.result_dtype and found.ids.dtype == torch.int64
    assert (found.logp[~mask] == -torch.inf).all() and (found.ids[~mask] == 0).all()
    truth, mask = truth_of(head, made, mask), mask.reshape(-1)
    logp, ids = (x.reshape(-1, k)[mask] for x in found)
    exact, rounding = truth.log_p.detach()[mask], truth.rounding.detach()[mask][:, None]
    rounding = rounding + truth.error[mask].amax(-1, keepdim=True)
    rounding = rounding + 2 * truth.eps * exact.abs().nan_to_num(posinf=0).amax(-1, keepdim=True)
    order = exact.sort(dim=-1, descending=True, stable=True)
    assert_within("log p", logp, order.values[:, :k], rounding)
    assert_within("log p of the ids", logp, exact.gather(-1, ids), rounding)
    assert (logp[:, 1:] <= logp[:, :-1]).all() and (ids.sort(-1).values.diff(dim=-1) > 0).all()
    plain = head.bias is None and head.softcap is None and head.logit_scale == head.temperature == 1
    if head.whole and plain:  # exact logits: of equal ones the smaller id comes first
        assert torch.equal(ids, order.indices[:, :k])


def terms_of(p, q, kind, beta):
    """(terms of the divergence of p from q, size of its derivative in log p over p): log-probabilities, the same."""
    possible = (p > -torch.inf) | (q > -torch.inf)
    p, q = torch.where(possible, p, -1e4), torch.where(possible, q, -1e4)
    if kind == "forward_kl":
        return torch.where(q.exp() > 0, q.exp() * (q - p), 0), q.exp() / p.exp().clamp(min=1e-300)
    if kind == "reverse_kl":
        return torch.where(p.exp() > 0, p.exp() * (p - q), 0), (p - q).abs() + 1
    if kind == "tv":
        return (p.exp() - q.exp()).abs() / 2, torch.ones_like(p)
    m = torch.logaddexp(q + math.log(beta), p + math.log(1 - beta))
    return beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m), (1 - beta) * (p - m).abs() + 1


@given(
    head=heads(),
    frozen=frozen_inputs,
    impl=impls,
    kind=kinds,
    beta=st.sampled_from([0.5, 0.1, 0.9]),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    own_head=st.booleans(),
    given_stats=st.booleans(),
)
def test_token_divergence(head, frozen, impl, kind, beta, width, dtype, own_head, given_stats):
    made, inputs = trained(head, frozen)
    mask, random = made.valid, head.generator(5)
    teacher = (
        head.matrix((*head.leading, width), dtype, head.spread, random),
        head.matrix((head.V, width), dtype, 1.0, random),
    )
    of_teacher = {"softcap": head.softcap, "logit_scale": head.logit_scale}
    if own_head or head.bias == "impossible":  # what the student cannot say the teacher cannot, either
        its_bias = torch.randn(head.V, generator=random)
        of_teacher = {"logit_scale": 0.6, "bias": its_bias}
        if head.bias == "impossible" and head.softcap is None:
            its_bias[1::2] = -torch.inf
        else:
            of_teacher["softcap"] = 4.0
    result = torch.promote_types(head.result_dtype, torch.promote_types(dtype, torch.float32))
    temperature = {"temperature": head.temperature}
    with small_blocks(head, models=2):
        stats = None
        if given_stats:
            labels = torch.where(mask, 0, -100)
            stats = (
                token_stats(made.hidden, made.weight, labels, bias=made.bias, **head.options),
                token_stats(*teacher, labels, **of_teacher, **temperature),
            )
        ours = token_divergence(
            (made.hidden, made.weight),
            teacher,
            mask,
            kind=kind,
            beta=beta,
            stats=stats,
            bias=made.bias,
            teacher_head=of_teacher if "bias" in of_teacher else None,
            impl=impl,
            **head.options,
        )
        assert ours.dtype == result and ours.shape == mask.shape and (ours[~mask] == 0).all()
        p = truth_of(head, made, mask)
        hidden = teacher[0].masked_fill(~mask[..., None], 0)
        # statistics are made of each model alone, and so in its own type
        own = torch.promote_types(dtype, torch.float32) if given_stats else result
        q = Logits(hidden, teacher[1], own, **of_teacher, **temperature, blocks=head.blocks)
        mask, ours, rounding = mask.reshape(-1), ours.reshape(-1), (p.rounding + q.rounding).detach()
        terms, slope = terms_of(p.log_p, q.log_p.detach(), kind, beta)
        exact = terms.sum(-1)
        allowed = rounding * (4 + 2 * terms.abs().sum(-1)) + 8 * p.eps * terms.abs().sum(-1)
        assert_within("divergence", ours[mask], exact[mask], allowed.detach()[mask])
        upstream = weights_of_rows(head, exact.shape).to(result) * mask
        share = 2 * rounding
        mass = p.p * (2 + slope + (p.p * slope).sum(-1, keepdim=True)) + q.p
        if kind == "tv":  # whose slope turns where both are equal but for rounding
            near = (p.p - q.p).abs() <= 4 * share[:, None] * (p.p + q.p)
            mass = mass + torch.where(near, p.p / share[:, None], 0)
            share = share + (p.p * near).sum(-1).detach()
        mass = mass * upstream.abs().double()[:, None]
        loss, total = (upstream * ours).sum(), (upstream * exact).sum()
        check_gradients(loss, made, inputs, p, total, mass, share)


@given(
    head=heads(bias=st.sampled_from([None, "plain"]), V=st.integers(2, 40)),
    frozen=frozen_inputs,
    impl=impls,
    kind=kinds,
    add_tail=st.booleans(),
    share=st.floats(0, 1),
    absent=st.booleans(),
)
def test_token_divergence_from_a_record(head, frozen, impl, kind, add_tail, share, absent):
    """Of a teacher that was recorded in float32; perhaps with entries that hold no token."""
    made, inputs = trained(head, frozen)
    mask, random, k = made.valid, head.generator(6), max(1, round(share * head.V))
    logp = (torch.randn((*mask.shape, head.V), generator=random) * 2).log_softmax(-1)
    ids = torch.rand(logp.shape, generator=random).argsort(-1)[..., :k]
    logp = logp.gather(-1, ids)
    if absent and k > 1:
        logp[..., -1], ids[..., -1] = -torch.inf, -7
    if kind == "reverse_kl" and add_tail:  # a rounded sum leaves what is known to a few percent
        add_tail = bool((1 - logp.double().exp().sum(-1) > 1e-3).all())
    with small_blocks(head):
        ours = token_divergence(
            (made.hidden, made.weight),
            TopLogprobs(logp, ids),
            mask,
            kind=kind,
            add_tail=add_tail,
            bias=made.bias,
            impl=impl,
            **head.options,
        )
        assert ours.dtype == head.result_dtype and (ours[~mask] == 0).all()
        truth, mask, ours = truth_of(head, made, mask), mask.reshape(-1), ours.reshape(-1)
        there = (logp > -torch.inf).reshape(-1, k)
        at = torch.where(there, ids.reshape(-1, k), 0)
        p = torch.where(there, truth.log_p.gather(-1, at), -torch.inf)  # (N, k)
        q, named = logp.reshape(-1, k).double(), torch.zeros(len(at), head.V).scatter_add(-1, at, there.float()) > 0
        tail = torch.zeros(len(at)).double()
        if add_tail:
            full = named.all(-1)
            rest = truth.log_p.masked_fill(named & ~full[:, None], -torch.inf).logsumexp(-1)
            rest = torch.where(full, -torch.inf, rest)
            of_rest = torch.where(rest == -torch.inf, 0, (1 - q.exp().sum(-1)).clamp(min=0))
            # of a tail t known to eps, t log t is wrong by eps log t
            log_size = 20 + rest.detach().abs().nan_to_num(posinf=0)
            tail = truth.eps * (k + 4) * (log_size + rest.detach().exp() / of_rest.clamp(min=1e-3))
            p, q = torch.cat([p, rest[:, None]], -1), torch.cat([q, of_rest.log()[:, None]], -1)
        else:
            p, q = p - p.logsumexp(-1, keepdim=True), q - q.logsumexp(-1, keepdim=True)
        terms, slope = terms_of(p, q, kind, 0.5)
        exact, rounding = terms.sum(-1), 2 * truth.rounding.detach() + truth.eps * (k + 4)
        known = mask & exact.isfinite()
        size = torch.where(terms.isfinite(), terms.abs(), 0).sum(-1)
        allowed = rounding * (6 + 3 * size) + 8 * truth.eps * size + tail
        assert_within("divergence", ours[known], exact[known], allowed.detach()[known])
        assert (ours[mask & ~exact.isfinite()] == torch.inf).all()
        if kind == "tv":  # whose slope turns where both are equal
            return
        upstream = weights_of_rows(head, exact.shape) * known
        slope = torch.where(slope.isfinite(), slope, 0)
        share = p.exp() * (2 + slope + (p.exp() * slope).sum(-1, keepdim=True)) + q.exp()
        mass = share.sum(-1, keepdim=True) * truth.p
        mass = mass.scatter_add(-1, at, torch.where(there, share[:, :k], 0))
        if add_tail:
            mass = mass + torch.where(named, 0, truth.p / rest.exp()[:, None]) * (1 + share[:, k:])
        mass = mass * upstream.abs().double()[:, None]
        loss, total = ((upstream * torch.where(known, x, 0)).sum() for x in (ours, exact))
        check_gradients(loss, made, inputs, truth, total, mass, rounding + tail)
