from __future__ import annotations

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


def test_segments_start_where_positions_do_not_go_up_by_one():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [3, 4, 5, 6, 7, 8, 9]])
    assert segments_from_positions(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]


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


def test_prompt_context_is_everything_outside_the_own_turn():
    prompt, turns = prompt_keys(LABELS, "context")
    assert prompt.all() and torch.equal(turns, turn_ids(LABELS))


def test_another_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt must be one of all, first, context; got 'last'"):
        prompt_keys(LABELS, "last")
