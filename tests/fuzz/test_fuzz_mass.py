"""Attention mass on the prompt under random masks, packings and windows, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest import mock

import torch
from drawn_heads import DTYPES, impls, laid_out
from hypothesis import given
from hypothesis import strategies as st
from oracles import attention_scores, visible
from rounding import assert_within

from tokensel import prompt_attention_mass, prompt_attention_mass_varlen, uniform_prompt_mass
from tokensel.ops import score_blocks


@dataclass(frozen=True)
class Attention:
    """What queries, keys and masks are made of; printed as it is when a test fails."""

    B: int
    S: int
    heads: tuple[int, int]  # of keys, and queries a key
    d: int
    dtype: torch.dtype
    spread: float
    strides: str
    key_mask: str | None
    segments: bool
    turns: bool
    queries: bool
    window: int | None
    softcap: float | None
    scale: float | None
    sinks: bool
    lse: bool
    poison: bool
    elements: int  # of a block of scores
    seed: int

    def tensors(self):
        """(q, k, prompt, masks and ids by name)"""
        random = torch.Generator().manual_seed(self.seed)
        (Hk, group), shape = self.heads, (self.B, self.S)
        q, k = (
            laid_out((torch.randn(self.B, H, self.S, self.d, generator=random) * size).to(self.dtype), self.strides)
            for H, size in ((Hk * group, self.spread), (Hk, 1.0))
        )
        prompt = torch.rand(shape, generator=random) < torch.rand((), generator=random)
        place = torch.arange(self.S).expand(shape)
        padding = (torch.rand(self.B, 1, generator=random) * (self.S + 1)).long()
        masks = {
            None: None,
            "left": place >= padding,
            "right": place < padding,
            "holes": torch.rand(shape, generator=random) < 0.6,
        }
        runs = [(torch.rand(shape, generator=random) < 0.3).long().cumsum(-1) for _ in range(2)]
        found = {
            "key_mask": masks[self.key_mask],
            "segment_ids": runs[0] if self.segments else None,
            "turn_ids": runs[1] if self.turns else None,
            "query_mask": torch.rand(shape, generator=random) < 0.6 if self.queries else None,
            "sinks": torch.randn(Hk * group, generator=random) * 2 if self.sinks else None,
        }
        if self.poison and found["key_mask"] is not None:
            padding = ~found["key_mask"][:, None, :, None]
            q, k = (x.masked_fill(padding, torch.nan) for x in (q, k))
        return q, k, prompt, {name: value for name, value in found.items() if value is not None}

    @property
    def scores(self) -> dict:
        return {"window": self.window, "softcap": self.softcap, "scale": self.scale}


def attentions(**fixed) -> st.SearchStrategy[Attention]:
    drawn = {
        "B": st.integers(0, 2),
        "S": st.integers(0, 12),
        "heads": st.tuples(st.integers(1, 2), st.integers(1, 3)),
        "d": st.sampled_from([4, 1, 3, 16]),
        "dtype": st.sampled_from(DTYPES),
        "spread": st.sampled_from([1.0, 0.0, 15.0]),
        "strides": st.sampled_from(["plain", "gaps", "transposed", "offset"]),
        "key_mask": st.sampled_from([None, "left", "right", "holes"]),
        "segments": st.booleans(),
        "turns": st.booleans(),
        "queries": st.booleans(),
        "window": st.sampled_from([None, 1, 2, 5, 100]),
        "softcap": st.sampled_from([None, 3.0]),
        "scale": st.sampled_from([None, 0.4, -1.0]),
        "sinks": st.booleans(),
        "lse": st.booleans(),
        "poison": st.booleans(),
        "elements": st.sampled_from([2**19, 1, 20]),
        "seed": st.integers(0, 2**20),
    }
    return st.builds(Attention, **drawn | {name: st.just(value) for name, value in fixed.items()})


def truth(case, q, k, prompt, masks):
    """(mass, what it may be off, lse of the visible keys without sinks): [B, S], [B, S], [B, Hq, S]."""
    eps = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    q, k = q.nan_to_num(0).double(), k.nan_to_num(0).double()
    see = visible(prompt, masks.get("key_mask"), masks.get("segment_ids"), case.window)
    z = attention_scores(q, k, case.scale, case.softcap)
    terms = attention_scores(q.abs(), k.abs(), None if case.scale is None else abs(case.scale))
    error = (eps * ((case.d + 4) * terms + 4 * z.abs())).masked_fill(~see[:, None], 0).amax(-1)
    z = z.masked_fill(~see[:, None], -torch.inf)
    lse = z.logsumexp(-1)
    with_sink = lse
    if "sinks" in masks:
        with_sink = torch.logaddexp(lse, masks["sinks"].double()[:, None].expand(lse.shape))
    counts = see & prompt[:, None, :]
    if "turn_ids" in masks:
        counts &= masks["turn_ids"][:, :, None] != masks["turn_ids"][:, None, :]
    p = (z - with_sink[..., None].nan_to_num(neginf=0)).exp()
    mass = (p * counts[:, None]).sum(-1)  # (B, Hq, S)
    size = with_sink.abs().nan_to_num(posinf=0) + lse.abs().nan_to_num(posinf=0) + 1 + math.log(max(case.S, 1))
    allowed = (mass * (2 * error + eps * (8 + size))).mean(1) + eps
    asked = masks.get("query_mask", ~prompt) & masks.get("key_mask", torch.ones_like(prompt))
    return torch.where(asked, mass.mean(1), 0), allowed, lse


@given(case=attentions(), impl=impls)
def test_prompt_attention_mass(case, impl):
    q, k, prompt, masks = case.tensors()
    exact, allowed, lse = (x for x in truth(case, q, k, prompt, masks)) if case.S else (prompt.double(), 0, prompt)
    result = torch.promote_types(case.dtype, torch.float32)
    known = lse.to(result) if case.lse and case.S else None
    with mock.patch.object(score_blocks, "BLOCK_ELEMENTS", case.elements):
        mass = prompt_attention_mass(q, k, prompt, lse=known, impl=impl, **masks, **case.scores)
    assert mass.dtype == result
    assert_within("mass", mass, exact, allowed)


@given(case=attentions(B=1, key_mask=None, segments=False, poison=False), impl=impls, data=st.data())
def test_prompt_attention_mass_varlen(case, impl, data):
    """Documents one behind the other, some of them empty."""
    q, k, prompt, masks = case.tensors()
    cuts = sorted(data.draw(st.lists(st.integers(0, case.S), max_size=4)))
    borders = torch.tensor([0, *cuts, case.S], dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    document = torch.searchsorted(borders, torch.arange(case.S), right=True)[None]
    result = torch.promote_types(case.dtype, torch.float32)
    exact, allowed, lse = prompt.double(), 0, None
    if case.S:
        exact, allowed, lse = truth(case, q, k, prompt, masks | {"segment_ids": document})
    flat = {name: value if name == "sinks" else value[0] for name, value in masks.items()}
    known = lse[0].to(result) if case.lse and case.S else None
    with mock.patch.object(score_blocks, "BLOCK_ELEMENTS", case.elements):
        mass = prompt_attention_mass_varlen(
            q[0].transpose(0, 1),
            k[0].transpose(0, 1),
            prompt[0],
            borders,
            lse=known,
            impl=impl,
            **flat,
            **case.scores,
        )
    assert mass.dtype == result
    assert_within("mass", mass[None], exact, allowed)


@given(case=attentions(spread=0.0, softcap=None, sinks=False))
def test_uniform_prompt_mass(case):
    q, k, prompt, masks = case.tensors()
    masks.pop("query_mask", None)
    found = uniform_prompt_mass(prompt, window=case.window, **masks)
    assert found.dtype == torch.float32 and found.shape == prompt.shape
    if case.S:
        exact, _, _ = truth(case, q * 0, k * 0, prompt, masks | {"query_mask": torch.ones_like(prompt)})
        seen = masks.get("key_mask", torch.ones_like(prompt))
        assert_within("mass", found[seen], exact[seen], 2**-22)
        assert ((found >= 0) & (found <= 1)).all()
