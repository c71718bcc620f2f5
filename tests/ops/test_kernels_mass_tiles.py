"""Attention mass where key tiles are of every kind: whole prompt, whole response, mixed, none; and the plan of them."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE
from oracles import attention_lse, visible

from tokensel import prompt_attention_mass

pytest.importorskip("triton")
from tokensel_kernels import attention_mass as kernels
from tokensel_kernels import attention_plan as plans
from tokensel_kernels import tiles

pytestmark = pytest.mark.usefixtures("poisoned_scratch")
S = 123  # eight key tiles of the interpreter, the last one ragged


def runs(*lengths):
    """[1, S]: which of the runs of these lengths a token is in; the last one goes on to the end."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.nn.functional.pad(ids[:S], (0, S - len(ids[:S])), value=len(lengths))[None].to(DEVICE)


POSITION = torch.arange(S, device=DEVICE)[None]
TURNS = runs(35, 20, 33, 4)  # prompt, response, prompt, response, prompt
CASES = {
    "one turn": ({"prompt": POSITION < 50}, 4),
    "prompt to the end of a tile": ({"prompt": POSITION < 48}, 3),
    "long prompt": ({"prompt": POSITION < 118}, 7),
    "no prompt": ({"prompt": POSITION < 0}, 1),
    "everything is prompt": ({"prompt": POSITION >= 0, "query_mask": POSITION >= 0}, 3),
    "turns": ({"prompt": TURNS % 2 == 0, "turn_ids": TURNS}, 3),
    "turns begin at the prompt": ({"prompt": TURNS % 2 == 0, "turn_ids": TURNS // 2}, 4),
    "short turns": ({"prompt": POSITION % 9 < 4, "turn_ids": POSITION // 9}, 1),
    "every row of a long turn": (
        {"prompt": POSITION < 110, "turn_ids": runs(30, 41), "query_mask": POSITION >= 0},
        1,
    ),
    "window below a tile": ({"prompt": POSITION % 40 < 20, "window": 7}, 4),
    "window of tiles": ({"prompt": POSITION < 70, "window": 55}, 7),
    "window without end": ({"prompt": POSITION < 70, "window": 2**40}, 1),
    "short documents": ({"prompt": POSITION % 11 < 6, "segment_ids": POSITION // 11}, 3),
    "long documents": ({"prompt": runs(40, 30, 25) % 2 == 0, "segment_ids": runs(60, 9)}, 4),
    "padding before": ({"prompt": POSITION < 60, "key_mask": POSITION >= 37}, 1),
    "padding behind": ({"prompt": POSITION < 60, "key_mask": POSITION < 90}, 7),
    "tiles of padding inside": ({"prompt": POSITION < 90, "key_mask": (POSITION < 20) | (POSITION > 70)}, 4),
    "holes in the queries": ({"prompt": POSITION < 40, "query_mask": (POSITION % 64 > 50) & (POSITION % 3 > 0)}, 1),
    "all at once": (
        {
            "prompt": TURNS % 2 == 0, "turn_ids": TURNS, "segment_ids": runs(64, 44), "window": 50,
            "key_mask": POSITION > 8, "query_mask": POSITION % 5 > 0,
        },
        3,
    ),
}  # fmt: skip


def check(name, given_lse, dtype=torch.float32, d=24, **more):
    options, group = CASES[name]
    options = options | more
    prompt = options.pop("prompt")
    q, k = (torch.randn(1, H, S, d, device=DEVICE).to(dtype) * 2 for H in (group, 1))
    exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference", **options)
    lse = attention_lse(q, k, prompt, **options).float() if given_lse else None
    mass = prompt_attention_mass(q, k, prompt, lse=lse, impl="fused", **options)
    torch.testing.assert_close(mass, exact.float(), rtol=5e-6, atol=1e-6)
    return mass


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("name", CASES)
def test_mass_over_tiles_of_every_kind(name, given_lse):
    check(name, given_lse)


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("name", ["turns", "all at once"])
def test_mixed_tiles_in_parts(name, given_lse, monkeypatch):
    monkeypatch.setitem(tiles.TILES["interpreter"]["attention"], 4, tiles.AttentionTile(32, 32, 4, 1, "widened"))
    check(name, given_lse)


@pytest.mark.parametrize("given_lse", [False, True], ids=["no lse", "lse"])
@pytest.mark.parametrize("d", [24, 64, 160], ids=str)  # padded, whole, in two products
def test_descriptors_load_what_pointers_load(d, given_lse, monkeypatch):
    pointers = check("turns", given_lse, torch.bfloat16, d, scale=0.1)
    torch.manual_seed(0)
    monkeypatch.setitem(tiles.CHIPS_WITH, "tma", ("interpreter",))
    seen = []
    source = kernels._key_source
    monkeypatch.setattr(kernels, "_key_source", lambda *a: seen.append(source(*a)) or seen[-1])
    torch.manual_seed(0)
    descriptors = check("turns", given_lse, torch.bfloat16, d, scale=0.1)
    assert sum(s is not None for s in seen) == (2 if d == 160 else 1)
    torch.testing.assert_close(descriptors, pointers, rtol=5e-6, atol=1e-6)


SINKS = torch.tensor([9.0, -torch.inf, 95.0], device=DEVICE)
SCORES = [
    {"scale": -0.3}, {"softcap": 59.0}, {"softcap": 300.0}, {"softcap": 59.0, "scale": -0.3, "sinks": SINKS},
    {"softcap": 300.0, "sinks": SINKS * 100}, {"scale": 0.0}, {"scale": 20.0}, {"scale": -20.0},
]  # fmt: skip


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_scores_of_any_size(scores):
    check("turns", False, d=16, **scores)


@pytest.mark.parametrize("scores", SCORES[:5], ids=str)  # a float32 lse of 1,000 is rounded by more than the mass
def test_scores_of_any_size_with_their_lse(scores):
    check("turns", True, d=16, **scores)


@pytest.mark.parametrize("nothing_seen", [-torch.inf, torch.inf])
def test_rows_whose_given_lse_says_that_they_see_nothing_have_no_mass(nothing_seen):
    q, k = torch.randn(1, 1, S, 16, device=DEVICE), torch.randn(1, 1, S, 16, device=DEVICE)
    prompt = POSITION < 50
    lse = attention_lse(q, k, prompt).float()
    expected = prompt_attention_mass(q, k, prompt, lse=lse, impl="fused")
    lse[:, :, 80:] = nothing_seen
    for sinks in (None, torch.full((1,), -torch.inf, device=DEVICE)):
        mass = prompt_attention_mass(q, k, prompt, lse=lse, sinks=sinks, impl="fused")
        torch.testing.assert_close(mass[:, :80], expected[:, :80])
        assert (mass[:, 80:] == 0).all() and (mass[:, 60:80] > 0).all()


def starts(ids):
    """[S]: where each token's run begins, as a list."""
    return [max((p for p in range(1, i + 1) if ids[p] != ids[p - 1]), default=0) for i in range(len(ids))]


def steps_of(plan, row_tile, tiles_in_all):
    """The three ranges of a plan as lists of (kind of list, tile)."""
    fields = plan.rows[0, row_tile].tolist()
    lists = plan.lists[0].flatten().tolist()

    def walk(stop, splits, shifts):
        places = [t + fields[shifts + sum(t >= fields[s] for s in splits)] for t in range(fields[stop])]
        assert all(0 <= place < 3 * tiles_in_all for place in places)
        return [lists[place] for place in places]

    PROMPT, OTHER, MIXED = (
        walk(stop.value, range(split, split + pieces - 1), shift.value)
        for stop, split, shift, pieces in (
            (plans.PROMPT_STOP, 0, plans.PROMPT_SHIFT, 1),
            (plans.OTHER_STOP, plans.OTHER_SPLIT.value, plans.OTHER_SHIFT, 2),
            (plans.MIXED_STOP, plans.MIXED_SPLIT.value, plans.MIXED_SHIFT, 6),
        )
    )
    return PROMPT, OTHER, MIXED


@pytest.mark.parametrize("only_prompt", [False, True], ids=["all keys", "prompt keys"])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_has_each_tile_once_and_without_a_mask_if_it_needs_none(name, only_prompt):
    options, group = CASES[name]
    prompt, window = options["prompt"], options.get("window")
    keys, rows = 16, 32
    key_mask = options.get("key_mask", torch.ones_like(prompt))
    asked = options.get("query_mask", ~prompt) & key_mask
    low, end = (
        torch.tensor([starts(options[n][0].tolist())], dtype=torch.int32, device=DEVICE) if n in options else None
        for n in ("segment_ids", "turn_ids")
    )
    arguments = ([m.to(torch.int8) for m in (prompt, asked, key_mask)], low, end)
    plan = plans.attention_plan(
        *arguments[0], low, end, window, only_prompt=only_prompt, group=group, rows=rows, keys=keys
    )  # fmt: skip
    see = visible(prompt, key_mask, options.get("segment_ids"), window)[0]
    counts = see & (prompt & key_mask)[0]
    if end is not None:
        counts = counts & (POSITION < end[0][:, None])
    present, prompt_keys = key_mask[0].tolist(), (prompt & key_mask)[0].tolist()
    tiles_in_all = -(-S // keys)
    whole_tiles = 0
    for row_tile in range(plan.rows.shape[1]):
        queries = sorted({p // group for p in range(row_tile * rows, (row_tile + 1) * rows) if p // group < S})
        queries = [i for i in queries if asked[0, i]]
        PROMPT, OTHER, MIXED = steps_of(plan, row_tile, tiles_in_all)
        assert len(PROMPT + OTHER + MIXED) == len({*PROMPT, *OTHER, *MIXED})
        for tile in range(tiles_in_all):
            columns = slice(tile * keys, min((tile + 1) * keys, S))
            seen, counted = see[queries, columns], counts[queries, columns]
            one_kind = all(present[columns]) and len(set(prompt_keys[columns])) == 1 and columns.stop % keys == 0
            if not (counted if only_prompt else seen).any():
                assert tile not in PROMPT + OTHER
            elif one_kind and seen.all() and counted.all():
                assert tile in PROMPT
            elif one_kind and seen.all() and not counted.any():
                assert tile in OTHER
            else:
                assert tile in MIXED
        whole_tiles += len(PROMPT + OTHER)
    few = {"short turns", "short documents", "window below a tile", "padding before", "no prompt"}
    assert whole_tiles > 0 or name in few


@pytest.mark.parametrize("only_prompt", [False, True], ids=["all keys", "prompt keys"])
def test_nearly_every_tile_of_a_long_row_needs_no_mask(only_prompt):
    length, group, rows, keys = 40_000, 4, 128, 128
    position = torch.arange(length, device=DEVICE)[None]
    prompt = (position < 10_000).to(torch.int8)
    plan = plans.attention_plan(
        prompt, 1 - prompt, None, None, None, None, only_prompt=only_prompt, group=group, rows=rows, keys=keys
    )  # fmt: skip
    PROMPT, OTHER, MIXED = (plan.rows[0, :, f.value] for f in (plans.PROMPT_STOP, plans.OTHER_STOP, plans.MIXED_STOP))
    response = slice(10_112 * group // rows, None)  # rows from the first tile on that is all response
    assert (PROMPT[response] == 10_000 // keys).all()
    assert MIXED.max() == (1 if only_prompt else 2)  # where the prompt ends, and the row itself
    if not only_prompt:
        assert OTHER[-1] == length // keys - 10_000 // keys - 1
        assert OTHER[response].diff().min() >= 0
    asked_tiles = slice(None, 10_000 * group // rows - 1)
    assert all((f[asked_tiles] == 0).all() for f in (PROMPT, OTHER, MIXED))


def test_rows_of_any_group_fill_their_tiles():
    for group, length in ((1, 33), (3, 16), (7, 17), (71, 1), (71, 5)):
        q, k = torch.randn(1, group, length, 16, device=DEVICE), torch.randn(1, 1, length, 16, device=DEVICE)
        prompt = torch.arange(length, device=DEVICE)[None] < length // 3
        exact = prompt_attention_mass(q.double(), k.double(), prompt, impl="reference")
        mass = prompt_attention_mass(q, k, prompt, impl="fused")
        torch.testing.assert_close(mass, exact.float(), rtol=5e-6, atol=1e-6)
