from __future__ import annotations

import itertools

import pytest
import torch
from oracles import attention_lse, attention_scores, visible
from torch.utils.flop_counter import FlopCounterMode

from tokensel import prompt_attention_mass, uniform_prompt_mass

B, HQ, HK, S, D = 2, 6, 2, 41, 16


def make(dtype=torch.float32, **changes):
    """q, k and the masks of two rows: left and right padding, packing, two turns, a mixed query mask."""
    q, k = torch.randn(B, HQ, S, D).to(dtype) * 2, torch.randn(B, HK, S, D).to(dtype) * 2
    position = torch.arange(S).expand(B, S)
    key_mask = torch.stack([position[0] >= 5, position[1] < 29])  # before a prompt token, after a response token
    prompt = (position % 17) < 8
    segments = torch.stack([(position[0] >= 20).long(), (position[1] >= 9).long() + (position[1] >= 24)])
    turns = torch.diff(prompt.long(), prepend=prompt[:, :1].long()).abs().cumsum(-1)
    options = {
        "key_mask": key_mask,
        "segment_ids": segments,
        "turn_ids": turns,
        "query_mask": torch.rand(B, S) < 0.7,
        "window": 12,
        "softcap": 3.0,
        "scale": 0.4,
        "sinks": torch.randn(HQ) * 2,
    }
    return q, k, prompt, {name: options[name] for name in changes if changes[name]}


def definition(q, k, prompt, dtype=torch.float64, **o):
    """Softmax over visible keys (and the sink), summed over prompt keys, mean over heads."""
    see = visible(prompt, o.get("key_mask"), o.get("segment_ids"), o.get("window"))
    z = attention_scores(q, k, o.get("scale"), o.get("softcap"), dtype).masked_fill(~see[:, None], -torch.inf)
    weight = (z - z.amax(-1, keepdim=True).nan_to_num(neginf=0)).exp()
    total = weight.sum(-1)
    if "sinks" in o:
        total = total + (o["sinks"].to(dtype)[None, :, None] - z.amax(-1).nan_to_num(neginf=0)).exp()
    counts = see & prompt[:, None, :]
    if "turn_ids" in o:
        counts &= o["turn_ids"][:, :, None] != o["turn_ids"][:, None, :]
    mass = ((weight * counts[:, None]).sum(-1) / total.clamp(min=1e-300)).mean(1)
    key_mask = o.get("key_mask", torch.ones_like(prompt))
    asked = (o["query_mask"] if "query_mask" in o else ~prompt) & key_mask
    return torch.where(asked, mass, 0)


NAMES = ("key_mask", "segment_ids", "turn_ids", "query_mask", "window", "softcap", "scale", "sinks")
COMBINATIONS = [(), NAMES, *[(n,) for n in NAMES], *itertools.combinations(NAMES, 2)]


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_mass_equals_its_definition_under_every_pair_of_options(names, given_lse, monkeypatch):
    monkeypatch.setattr("tokensel.ops.score_blocks.BLOCK_ELEMENTS", 400)  # a few rows at a time
    q, k, prompt, options = make(torch.float64, **dict.fromkeys(names, True))
    exact = definition(q, k, prompt, **options)
    lse = attention_lse(q, k, prompt, **options) if given_lse else None
    mass = prompt_attention_mass(q, k, prompt, lse=lse, **options)
    torch.testing.assert_close(mass, exact, rtol=1e-10, atol=1e-12)
    assert exact.count_nonzero() > 10


@pytest.mark.parametrize("names", [(), NAMES], ids=["plain", "all"])
def test_the_reference_is_the_definition(names):
    q, k, prompt, options = make(torch.float64, **dict.fromkeys(names, True))
    mass = prompt_attention_mass(q, k, prompt, impl="reference", **options)
    torch.testing.assert_close(mass, definition(q, k, prompt, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 1.0, 15.0], ids=["flat", "plain", "peaked"])
