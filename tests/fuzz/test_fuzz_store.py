"""Losses that are written in one batch layout and looked up in another."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from drawn_batches import corpora, documents, layouts
from hypothesis import given
from hypothesis import strategies as st

import tokensel.store.writer as writer_module
from tokensel.store import HistoryMissError, HistoryStore, HistoryWriter


def losses_of(corpus, seed):
    """The same for documents of the same tokens, of which the store keeps one."""
    random = torch.Generator().manual_seed(seed)
    known = {}
    return [known.setdefault(tuple(d.ids), torch.rand(len(d.ids), generator=random)) for d in corpus]


@given(
    corpus=corpora,
    written=layouts,
    read=layouts,
    left_out=st.integers(0, 4),
    other=documents,
    group_tokens=st.sampled_from([1 << 20, 1, 9]),
    seed=st.integers(0, 999),
)
def test_history_store(corpus, written, read, left_out, other, group_tokens, seed):
    corpus = list({tuple(d.ids): d for d in corpus}.values())  # of equal tokens the first one's answers are kept
    losses = losses_of(corpus, seed)
    batch = written.of(corpus)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(writer_module, "ROW_GROUP_TOKENS", group_tokens):
        path = Path(folder) / "losses.parquet"
        with HistoryWriter(path) as writer:
            for _ in range(2):  # a document that comes again is stored once
                writer.add(batch.ids, batch.labels, batch.put(losses, torch.nan), **batch.bounds)
        store = HistoryStore.open(path)
    assert len(store) == len(corpus)
    some = [d for i, d in enumerate(corpus) if i != left_out] or corpus
    batch = read.of(some)
    found = store.lookup(batch.ids, batch.labels, **batch.bounds)
    assert found.dtype == torch.float32 and (found[~batch.valid] == 0).all()
    kept = [losses[corpus.index(d)] for d in some]
    for i, values in batch.take(found).items():
        assert torch.equal(values, torch.where(torch.tensor(some[i].response), kept[i], 0.0))
    known = {tuple(d.ids): d.response for d in corpus}.get(tuple(other.ids))
    batch = read.of([other])
    if all(not answer or (known and known[i]) for i, answer in enumerate(other.response)):
        store.lookup(batch.ids, batch.labels, **batch.bounds)  # nothing is asked that it does not know
    else:
        with pytest.raises(HistoryMissError):
            store.lookup(batch.ids, batch.labels, **batch.bounds)
