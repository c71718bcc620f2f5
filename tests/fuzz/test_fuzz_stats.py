"""Statistics of random heads and logits against float64."""

from __future__ import annotations

import torch
from drawn_heads import DTYPES, heads, impls, laid_out, small_blocks
from hypothesis import assume, given
from hypothesis import strategies as st
from rounding import Distribution, Logits, assert_within

from tokensel import TokenStats, token_stats, token_stats_contrast, token_stats_from_logits, token_stats_pair

WANTED = ("entropy", "renyi2", "logit_sum", "rank")
OF_ENTROPY = ("entropy", "logp_var", "top1")
wanted = st.fixed_dictionaries({name: st.booleans() for name in WANTED})


def check(stats, truth, labels, valid, wanted, dtype):
    """Fields that were asked for, and no others; ignored rows have seen no vocabulary. truth: of all rows."""
    fields = {"lse", "target_logit", *(OF_ENTROPY if wanted["entropy"] else ())}
    fields |= {name for name in WANTED[1:] if wanted[name]}
    assert set(stats.fields()) == fields
    y = torch.where(valid, labels, 0).reshape(-1).long()
    expected, valid = truth.statistics(y), valid.reshape(-1)
    for name in (*fields - {"rank"}, "nll"):
        value = getattr(stats, name)
        assert value.dtype == dtype and value.shape == labels.shape
        value, (exact, allowed) = value.reshape(-1), expected[name]
        assert_within(name, value[valid], exact[valid], allowed[valid])
        nothing = -torch.inf if name in ("lse", "target_logit", "top1") else 0
        assert (value[~valid] == nothing).all(), name
    if wanted["rank"]:
        fewest, most = truth.ranks(y)
        rank = stats.rank.reshape(-1)
        assert ((rank >= fewest) & (rank <= most))[valid].all(), (rank, fewest, most)
        assert (rank[~valid] == 0).all()
    if wanted["entropy"]:
        assert not stats.correct.reshape(-1)[~valid].any()


def truth_of(head, hidden, weight, valid, bias, dtype):
    hidden = hidden.detach().masked_fill(~valid[..., None], 0)
    return Logits(hidden, weight, dtype, bias, **head.options, blocks=head.blocks)


@given(head=heads(), wanted=wanted, impl=impls)
def test_token_stats(head, wanted, impl):
    hidden, weight, labels, bias, valid = head.tensors()
    options = head.options | {"ignore_index": head.ignore_index, "workspace_mib": head.workspace_mib()}
    with small_blocks(head):
        stats = token_stats(hidden, weight, labels, bias=bias, impl=impl, **wanted, **options)
    truth = truth_of(head, hidden, weight, valid, bias, head.result_dtype)
    check(stats, truth, labels, valid, wanted, head.result_dtype)


@given(head=heads(), width=st.integers(1, 9), dtype=st.sampled_from(DTYPES), wanted=wanted, impl=impls)
def test_token_stats_pair(head, width, dtype, wanted, impl):
    """The history is of another width and type."""
    hidden, weight, labels, bias, valid = head.tensors()
    random = head.generator(1)
    history = (
        head.matrix((*head.leading, width), dtype, head.spread, random),
        head.matrix((head.V, width), dtype, 1.0, random),
    )
    options = head.options | {"ignore_index": head.ignore_index, "workspace_mib": head.workspace_mib()}
    with small_blocks(head):
        both = token_stats_pair((hidden, weight), history, labels, bias=bias, impl=impl, **wanted, **options)
    types = (head.result_dtype, torch.promote_types(dtype, torch.float32))
    for stats, model, result in zip(both, ((hidden, weight), history), types, strict=True):
        check(stats, truth_of(head, *model, valid, bias, result), labels, valid, wanted, result)