@pytest.mark.parametrize("names", [(), ("key_mask", "softcap"), NAMES], ids="+".join)
def test_error_is_at_most_twice_that_of_eager_float32(names, spread, dtype, given_lse):
    q, k, prompt, options = make(dtype, **dict.fromkeys(names, True))
    q = q * spread
    exact = definition(q, k, prompt, **options)
    eager = definition(q, k, prompt, dtype=torch.float32, **options)
    lse = attention_lse(q, k, prompt, **options).float()
    mass = prompt_attention_mass(q, k, prompt, lse=lse if given_lse else None, **options)
    # a float32 lse is itself rounded, by its own size; of peaked scores that is more than the rounding of the mass
    size = lse.abs().nan_to_num(posinf=0).max() if given_lse or spread > 1 else 1
    allowed = 2 * (eager - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * size
    assert mass.dtype == torch.float32
    assert (mass - exact).abs().max() <= allowed


def test_the_lse_of_pytorchs_flash_attention_fits():
    q, k, prompt, _ = make()
    full_k = k.repeat_interleave(HQ // HK, 1)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, full_k, full_k, 0.0, True)
    lse = out[1] if out[1].shape == (B, HQ, S) else out[1].transpose(1, 2)
    torch.testing.assert_close(
        prompt_attention_mass(q, k, prompt, lse=lse), definition(q, k, prompt).float(), rtol=1e-5, atol=1e-6
    )


def test_with_a_given_lse_only_prompt_columns_are_read():
    q, k, prompt, _ = make(torch.float64)
    lse = attention_lse(q, k, prompt)
    exact = definition(q, k, prompt)
    k[(~prompt)[:, None].expand(B, HK, S)] = torch.nan
    torch.testing.assert_close(prompt_attention_mass(q, k, prompt, lse=lse), exact)


def test_with_a_given_lse_only_prompt_columns_are_multiplied():
    q, k, _, _ = make(torch.float64)
    P = 11
    prompt = (torch.arange(S) < P).expand(B, S)
    lse = attention_lse(q, k, prompt)
    with FlopCounterMode(display=False) as products:
        prompt_attention_mass(q, k, prompt, lse=lse)
    assert products.get_total_flops() == B * HQ * (S - P) * P * 2 * D


@pytest.mark.parametrize("nothing_seen", [-torch.inf, torch.inf])
def test_rows_whose_given_lse_says_that_they_see_nothing_have_no_mass(nothing_seen):
    q, k, prompt, _ = make(torch.float64)
    lse = attention_lse(q, k, prompt)
    lse[:, :, 10:] = nothing_seen
    expected = definition(q, k, prompt)
    expected[:, 10:] = 0
    torch.testing.assert_close(prompt_attention_mass(q, k, prompt, lse=lse), expected)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["segment_ids", "turn_ids"])
def test_ids_may_come_back_after_others(name, impl):
    q, k, prompt, _ = make(torch.float64)
    ids = (torch.arange(S) // 9).expand(B, S)
    for again in (ids % 2, 7 - ids):  # the same runs under other numbers
        mass = prompt_attention_mass(q, k, prompt, impl=impl, **{name: again})
        torch.testing.assert_close(mass, definition(q, k, prompt, **{name: ids}))
        assert torch.equal(uniform_prompt_mass(prompt, **{name: again}), uniform_prompt_mass(prompt, **{name: ids}))


def test_attention_to_an_indicator_as_value_is_the_same_mass():
    q, k, prompt, _ = make(torch.float64)
    value = prompt[:, None, :, None].double().repeat(1, HQ, 1, D)
    indicated = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(HQ // HK, 1), value, is_causal=True
    )
    mass = prompt_attention_mass(q, k, prompt, query_mask=torch.ones_like(prompt))
    torch.testing.assert_close(mass, indicated[..., 0].mean(1))


def test_sinks_only_add_to_the_denominator():
    q, k, prompt, _ = make(torch.float64)
    plain = prompt_attention_mass(q, k, prompt)
    lse = attention_lse(q, k, prompt)
    for given in (None, lse):
        none = prompt_attention_mass(q, k, prompt, lse=given, sinks=torch.full((HQ,), -torch.inf))
        torch.testing.assert_close(none, plain)
        assert (prompt_attention_mass(q, k, prompt, lse=given, sinks=torch.full((HQ,), 1e4)) == 0).all()


def test_padding_is_never_read():
    q, k, prompt, options = make(key_mask=True)
    expected = prompt_attention_mass(q, k, prompt, **options)
    padding = ~options["key_mask"]
    q[padding[:, None].expand(B, HQ, S)] = torch.nan
    k[padding[:, None].expand(B, HK, S)] = torch.nan
    assert torch.equal(prompt_attention_mass(q, k, prompt, **options), expected)


def test_a_row_alone_gets_what_it_gets_in_a_batch_and_strides_do_not_matter():
    q, k, prompt, options = make(key_mask=True, segment_ids=True)
    expected = prompt_attention_mass(q, k, prompt, **options)
    alone = {name: value[1:] for name, value in options.items()}
    assert torch.equal(prompt_attention_mass(q[1:], k[1:], prompt[1:], **alone), expected[1:])
    strided_q, strided_k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    assert not strided_q.is_contiguous()
    torch.testing.assert_close(prompt_attention_mass(strided_q, strided_k, prompt, **options), expected)


def test_rows_that_are_not_asked_for_or_see_nothing_are_zero():
    q, k, prompt, _ = make()
    nothing = torch.zeros_like(prompt)
    assert (prompt_attention_mass(q, k, prompt, query_mask=nothing) == 0).all()
    assert (prompt_attention_mass(q, k, nothing) == 0).all()
    assert (prompt_attention_mass(q, k, prompt, key_mask=nothing) == 0).all()
    everything = torch.ones_like(prompt)
    mass = prompt_attention_mass(q, k, everything, query_mask=everything)
    torch.testing.assert_close(mass, torch.ones(B, S))


def test_an_untrained_attention_has_mass_p_over_i_plus_one():
    P = 11
    prompt = (torch.arange(S) < P).expand(B, S)
    mass = prompt_attention_mass(torch.zeros(B, HQ, S, D), torch.zeros(B, HK, S, D), prompt)
    expected = torch.tensor([0 if i < P else P / (i + 1) for i in range(S)])
    torch.testing.assert_close(mass, expected.expand(B, S))


@pytest.mark.parametrize(
    "names",
    [c for n in range(5) for c in itertools.combinations(("key_mask", "segment_ids", "turn_ids", "window"), n)],
    ids="+".join,
)
def test_uniform_mass_is_the_mass_of_zeroed_queries_and_keys(names):
    q, k, prompt, options = make(torch.float64, **dict.fromkeys(names, True))
    everything = torch.ones_like(prompt)
    mass = prompt_attention_mass(q * 0, k * 0, prompt, query_mask=everything, **options)
    uniform = uniform_prompt_mass(prompt, **options)
    asked = options.get("key_mask", everything)
    torch.testing.assert_close(uniform[asked], mass[asked].float())


@pytest.mark.parametrize("impl, holds_square", [("chunked", False), ("reference", True)])
def test_only_the_reference_holds_a_square_of_the_length(impl, holds_square, largest_tensor, monkeypatch):
    monkeypatch.setattr("tokensel.ops.score_blocks.BLOCK_ELEMENTS", 4096)
    q, k = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8)
    prompt = torch.arange(300)[None] < 100
    with largest_tensor:
        prompt_attention_mass(q, k, prompt, impl=impl)
    assert (largest_tensor.elements >= 300 * 300) == holds_square


def test_no_option_makes_it_hold_a_square_of_the_length(largest_tensor, monkeypatch):
    monkeypatch.setattr("tokensel.ops.score_blocks.BLOCK_ELEMENTS", 4096)
    q, k = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8)
    ids = torch.arange(300)[None] // 70
    masks = {"key_mask": torch.arange(300)[None] > 5, "segment_ids": ids, "turn_ids": ids, "window": 200}
    with largest_tensor:
        for lse in (None, torch.zeros(1, 4, 300)):
            everything = torch.ones(1, 300, dtype=torch.bool)
            options = {"query_mask": everything, "softcap": 5.0, "sinks": torch.zeros(4), "lse": lse}
            prompt_attention_mass(q, k, ids % 2 == 0, **masks, **options)
        uniform_prompt_mass(ids % 2 == 0, **masks)
    assert largest_tensor.elements == q.numel() < 300 * 300


