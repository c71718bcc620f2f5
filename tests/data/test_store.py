from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stored import LENGTHS, make_documents, make_tokenizer, padded, write

import tokensel.store.writer as writer_module
from tokensel.store import HistoryMissError, HistoryStore, HistoryWriter, tokenizer_fingerprint


def packed(documents):
    """(ids, labels, nll, segment_ids), each [1, T]."""
    ids, labels, nll = (torch.cat(parts)[None] for parts in zip(*documents, strict=True))
    segments = torch.cat([torch.full((len(d[0]),), i) for i, d in enumerate(documents)])[None]
    return ids, labels, nll, segments


def expected(labels, nll):
    return torch.where(labels == -100, 0.0, nll)


@pytest.mark.parametrize("side", ["left", "right"])
# Looking up


def test_lookup_survives_shuffling_filtering_and_either_padding(store, side):
    documents = [make_documents()[i] for i in (4, 0, 5, 3)]
    ids, labels, nll, mask = padded(documents, side)
    found = store.lookup(ids, labels, key_mask=mask)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    assert torch.equal(found, expected(labels, nll))


def test_lookup_survives_packing(store):
    documents = [make_documents()[i] for i in (5, 1, 2, 0)]
    ids, labels, nll, segments = packed(documents)
    assert torch.equal(store.lookup(ids, labels, segment_ids=segments), expected(labels, nll))


def test_lookup_survives_packing_with_padding_at_the_end(store):
    ids, labels, nll, segments = packed(make_documents()[:3])
    pad = (0, 3)
    ids, labels = torch.nn.functional.pad(ids, pad, value=7), torch.nn.functional.pad(labels, pad, value=-100)
    nll, segments = torch.nn.functional.pad(nll, pad), torch.nn.functional.pad(segments, pad, value=2)
    mask = torch.arange(ids.shape[1])[None] < ids.shape[1] - 3
    found = store.lookup(ids, labels, segment_ids=segments, key_mask=mask)
    assert torch.equal(found, expected(labels, nll))


def test_packed_scoring_writes_the_same_store_as_padded_scoring(store, tmp_path):
    ids, labels, nll, segments = packed(make_documents())
    with HistoryWriter(tmp_path / "packed.parquet") as writer:
        writer.add(ids, labels, nll, segment_ids=segments)
    other = HistoryStore.open(tmp_path / "packed.parquet")
    ids, labels, nll, mask = padded(make_documents(), "left")
    assert torch.equal(other.lookup(ids, labels, key_mask=mask), store.lookup(ids, labels, key_mask=mask))


def test_lookup_accepts_integer_masks_of_a_collator(store):
    ids, labels, nll, mask = padded(make_documents())
    assert torch.equal(store.lookup(ids, labels, key_mask=mask.long()), expected(labels, nll))


def test_the_first_token_of_a_document_is_never_a_response(store):
    # A padding collator leaves its label in place, a packing collator removes it: both must find the store.
    ids, labels, nll, segments = packed(make_documents()[:1])
    labels[0, 0] = ids[0, 0]
    found = store.lookup(ids, labels, segment_ids=segments)
    assert found[0, 0] == 0 and torch.equal(found[0, 1:], expected(labels, nll)[0, 1:])


def test_columns_and_metadata_of_the_file(tmp_path):
    path = write(
        tmp_path / "h.parquet",
        make_documents(),
        tokenizer=make_tokenizer(),
        model="m",
        max_length=9,
        dataset="d",
    )
    table = pq.read_table(path)
    assert table.schema.field("key").type == pa.int64()
    assert table.schema.field("length").type == pa.int32()
    assert table.schema.field("nll").type.value_type == pa.float32()
    assert table["length"].to_pylist() == LENGTHS
    assert [len(values) for values in table["nll"].to_pylist()] == LENGTHS
    ids, labels, nll = make_documents()[1]
    stored = torch.tensor(table["nll"][1].as_py())
    assert torch.equal(stored.isnan(), labels == -100)
    assert torch.equal(stored.nan_to_num(), expected(labels, nll))
    store = HistoryStore.open(path)
    assert len(store) == len(LENGTHS)
    assert store.metadata == {
        "format_version": 1,
        "content": "nll",
        "tokenizer": tokenizer_fingerprint(make_tokenizer()),
        "model": "m",
        "max_length": 9,
        "dataset": "d",
        "documents": len(LENGTHS),
        "tokens": sum(LENGTHS),
        "chat": None,
        "tokensel_version": store.metadata["tokensel_version"],
    }


