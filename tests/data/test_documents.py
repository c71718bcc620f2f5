from __future__ import annotations

import itertools

import pytest
import torch

from tokensel.documents import (
    document_index,
    document_keys,
    positions_in_document,
    prompt_keys,
    segments_from_positions,
    token_keys,
    turn_ids,
    uniform_from_keys,
)

DOCUMENTS = [torch.tensor(ids) for ids in ([5, 6, 7], [6, 5, 7], [5, 6, 7, 8], [9], [5, 5, 5, 5, 5])]


def padded(side):
    width = 7
    ids, mask = torch.full((5, width), 3), torch.zeros(5, width, dtype=torch.bool)
    for row, document in enumerate(DOCUMENTS):
        place = slice(0, len(document)) if side == "right" else slice(width - len(document), width)
        ids[row, place], mask[row, place] = document, True
    return ids, mask


def packed():
    segments = torch.cat([torch.full((len(d),), i) for i, d in enumerate(DOCUMENTS)])[None]
    return torch.cat(DOCUMENTS)[None], segments


@pytest.mark.parametrize("function", [document_keys, token_keys])
def test_keys_do_not_depend_on_row_padding_or_packing(function):
    ids, segments = packed()
    expected = function(ids, segments)[0]
    for side in ("left", "right"):
        ids, mask = padded(side)
        assert torch.equal(function(ids, key_mask=mask)[mask], expected)
        assert torch.equal(function(ids.flip(0), key_mask=mask.flip(0)).flip(0)[mask], expected)
    alone = torch.cat([function(d[None])[0] for d in DOCUMENTS])
    assert torch.equal(alone, expected)


def test_every_token_of_a_document_has_its_key_and_other_documents_have_others():
    ids, mask = padded("left")
    keys = document_keys(ids, key_mask=mask)
    assert (keys[~mask] == 0).all()
    found = [set(row[m].tolist()) for row, m in zip(keys, mask, strict=True)]
    assert all(len(f) == 1 for f in found)
    assert len(set.union(*found)) == len(DOCUMENTS)  # order, length and every id matter


def test_the_key_changes_with_two_tokens_swapped_one_changed_or_one_more_or_less():
    base = list(range(10, 22))
    swapped = []
    for i, j in itertools.combinations(range(12), 2):
        swapped.append(base.copy())
        swapped[-1][i], swapped[-1][j] = base[j], base[i]
    changed = [base[:i] + [99] + base[i + 1 :] for i in range(12)]
    resized = [base[:-1], base[1:], [*base, 0], [0, *base]]  # id 0 is a token too
    documents = [tuple(d) for d in (base, *swapped, *changed, *resized)]
    keys = {d: int(document_keys(torch.tensor([d]))[0, 0]) for d in documents}
    assert len(set(keys.values())) == len(set(documents)) == 1 + 66 + 12 + 4


MASK = 2**64 - 1


def mixed(x):
    """The finaliser of splitmix64 (Steele et al., 2014) on Python's integers."""
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


GOLDEN = 0x9E3779B97F4A7C15


def test_keys_and_draws_are_fixed_numbers():
    # a recorded history is looked up by these keys, so they may never change
    for document in ([5, 6, 7], [0], [128_255] * 9):
        key = mixed(sum(mixed(mixed((i + 1) * GOLDEN) + token) for i, token in enumerate(document)))
        places = [mixed(key + (i + 1) * GOLDEN) for i in range(len(document))]
        ids = torch.tensor([document])
        assert [k & MASK for k in document_keys(ids)[0].tolist()] == [key] * len(document)
        assert [k & MASK for k in token_keys(ids)[0].tolist()] == places
        for seed in (0, 42, -3):
            draws = [(mixed(place + mixed(seed * GOLDEN)) >> 11) / 2**53 for place in places]
            assert uniform_from_keys(token_keys(ids), seed)[0].tolist() == draws


def test_keys_hardly_collide():
    documents = torch.randint(0, 50, (20_000, 6)).unique(dim=0)
    assert document_keys(documents)[:, 0].unique().numel() == len(documents)
    assert token_keys(documents).unique().numel() == documents.numel()


def test_documents_are_numbered_by_their_first_place():
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    assert document_index(segments).tolist() == [[0, 0, 2, 2, 2], [5, 5, 5, 5, 9]]


