"""Attention mass of packed documents in FlashAttention's layout: [T, H, d], cu_seqlens and an lse of [H, T]."""

from __future__ import annotations

import pytest
import torch
from oracles import attention_lse

from tokensel import prompt_attention_mass, prompt_attention_mass_varlen
from tokensel.ops.products import HAS_TRITON

HQ, HK, D = 6, 2, 16
LENGTHS = (9, 3, 0, 41, 1, 23)  # an empty document is one
T = sum(LENGTHS)
CU_SEQLENS = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0, dtype=torch.int32)
IMPLS = ["chunked", "reference", *(["fused"] if HAS_TRITON else [])]
POSITION = torch.arange(T)
OPTIONS = {
    "turn_ids": POSITION // 7,
    "query_mask": POSITION % 5 != 0,
    "window": 12,
    "softcap": 3.0,
    "scale": 0.4,
    "sinks": torch.linspace(-2.0, 2.0, HQ),
}


def make(dtype=torch.float32):
    q, k = torch.randn(T, HQ, D).to(dtype) * 2, torch.randn(T, HK, D).to(dtype) * 2
    return q, k, POSITION % 9 < 5


def padded(q, k, prompt, options):
    """What the other entry says of the same tokens as one row of documents. [T]"""
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    rows = {name: o[None] if name in ("turn_ids", "query_mask") else o for name, o in options.items()}
    heads = (t.transpose(0, 1)[None] for t in (q, k))
    return prompt_attention_mass(*heads, prompt[None], segment_ids=documents[None], impl="reference", **rows)[0]


def lse_of(q, k, prompt, options):
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    heads = (t.transpose(0, 1)[None] for t in (q, k))
    return attention_lse(*heads, prompt[None], segment_ids=documents[None], **options)[0]


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("names", [(), ("turn_ids", "query_mask"), ("window", "sinks"), tuple(OPTIONS)], ids="+".join)
@pytest.mark.parametrize("impl", IMPLS)
def test_mass_equals_that_of_the_padded_entry(impl, names, given_lse):
    q, k, prompt = make()
    options = {name: OPTIONS[name] for name in names}
    exact = padded(q.double(), k.double(), prompt, options).float()
    lse = lse_of(q, k, prompt, options).float() if given_lse else None
    mass = prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS, lse=lse, impl=impl, **options)
    assert mass.shape == (T,) and mass.dtype == torch.float32
    torch.testing.assert_close(mass, exact, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_float64_stays_float64(impl):
    q, k, prompt = make(torch.float64)
    mass = prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS.long(), impl=impl)
    torch.testing.assert_close(mass, padded(q, k, prompt, {}), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_document_gets_what_it_gets_alone_with_the_lse_of_pytorchs_flash_attention(impl):
    q, k, prompt = make()
    lse = torch.empty(HQ, T)
    alone = torch.zeros(T)
    for start, stop in zip(CU_SEQLENS.tolist(), CU_SEQLENS.tolist()[1:], strict=False):
        if stop > start:
            heads = [t[start:stop].transpose(0, 1)[None] for t in (q, k)]
            full_k = heads[1].repeat_interleave(HQ // HK, 1)
            out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads[0], full_k, full_k, 0.0, True)
            length = stop - start
            lse[:, start:stop] = (out[1] if out[1].shape == (1, HQ, length) else out[1].transpose(1, 2))[0]
            alone[start:stop] = prompt_attention_mass(*heads, prompt[None, start:stop], impl="reference")[0]
    mass = prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS, lse=lse, impl=impl)
    torch.testing.assert_close(mass, alone, rtol=1e-5, atol=1e-6)
    assert (mass > 0).sum() > T // 4


@pytest.mark.parametrize("impl", IMPLS)
def test_other_documents_are_never_read(impl):
    q, k, prompt = make()
    expected = prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS, impl=impl)
    k[:9] = 1e4
    mass = prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS, impl=impl)
    torch.testing.assert_close(mass[9:], expected[9:], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    q, k, prompt = make()
    expected = prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS, impl=impl)
    both = torch.randn(T, HQ + HK + 1, D + 5)  # as a projection of q, k and v gives them, and no multiple of 16 bytes
    both[:, :HQ, :D], both[:, HQ : HQ + HK, :D] = q, k
    mass = prompt_attention_mass_varlen(both[:, :HQ, :D], both[:, HQ : HQ + HK, :D], prompt, CU_SEQLENS, impl=impl)
    torch.testing.assert_close(mass, expected)