def test_a_document_given_twice_is_stored_once(tmp_path):
    documents = make_documents()
    write(tmp_path / "h.parquet", [*documents, *documents[:2]])
    assert len(HistoryStore.open(tmp_path / "h.parquet")) == len(documents)


def test_row_groups_are_streamed_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 6)
    path = write(tmp_path / "h.parquet", make_documents())
    assert pq.ParquetFile(path).num_row_groups == 3
    ids, labels, nll, mask = padded(make_documents())
    assert torch.equal(HistoryStore.open(path).lookup(ids, labels, key_mask=mask), expected(labels, nll))


def test_memory_between_row_groups_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 6)
    sizes = []
    with HistoryWriter(tmp_path / "h.parquet") as writer:
        for ids, labels, nll in make_documents():
            writer.add(ids[None], labels[None], nll[None])
            sizes.append(writer._waiting_tokens)
    assert max(sizes) < 6


def test_a_missing_document_is_an_error_that_names_it_and_the_store(store):
    ids, labels, _, mask = padded(make_documents())
    ids[3, 1] += 1
    with pytest.raises(HistoryMissError) as error:
        store.lookup(ids, labels, key_mask=mask)
    message = str(error.value)
    assert "row 3" in message and "7 tokens" in message and str(ids[3, :7].tolist()) in message
    assert "rows.jsonl" in message and "'tiny'" in message and "max_length 64" in message
    assert "tokensel score" in message and str(store.path) in message
    assert isinstance(error.value, LookupError)


def test_a_document_cut_at_another_length_is_a_miss(store):
    ids, labels, _ = make_documents()[1]
    with pytest.raises(HistoryMissError, match="6 tokens"):
        store.lookup(ids[None, :6], labels[None, :6])


def test_a_missing_packed_document_is_named_by_its_own_tokens(store):
    ids, labels, _, segments = packed(make_documents()[:2])
    ids[0, -1] += 1
    with pytest.raises(
        HistoryMissError, match=r"9 tokens, the first 8: \[" + ", ".join(map(str, ids[0, 5:13].tolist()))
    ):
        store.lookup(ids, labels, segment_ids=segments)


def test_padding_without_a_mask_is_a_miss_that_says_what_to_pass(store):
    ids, labels, _, _ = padded(make_documents())
    with pytest.raises(HistoryMissError, match="key_mask"):
        store.lookup(ids, labels)


def test_another_stored_length_is_an_error(store):
    store._lengths += 1
    ids, labels, _ = make_documents()[0]
    with pytest.raises(HistoryMissError, match="5 tokens.*has 6 tokens in the history store"):
        store.lookup(ids[None], labels[None])


def test_a_document_without_a_response_need_not_be_stored(store):
    ids = torch.tensor([[3, 1, 4]])
    assert torch.equal(store.lookup(ids, torch.full_like(ids, -100)), torch.zeros(1, 3))


def test_other_response_tokens_are_an_error(store):
    ids, labels, _, mask = padded(make_documents())
    labels[1, 2] = ids[1, 2]
    with pytest.raises(HistoryMissError, match=r"row 1 .*other response tokens.*column 2 \(token 2 "):
        store.lookup(ids, labels, key_mask=mask)


def test_fewer_response_tokens_than_scored_are_fine(store):
    ids, labels, nll = make_documents()[1]
    labels[5:] = -100
    assert torch.equal(store.lookup(ids[None], labels[None]), expected(labels, nll)[None])