@given(
    head=heads(bias=st.sampled_from([None, "plain", "large", "small"])),
    width=st.integers(1, 9),
    beta=st.sampled_from([1.0, 0.0, 0.3, 4.0]),
    wanted=wanted,
    impl=impls,
)
def test_token_stats_contrast(head, width, beta, wanted, impl):
    hidden, weight, labels, bias, valid = head.tensors()
    random = head.generator(1)
    negative = (
        head.matrix((*head.leading, width), head.dtype, head.spread, random),
        head.matrix((head.V, width), head.weight_dtype or head.dtype, 1.0, random),
    )
    options = head.options | {"ignore_index": head.ignore_index, "workspace_mib": head.workspace_mib(models=2)}
    options |= {"bias": bias, "beta": beta, "impl": impl}
    with small_blocks(head):
        stats = token_stats_contrast((hidden, weight), negative, labels, **wanted, **options)
    dtype = head.result_dtype
    a, b = (truth_of(head, *model, valid, bias, dtype) for model in ((hidden, weight), negative))
    z = (1 + beta) * a.z - beta * b.z
    size = (1 + beta) * a.z.abs() + beta * b.z.abs()
    error = (1 + beta) * a.error + beta * b.error + 4 * a.eps * size.detach()
    check(stats, Distribution(z, error, dtype, head.blocks), labels, valid, wanted, dtype)


@given(
    head=heads(columns=2048),
    types=st.tuples(st.sampled_from(DTYPES), st.sampled_from([*DTYPES, None])),
    wanted=wanted,
    impl=impls,
)
def test_token_stats_from_logits(head, types, wanted, impl):
    """The history's logits may be of another type, or absent."""
    _, _, labels, bias, valid = head.tensors()
    random, models = head.generator(1), []
    for dtype in types:
        if dtype is not None:
            z = head.matrix((*head.leading, head.V), dtype, head.spread, random)
            z = z if bias is None else (z + bias).to(dtype)
            models.append(laid_out(z, head.strides).masked_fill(~valid[..., None] & head.poison, torch.nan))
    options = {"ignore_index": head.ignore_index, "workspace_mib": head.workspace_mib(columns=head.V), "impl": impl}
    both = token_stats_from_logits(models[0], labels, *models[1:], **wanted, **options)
    assert (both[1] is None) == (len(models) == 1)
    for stats, z in zip(both, models, strict=False):
        dtype = torch.promote_types(z.dtype, torch.float32)
        exact = z.masked_fill(~valid[..., None], 0).double().reshape(-1, head.V)
        check(stats, Distribution(exact, torch.zeros_like(exact), dtype), labels, valid, wanted, dtype)


@given(head=heads(leading=st.tuples(st.integers(0, 6)), columns=2048), wanted=wanted, data=st.data())
def test_merge_of_shards_in_any_order(head, wanted, data):
    """Shards of any size, each with the labels that it has; the others count as none of its rows."""
    hidden, weight, labels, bias, valid = head.tensors()
    assume(head.V > 1)
    cuts = data.draw(st.sets(st.integers(1, head.V - 1), max_size=6))
    edges = [0, *sorted(cuts), head.V]
    wanted = wanted | {"rank": False}  # of a shard it needs the label's logit
    parts = []
    for first, end in zip(edges, edges[1:], strict=False):
        here = (labels >= first) & (labels < end) & valid
        some = torch.where(here, labels - first, 0)
        options = head.options | {"bias": None if bias is None else bias[first:end]}
        part = token_stats(hidden.nan_to_num(0), weight[first:end], some, **wanted, **options)
        fields = part.fields() | {"target_logit": part.target_logit.masked_fill(~here, -torch.inf)}
        nothing = {"lse": -torch.inf, "top1": -torch.inf}  # what an ignored row has
        fields = {name: field.masked_fill(~valid, nothing.get(name, 0.0)) for name, field in fields.items()}
        fields["target_logit"] = fields["target_logit"].masked_fill(~valid, -torch.inf)
        parts.append(TokenStats(**fields))
    stats = TokenStats.merge(data.draw(st.permutations(parts)))
    truth = truth_of(head, hidden, weight, valid, bias, head.result_dtype)
    truth = Distribution(truth.z, truth.error, head.result_dtype, len(parts))
    check(stats, truth, labels, valid, wanted, head.result_dtype)
