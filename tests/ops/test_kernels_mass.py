"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter (small, ragged shapes)."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_inputs import NAMES, attention_inputs
from oracles import DTYPES, attention_lse

from tokensel import prompt_attention_mass

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")


# Any two options meet in all four ways, each on or off, in six sets: all of them, and five in which an option is where
# its pair of numbers says (Kleitman and Spencer, 1973).
NUMBERS = dict(zip(NAMES, itertools.combinations(range(5), 2), strict=False))
SETS = [(), NAMES, *(tuple(name for name in NAMES if i in NUMBERS[name]) for i in range(5))]


def test_any_two_options_meet_in_all_four_ways():
    for a, b in itertools.combinations(NAMES, 2):
        assert len({(a in names, b in names) for names in SETS[1:]}) == 4


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_mass_under_every_pair_of_options(names, given_lse):
    q, k, prompt, options = attention_inputs(names, torch.float32)
    exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference", **options)
    lse = attention_lse(q, k, prompt, **options).float() if given_lse else None
    mass = prompt_attention_mass(q, k, prompt, lse=lse, impl="fused", **options)
    torch.testing.assert_close(mass, exact.float(), rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_is_as_exact_as_eager_float32(dtype):
    q, k, prompt, options = attention_inputs(("key_mask", "softcap"), dtype)
    exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference", **options)
    eager = prompt_attention_mass(q, k, prompt, impl="reference", **options)
    mass = prompt_attention_mass(q, k, prompt, impl="fused", **options)
    eps = torch.finfo(torch.float32).eps
    assert (mass - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2 * eps


@pytest.mark.parametrize(
    "Hq, Hk, d",
    [(1, 1, 8), (4, 4, 64), (6, 2, 8), (6, 2, 64), (6, 2, 96), (6, 2, 256), (8, 1, 96), (7, 7, 8), (5, 1, 64)],
)
def test_head_sizes_and_groups(Hq, Hk, d):
    q, k, prompt, options = attention_inputs(("key_mask",), torch.float32, d, Hq, Hk)
    exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference", **options)
    mass = prompt_attention_mass(q, k, prompt, impl="fused", **options)
    torch.testing.assert_close(mass, exact.float(), rtol=5e-6, atol=1e-6)


def test_mass_of_strided_inputs_and_what_padding_holds():
    q, k, prompt, options = attention_inputs(("key_mask",), torch.bfloat16)
    expected = prompt_attention_mass(q, k, prompt, impl="fused", **options)
    padding = ~options["key_mask"]
    q[padding[:, None].expand(q.shape[:3])] = torch.nan
    k[padding[:, None].expand(k.shape[:3])] = torch.nan
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    assert torch.equal(prompt_attention_mass(q, k, prompt, impl="fused", **options), expected)