def test_nothing_is_padded(largest_tensor, monkeypatch):
    monkeypatch.setattr("tokensel.ops.score_blocks.BLOCK_ELEMENTS", 4096)
    cu_seqlens = torch.tensor([0, 250, *range(251, 301)])  # padded, 51 rows of 250
    q, k = torch.randn(300, 4, 8), torch.randn(300, 2, 8)
    with largest_tensor:
        prompt_attention_mass_varlen(q, k, torch.arange(300) % 4 == 0, cu_seqlens)
    assert largest_tensor.elements == q.numel()


def test_no_token_is_no_mass():
    q, k = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    prompt = torch.zeros(0, dtype=torch.bool)
    for impl in IMPLS:
        assert prompt_attention_mass_varlen(q, k, prompt, torch.tensor([0, 0]), impl=impl).shape == (0,)


def test_borders_that_cannot_be_read_are_checked_on_the_device(monkeypatch):
    monkeypatch.setattr("tokensel.ops.prompt_mass_varlen.may_read_values", lambda like: False)
    q, k, prompt = make()
    expected = padded(q, k, prompt, {})
    torch.testing.assert_close(prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS), expected)
    with pytest.raises(RuntimeError, match="cu_seqlens: not from 0 to T without falling"):
        prompt_attention_mass_varlen(q, k, prompt, CU_SEQLENS.flip(0))


Q, K, PROMPT, BORDERS = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8), torch.zeros(5, dtype=torch.bool), [0, 2, 5]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor; got NoneType"),
        ({"q": Q.long()}, TypeError, "q must have a floating-point dtype"),
        ({"q": Q[None]}, ValueError, r"q must have shape \[T, Hq, d\]; got \[1, 5, 4, 8\].*prompt_attention_mass"),
        ({"k": K[0]}, ValueError, r"k must have shape \[T, Hk, d\] = \[5, Hk, 8\]; got \[2, 8\]"),
        ({"k": K[:4]}, ValueError, r"k must have shape .*; got \[4, 2, 8\]"),
        ({"k": torch.zeros(5, 3, 8)}, ValueError, "k has 3 heads, which does not divide the 4 heads of q"),
        ({"k": K.half()}, TypeError, "q is torch.float32 but k is torch.float16"),
        ({"prompt_mask": None}, TypeError, "prompt_mask must be a torch.Tensor; got NoneType"),
        ({"prompt_mask": PROMPT[None]}, ValueError, r"prompt_mask must have shape \[5\] \(\[T\]\); got \[1, 5\]"),
        ({"prompt_mask": PROMPT.long()}, TypeError, r"prompt_mask must be torch.bool.*\.bool\(\)"),
        ({"query_mask": PROMPT[:4]}, ValueError, r"query_mask must have shape \[5\]"),
        ({"query_mask": PROMPT.float()}, TypeError, "query_mask must be torch.bool"),
        ({"turn_ids": PROMPT}, TypeError, "turn_ids must have an integer dtype; got torch.bool"),
        ({"turn_ids": PROMPT[:2].long()}, ValueError, r"turn_ids must have shape \[5\]"),
        ({"lse": torch.zeros(5, 4)}, ValueError, r"lse must have shape \[4, 5\] \(\[Hq, T\]\); got \[5, 4\]"),
        ({"lse": torch.zeros(4, 5).long()}, TypeError, "lse must have a floating-point dtype"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \[4\]"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"window": -1}, ValueError, "window must be positive"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, chunked, reference, fused; got 'fast'"),
        ({"cu_seqlens": BORDERS}, TypeError, "cu_seqlens must be a torch.Tensor; got list"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be torch.int32 or torch.int64"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, r"cu_seqlens must have shape \[n \+ 1\].*got \[1\]"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"cu_seqlens must have shape \[n \+ 1\].*got \[1, 2\]"),
        ({"cu_seqlens": torch.tensor([2, 3])}, ValueError, "must go from 0 to 5, .*; got 2 to 3; if .* are lengths"),
        (
            {"cu_seqlens": torch.tensor([0, 4])},
            ValueError,
            "from 0 to 5, the number of tokens of q; got 0 to 4",
        ),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, ValueError, "must never fall; got 4 and then 2 at entry 2"),
        ({"cu_seqlens": torch.tensor([0, 5]).to("meta")}, ValueError, "cu_seqlens is on meta but q is on cpu"),
        ({"turn_ids": PROMPT.long().to("meta")}, ValueError, "turn_ids is on meta but q is on cpu"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message):
    arguments = {"q": Q, "k": K, "prompt_mask": PROMPT, "cu_seqlens": torch.tensor(BORDERS)} | change
    with pytest.raises(error, match=message):
        prompt_attention_mass_varlen(**arguments)