Q, K, PROMPT = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor; got NoneType"),
        ({"k": K[0]}, ValueError, r"k must have shape .*; got \[2, 5, 8\]"),
        ({"k": K.long()}, TypeError, "k must have a floating-point dtype"),
        ({"prompt_mask": [True]}, TypeError, "prompt_mask must be a torch.Tensor; got list"),
        ({"key_mask": PROMPT[:1]}, ValueError, r"key_mask must have shape \[2, 5\]"),
        ({"segment_ids": PROMPT[:1].long()}, ValueError, r"segment_ids must have shape \[2, 5\]"),
        ({"turn_ids": PROMPT[:, :4].long()}, ValueError, r"turn_ids must have shape \[2, 5\]"),
        ({"lse": torch.zeros(2, 4, 5).long()}, TypeError, "lse must have a floating-point dtype"),
        ({"sinks": torch.zeros(4).long()}, TypeError, "sinks must have a floating-point dtype"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, chunked, reference, fused; got 'fast'"),
        ({"q": Q[0]}, ValueError, r"q must have shape \[B, Hq, S, d\]; got \[4, 5, 8\]"),
        ({"q": Q.long()}, TypeError, "q must have a floating-point dtype"),
        ({"k": K[:, :, :4]}, ValueError, r"k must have shape .*\[2, Hk, 5, 8\]; got \[2, 2, 4, 8\]"),
        ({"k": torch.zeros(2, 3, 5, 8)}, ValueError, "k has 3 heads, which does not divide the 4 heads of q"),
        ({"k": K.half()}, TypeError, "q is torch.float32 but k is torch.float16"),
        ({"prompt_mask": PROMPT[:, :4]}, ValueError, r"prompt_mask must have shape \[2, 5\]"),
        ({"prompt_mask": PROMPT.long()}, TypeError, r"prompt_mask must be torch.bool.*\.bool\(\)"),
        ({"key_mask": PROMPT.float()}, TypeError, "key_mask must be torch.bool"),
        ({"query_mask": PROMPT[0]}, ValueError, "query_mask must have shape"),
        ({"segment_ids": PROMPT}, TypeError, "segment_ids must have an integer dtype; got torch.bool"),
        ({"turn_ids": PROMPT.float()}, TypeError, "turn_ids must have an integer dtype"),
        ({"lse": torch.zeros(2, 2, 5)}, ValueError, r"lse must have shape \[2, 4, 5\]"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \[4\]"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"window": 0}, ValueError, "window must be positive"),
        ({"prompt_mask": PROMPT.to("meta")}, ValueError, "prompt_mask is on meta but q is on cpu"),
        ({"impl": "fused"}, ValueError, "needs a GPU and the tensors are on cpu; use impl='chunked'"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message, no_interpreter):
    arguments = {"q": Q, "k": K, "prompt_mask": PROMPT} | change
    with pytest.raises(error, match=message):
        prompt_attention_mass(**arguments)


@pytest.mark.parametrize("name", ["segment_ids", "turn_ids"])
def test_ids_on_another_device_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is on meta but q is on cpu"):
        prompt_attention_mass(Q, K, PROMPT, **{name: PROMPT.long().to("meta")})
