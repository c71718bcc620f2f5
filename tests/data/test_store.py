from __future__ import annotations

import errno
import gc
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tokensel.store.writer as writer_module
from tokensel.store import HistoryMissError, HistoryStore, HistoryWriter, tokenizer_fingerprint

LENGTHS = [5, 9, 2, 7, 3, 8]


def make_tokenizer(words=("a", "b", "c")):
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_documents():
    """(ids, labels, nll) of documents in which the first third is prompt."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in LENGTHS:
        ids = torch.randint(0, 50, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = -100
        documents.append((ids, labels, torch.rand(length, generator=generator) * 5))
    return documents


def padded(documents, side="right"):
    """(ids, labels, nll, key_mask), each [B, S]; padding is filled with values that must not be read."""
    width = max(len(ids) for ids, _, _ in documents)
    ids = torch.full((len(documents), width), 7)
    labels = torch.full_like(ids, -100)
    nll = torch.full(ids.shape, torch.nan)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, document in enumerate(documents):
        length = len(document[0])
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], labels[row, place], nll[row, place] = document
        mask[row, place] = True
    return ids, labels, nll, mask


def packed(documents):
    """(ids, labels, nll, segment_ids), each [1, T]."""
    ids, labels, nll = (torch.cat(parts)[None] for parts in zip(*documents, strict=True))
    segments = torch.cat([torch.full((len(d[0]),), i) for i, d in enumerate(documents)])[None]
    return ids, labels, nll, segments


def expected(labels, nll):
    return torch.where(labels == -100, 0.0, nll)


def write(path, documents, **options):
    ids, labels, nll, mask = padded(documents)
    with HistoryWriter(path, **options) as writer:
        writer.add(ids[:2], labels[:2], nll[:2], key_mask=mask[:2])
        writer.add(ids[2:], labels[2:], nll[2:], key_mask=mask[2:])
    return path


def files(directory):
    return sorted(os.listdir(directory))


@pytest.fixture
def store(tmp_path):
    path = write(tmp_path / "h.parquet", make_documents(), model="tiny", max_length=64, dataset="rows.jsonl")
    return HistoryStore.open(path)


@pytest.mark.parametrize("side", ["left", "right"])
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


def test_another_tokenizer_is_refused_and_the_same_is_not(tmp_path):
    path = write(tmp_path / "h.parquet", make_documents(), tokenizer=make_tokenizer(), model="tiny")
    same = make_tokenizer()
    same.pad_token = same.eos_token
    same.padding_side = "left"
    assert len(HistoryStore.open(path, tokenizer=same)) == len(LENGTHS)
    with pytest.raises(ValueError, match="another tokenizer") as error:
        HistoryStore.open(path, tokenizer=make_tokenizer(("a", "c", "b")))
    assert str(path) in str(error.value) and "tokensel score" in str(error.value)


def test_fingerprint_sees_special_tokens():
    other = make_tokenizer()
    other.pad_token = "<pad>"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(make_tokenizer())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokensel score.*none.parquet"):
        HistoryStore.open(tmp_path / "none.parquet")


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("not parquet at all")
    with pytest.raises(ValueError, match=r"x\.parquet is not a readable Parquet file"):
        HistoryStore.open(tmp_path / "x.parquet")


def test_other_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"key": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is Parquet but not a history store"):
        HistoryStore.open(tmp_path / "x.parquet")


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "FORMAT_VERSION", 2)
    path = write(tmp_path / "h.parquet", make_documents())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="history format 2"):
        HistoryStore.open(path)


def test_a_truncated_store_and_a_damaged_page_are_refused(tmp_path):
    path = write(tmp_path / "h.parquet", make_documents())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        HistoryStore.open(path)
    value = make_documents()[1][2][-1].numpy().tobytes()
    at = whole.index(value)
    path.write_bytes(whole[:at] + bytes(b ^ 1 for b in value) + whole[at + 4 :])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        HistoryStore.open(path)


def test_a_store_whose_header_and_rows_disagree_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "h.parquet", make_documents())
    header = pq.ParquetFile(path).metadata.metadata[b"tokensel"]
    pq.write_table(pq.read_table(path).slice(1).replace_schema_metadata({b"tokensel": header}), path)
    with pytest.raises(ValueError, match="does not hold what its header says"):
        HistoryStore.open(path)


class FullFile:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("met_by", ["the magic bytes", "a row group", "the footer"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, met_by):
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 6)
    whole = write(tmp_path / "whole.parquet", make_documents())
    room = {"the magic bytes": 0, "a row group": 60, "the footer": whole.stat().st_size - 1}[met_by]
    whole.unlink()
    monkeypatch.setattr(writer_module, "open", lambda *a: FullFile(open(*a), room), raising=False)
    path = tmp_path / "h.parquet"
    with pytest.raises(OSError, match="nothing of this run was kept") as error:
        write(path, make_documents())
    assert error.value.errno == errno.ENOSPC and str(path) in str(error.value)
    assert files(tmp_path) == []
    gc.collect()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_device_leaves_nothing(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 6)
    monkeypatch.setattr(writer_module, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    ids, labels, nll, mask = padded(make_documents())
    with pytest.raises(OSError, match="nothing of this run was kept") as error:
        with HistoryWriter(tmp_path / "h.parquet") as writer:
            writer.add(ids, labels, nll, key_mask=mask)
            pytest.fail("the first row group must meet the full disk, not the end of a long run")
    assert error.value.errno == errno.ENOSPC
    assert files(tmp_path) == []
    gc.collect()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_exception_leaves_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 6)
    ids, labels, nll, mask = padded(make_documents())
    with pytest.raises(kind):
        with HistoryWriter(tmp_path / "h.parquet") as writer:
            writer.add(ids, labels, nll, key_mask=mask)
            assert files(tmp_path) != []
            raise kind
    assert files(tmp_path) == []
    gc.collect()


def test_a_failed_run_leaves_an_earlier_store_whole(tmp_path):
    path = write(tmp_path / "h.parquet", make_documents())
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        with HistoryWriter(path) as writer:
            writer.add(*(value[None] for value in make_documents()[0]))
            raise RuntimeError
    assert path.read_bytes() == before and files(tmp_path) == ["h.parquet"]


def test_the_store_appears_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "h.parquet"
    with HistoryWriter(path) as writer:
        writer.add(*(value[None] for value in make_documents()[0]))
        assert not path.exists()
    assert files(path.parent) == ["h.parquet"]


def test_an_empty_store_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no document was added"):
        with HistoryWriter(tmp_path / "h.parquet"):
            pass
    assert files(tmp_path) == []


def test_a_directory_is_refused_before_any_scoring(tmp_path):
    with pytest.raises(IsADirectoryError):
        with HistoryWriter(tmp_path):
            pytest.fail("the block must not run")


def test_adding_outside_a_block_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="with"):
        HistoryWriter(tmp_path / "h.parquet").add(*(value[None] for value in make_documents()[0]))


def test_an_nll_that_is_not_finite_is_refused(tmp_path):
    ids, labels, nll, mask = padded(make_documents())
    nll[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"nll\[2, 1\] is inf"):
        with HistoryWriter(tmp_path / "h.parquet") as writer:
            writer.add(ids, labels, nll, key_mask=mask)
    assert files(tmp_path) == []


def test_wrong_shapes_are_named(store, tmp_path):
    ids, labels, nll, _ = padded(make_documents())
    with pytest.raises(ValueError, match="labels must have shape"):
        store.lookup(ids, labels[:, 1:])
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, S\]"):
        store.lookup(ids[0], labels[0])
    with pytest.raises(ValueError, match="nll must have shape"):
        with HistoryWriter(tmp_path / "other.parquet") as writer:
            writer.add(ids, labels, nll[:, 1:])
