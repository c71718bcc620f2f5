from __future__ import annotations

import errno
import gc
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stored import LENGTHS, make_documents, make_tokenizer, padded, write

import tokensel.store.writer as writer_module
from tokensel.documents import document_keys
from tokensel.store import HistoryStore, HistoryWriter, tokenizer_fingerprint


def files(directory):
    return sorted(os.listdir(directory))


# The file


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


@pytest.mark.parametrize("content", [{"content": "nll"}, {}], ids=["0.1", "the first ones, which did not say"])
def test_a_store_of_an_earlier_version_is_read(tmp_path, content):
    documents = make_documents()
    keys = [int(document_keys(ids[None])[0, 0]) for ids, _, _ in documents]
    lengths = [len(ids) for ids, _, _ in documents]
    losses = []
    for ids, labels, nll in documents:
        response = (labels != -100) & (torch.arange(len(ids)) > 0)
        losses.append(torch.where(response, nll.float(), torch.nan).tolist())
    schema = pa.schema(
        [
            pa.field("key", pa.int64(), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("nll", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        ]
    )
    header = {"format_version": 1, "tokenizer": None, "model": "m", "max_length": 64, "dataset": "d"} | content
    header |= {"documents": len(keys), "tokens": sum(lengths), "tokensel_version": "0.1.0"}
    table = pa.table({"key": keys, "length": lengths, "nll": losses}, schema=schema)
    pq.write_table(table.replace_schema_metadata({b"tokensel": json.dumps(header)}), tmp_path / "old.parquet")
    store = HistoryStore.open(tmp_path / "old.parquet")
    for (ids, labels, _), values in zip(documents, losses, strict=True):
        expected = torch.tensor(values).nan_to_num(0)
        assert torch.equal(store.lookup(ids[None], labels[None])[0], expected)