def test_positions_skip_padding_and_restart_with_documents():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    ids = torch.ones_like(mask, dtype=torch.int64)
    assert positions_in_document(ids, key_mask=mask).tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, -1, -1]]
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    assert positions_in_document(ids, segments).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]


def test_packed_rows_may_hold_padding_anywhere():
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2, 2]])
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1, 0]]).bool()
    ids = torch.tensor([[3, 5, 6, 7, 3, 5, 6, 7, 9, 3]])
    assert positions_in_document(ids, segments, mask).tolist() == [[-1, 0, 1, 2, -1, 0, 1, 2, 0, -1]]
    keys = document_keys(ids, segments, mask)[0].tolist()
    alone = [int(document_keys(torch.tensor([d]))[0, 0]) for d in ([5, 6, 7], [9])]
    assert keys == [0, *[alone[0]] * 3, 0, *[alone[0]] * 3, alone[1], 0]


def test_segments_start_where_positions_do_not_go_up_by_one():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [3, 4, 5, 6, 7, 8, 9], [0, 1, 5, 6, 6, 2, 3]])
    assert segments_from_positions(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7, [0, 0, 1, 1, 2, 3, 3]]


def test_draws_are_uniform_and_depend_on_key_and_seed_alone():
    keys = torch.arange(100_000)
    draws = uniform_from_keys(keys, seed=1)
    assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand times
    distance = (draws.sort().values - (torch.arange(100_000) + 0.5) / 100_000).abs().max()
    assert distance < 1.95 / 100_000**0.5
    assert torch.equal(uniform_from_keys(keys.flip(0), seed=1).flip(0), draws)
    other = uniform_from_keys(keys, seed=2)
    assert torch.corrcoef(torch.stack([draws, other]))[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1].abs() < 0.02
    assert (draws == other).sum() == 0


LABELS = torch.tensor([[-100, -100, 1, 1, -100, 1, 1, -100, 1]])


def test_turns_are_runs_of_prompt_and_response():
    assert turn_ids(LABELS).tolist() == [[0, 0, 1, 1, 2, 3, 3, 4, 5]]


def test_prompt_all_is_every_token_that_is_no_response():
    prompt, turns = prompt_keys(LABELS, "all")
    assert prompt.tolist() == [[True, True, False, False, True, False, False, True, False]] and turns is None


def test_prompt_first_ends_with_the_first_response_of_each_document():
    prompt, turns = prompt_keys(LABELS, "first")
    assert prompt.tolist() == [[True, True] + [False] * 7] and turns is None
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    prompt, _ = prompt_keys(LABELS, "first", segments)
    assert prompt.tolist() == [[True, True, False, False, True, False, False, False, False]]
    # the second document begins with a response, so it has no first prompt
    prompt, _ = prompt_keys(LABELS, "first", torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]))
    assert prompt.tolist() == [[True, True] + [False] * 7]


def test_prompt_context_is_everything_outside_the_own_turn():
    prompt, turns = prompt_keys(LABELS, "context")
    assert prompt.all() and torch.equal(turns, turn_ids(LABELS))


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("all", {2: {0, 1}, 3: {0, 1}, 5: {0, 1, 4}, 7: {6}, 9: {6, 8}}),
        ("first", {2: {0, 1}, 3: {0, 1}, 5: {0, 1}, 7: {6}, 9: {6}}),
        ("context", {2: {0, 1}, 3: {0, 1}, 5: {0, 1, 2, 3, 4}, 7: {6}, 9: {6, 7, 8}}),
    ],
)
def test_prompt_keys_of_two_packed_documents_of_two_turns(prompt, expected):
    labels = torch.tensor([[-100, -100, 1, 1, -100, 1, -100, 1, -100, 1]])
    document = [0] * 6 + [1] * 4
    mask, turns = prompt_keys(labels, prompt, torch.tensor([document]))
    for query, keys in expected.items():
        earlier = [j for j in range(query + 1) if document[j] == document[query] and mask[0, j]]
        assert {j for j in earlier if turns is None or turns[0, j] != turns[0, query]} == keys


def test_another_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt must be one of all, first, context; got 'last'"):
        prompt_keys(LABELS, "last")
