"""What a token belongs to, in any batch that its document can stand in, against plain Python."""

from __future__ import annotations

import torch
from drawn_batches import IGNORED, corpora, documents, layouts
from hypothesis import given
from hypothesis import strategies as st

from tokensel.documents import (
    BatchLayout,
    document_keys,
    documents_of,
    positions_in_document,
    prompt_keys,
    segments_from_positions,
    token_keys,
    turn_ids,
)

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(x):
    """The finaliser of splitmix64 on Python's integers."""
    x &= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def keys_of(ids):
    """(key of a document, keys of its tokens)"""
    key = mixed(sum(mixed(mixed((i + 1) * GOLDEN) + token) for i, token in enumerate(ids)))
    return key, [mixed(key + (i + 1) * GOLDEN) for i in range(len(ids))]


@given(corpus=corpora, layout=layouts)
def test_keys_and_positions(corpus, layout):
    batch = layout.of(corpus)
    keys, tokens = (f(batch.ids, **batch.bounds) for f in (document_keys, token_keys))
    positions = positions_in_document(batch.ids, **batch.bounds)
    found = zip(*(batch.take(x).items() for x in (keys, tokens, positions)), strict=True)
    for (i, own_keys), (_, own_tokens), (_, own_positions) in found:
        key, places = keys_of(corpus[i].ids)
        assert [k & WORD for k in own_keys.tolist()] == [key] * len(places)
        assert [k & WORD for k in own_tokens.tolist()] == places
        assert own_positions.tolist() == list(range(len(places)))
    assert (keys[~batch.valid] == 0).all() and (positions[~batch.valid] < 0).all()


@given(corpus=corpora, layout=layouts)
def test_batch_layout(corpus, layout):
    batch = layout.of(corpus)
    made = BatchLayout.of_segments(batch.ids, batch.labels, **batch.bounds)
    assert not made.response[~batch.valid].any() and torch.equal(made.response_labels != IGNORED, made.response)
    taken = (batch.take(x) for x in (made.response, made.sample, made.predictable))
    numbers = []
    for (i, response), (_, sample), (_, predictable) in zip(*(x.items() for x in taken), strict=True):
        assert response.tolist() == corpus[i].response and predictable.tolist() == [False] + [True] * (len(sample) - 1)
        numbers += sample.unique().tolist()
    assert len(numbers) == len(set(numbers)) == len(batch.places)  # one each, and no two the same
    host = made.host_documents
    order = list(batch.places)  # rows from left to right
    assert host.lengths.tolist() == [len(corpus[i].ids) for i in order]
    assert [k & WORD for k in host.keys.tolist()] == [keys_of(corpus[i].ids)[0] for i in order]
    assert host.response.tolist() == [r for i in order for r in corpus[i].response]
    assert host.document.tolist() == [n for n, i in enumerate(order) for _ in corpus[i].ids]
    assert host.position.tolist() == [n for i in order for n in range(len(corpus[i].ids))]


@given(corpus=corpora, layout=layouts, with_positions=st.booleans())
def test_from_batch_reads_what_collators_give(corpus, layout, with_positions):
    batch = layout.of(corpus)
    given = {"input_ids": batch.ids, "labels": batch.labels}
    if batch.segment_ids is None:
        positions = (batch.valid.long().cumsum(-1) - 1).masked_fill(~batch.valid, 1)  # as transformers makes them
        given |= {"attention_mask": batch.valid.long()} | ({"position_ids": positions} if with_positions else {})
        made = BatchLayout.from_batch(given)
        expected = BatchLayout.of_segments(batch.ids, batch.labels, None, batch.valid)
    else:  # packed rows have positions and no mask
        place = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        starts = torch.ones_like(batch.valid)
        starts[:, 1:] = batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]
        positions = place - torch.where(starts, place, 0).cummax(-1).values
        assert torch.equal(segments_from_positions(positions), batch.segment_ids)
        made = BatchLayout.from_batch(given | {"position_ids": positions})
        expected = BatchLayout.of_segments(batch.ids, batch.labels, batch.segment_ids, None)
    for name in ("response", "sample", "predictable"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name


def counts_as_prompt(response, prompt, query, key):
    """Whether a key before a response token counts, by what `prompt_keys` promises."""
    if prompt == "all":
        return not response[key]
    if prompt == "first":
        return not any(response[: key + 1])
    return not all(response[key : query + 1])  # something stands between: another turn


@given(corpus=corpora, layout=layouts, prompt=st.sampled_from(["all", "first", "context"]))
def test_prompt_keys(corpus, layout, prompt):
    batch = layout.of(corpus)
    made = BatchLayout.of_segments(batch.ids, batch.labels, **batch.bounds)
    mask, turns = made.prompt_keys(prompt)
    assert torch.equal(mask, prompt_keys(made.response_labels, prompt, batch.segment_ids)[0])
    for i, (row, place) in batch.places.items():
        response = corpus[i].response
        own_mask, own_turns = mask[row, place].tolist(), None if turns is None else turns[row, place].tolist()
        for query in (q for q, answers in enumerate(response) if answers):
            for key in range(query):
                counts = own_mask[key] and (own_turns is None or own_turns[key] != own_turns[query])
                assert counts == counts_as_prompt(response, prompt, query, key), (i, query, key)


@given(corpus=corpora, layout=layouts)
def test_turns_are_runs(corpus, layout):
    labels = layout.of(corpus).labels
    for row, turns in zip((labels != IGNORED).tolist(), turn_ids(labels).tolist(), strict=True):
        changes = [a != b for a, b in zip(row, row[1:], strict=False)]
        assert turns == [sum(changes[:n]) for n in range(len(row))]


@given(corpus=corpora, how=st.sampled_from(["labels", "completion_mask", "tensors"]), padding=documents)
def test_documents_of_a_packed_row(corpus, how, padding):
    """Of each document its tokens and answers, whatever stands between on padding."""
    row = {"input_ids": [], "labels": [], "attention_mask": [], "seq_lengths": []}
    for document in corpus:
        row["input_ids"] += [*document.ids, *padding.ids]
        answers = zip(document.ids, document.answer, strict=True)
        row["labels"] += [*(token if answer else IGNORED for token, answer in answers), *padding.ids]
        row["attention_mask"] += [1] * len(document.ids) + [0] * len(padding.ids)
        row["seq_lengths"].append(len(document.ids) + len(padding.ids))
    if how == "completion_mask":
        row["completion_mask"] = [int(label != IGNORED) for label in row.pop("labels")]
    if how == "tensors":
        row = {name: torch.tensor(values) for name, values in row.items()}
    found = documents_of(row)
    assert [d["input_ids"] for d in found] == [document.ids for document in corpus]
    assert [[label != IGNORED for label in d["labels"]] for d in found] == [document.response for document in corpus]
