"""A store that is a directory of Parquet files with a manifest, and one that is larger than what is held of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from recorded import make_documents, select, write
from stored import padded

import tokensel.store.reader as reader_module
import tokensel.store.writer as writer_module
from tokensel.store import HistoryStore, HistoryWriter

pytestmark = pytest.mark.usefixtures("small_row_groups")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "PART_TOKENS", 120)
    return tmp_path / "base"


def written(path):
    return write(path, make_documents(), "base", model="tiny", max_length=64, dataset="rows")


def batch():
    """(ids, labels, losses, mask) of all documents, padded."""
    documents = [(ids, torch.where(response, ids, -100), losses["base"]) for ids, response, losses in make_documents()]
    return padded(documents)


def test_it_answers_as_one_file_does(folder):
    written(folder)
    assert len(list(folder.glob("part-*.parquet"))) > 3
    one, several = HistoryStore.open(written(folder.with_suffix(".parquet"))), HistoryStore.open(folder)
    ids, labels, _, mask = batch()
    assert torch.equal(several.lookup(ids, labels, key_mask=mask), one.lookup(ids, labels, key_mask=mask))
    assert several.fingerprint() == one.fingerprint() and len(several) == len(one) == 40
    assert several.metadata == one.metadata
    for part in folder.glob("part-*.parquet"):  # each is a store of its documents
        assert 0 < len(HistoryStore.open(part)) < 40


def test_the_same_documents_give_the_same_bytes(folder):
    written(folder)
    shutil.copytree(folder, folder.with_name("first"))
    shutil.rmtree(folder)
    written(folder)
    for file in sorted(os.listdir(folder)):
        assert (folder / file).read_bytes() == (folder.with_name("first") / file).read_bytes()


def test_a_failed_run_leaves_no_directory(folder):
    with pytest.raises(RuntimeError):
        with HistoryWriter(folder) as writer:
            ids, labels, nll, mask = batch()
            writer.add(ids, labels, nll, key_mask=mask)
            raise RuntimeError
    assert os.listdir(folder.parent) == []


def test_weights_are_selected_from_and_into_directories(folder, tmp_path):
    documents = make_documents()
    stores = {name: write(tmp_path / name, documents, name) for name in ("base", "reference")}
    files = {name: write(tmp_path / f"{name}.parquet", documents, name) for name in ("base", "reference")}
    assert select(tmp_path / "w", "token_cleaning", stores) == 0
    assert select(tmp_path / "w.parquet", "token_cleaning", files) == 0
    one, several = (HistoryStore.open(tmp_path / name, content="weight") for name in ("w.parquet", "w"))
    assert one.fingerprint() == several.fingerprint()


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def change(folder, **changes):
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | changes))


def lose_a_part(folder):
    (folder / "part-00001.parquet").unlink()


def take_a_foreign_part(folder):
    writer_module.PART_TOKENS = 1 << 26
    write(folder / "part-00001.parquet", make_documents(seed=1), "base")


def add_a_part(folder):
    shutil.copy(folder / "part-00001.parquet", folder / "part-00099.parquet")


def cut_a_part(folder):
    whole = (folder / "part-00001.parquet").read_bytes()
    (folder / "part-00001.parquet").write_bytes(whole[: len(whole) // 2])


def name(file):
    def rename(folder):
        parts = manifest_of(folder)["parts"]
        change(folder, parts=[parts[0] | {"file": file}, *parts[1:]])

    return rename


@pytest.mark.parametrize(
    "harm, message",
    [
        (lose_a_part, "lacks part-00001.parquet, which its manifest names; copy the directory whole"),
        (take_a_foreign_part, "part-00001.parquet is of another store than the manifest"),
        (add_a_part, "has part-00099.parquet, which its manifest does not name"),
        (cut_a_part, "part-00001.parquet is of another store than the manifest|is not a readable Parquet file"),
        (name("../base.parquet"), "names '../base.parquet', which is no file of this directory"),
        (name("/etc/passwd"), "names '/etc/passwd', which is no file of this directory"),
        (name("manifest.json"), "names 'manifest.json', which is no file of this directory"),
        (lambda folder: change(folder, documents=41), "does not add up"),
        (lambda folder: change(folder, parts=[]), "has part-00000.parquet, which its manifest does not name"),
        (lambda folder: change(folder, parts=[{}]), "is no manifest of a history store"),
        (lambda folder: change(folder, parts=7), "is no manifest of a history store"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is no manifest of a history store"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is no manifest of a history store"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json, and so is no history store"),
        (lambda folder: change(folder, content="bread"), "holds 'bread', which this version of tokensel does not know"),
        (lambda folder: change(folder, format_version="1"), "has history format 1"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(folder, harm, message):
    written(folder)
    harm(folder)
    with pytest.raises(ValueError, match=message):
        HistoryStore.open(folder)


def test_a_store_that_is_not_finished_says_so(tmp_path):
    os.makedirs(tmp_path / "h.parquet.partial")
    with pytest.raises(FileNotFoundError, match="the store is not finished; wait, or go on with `tokensel score`"):
        HistoryStore.open(tmp_path / "h.parquet")


@pytest.mark.parametrize("held", [0, 100])
def test_a_large_store_reads_what_is_asked_for_and_holds_little(folder, monkeypatch, held):
    whole = HistoryStore.open(written(folder))
    monkeypatch.setattr(reader_module, "HELD_TOKENS", held)
    store = HistoryStore.open(folder)
    read, read_documents = [], reader_module.read_documents
    monkeypatch.setattr(reader_module, "read_documents", lambda table: read.append(1) or read_documents(table))
    ids, labels, nll, mask = batch()
    first = {"input_ids": ids[:2], "labels": labels[:2], "key_mask": mask[:2]}
    assert torch.equal(store.lookup(**first), torch.where(labels[:2] == -100, 0.0, nll[:2]))
    assert len(read) == 1  # of the many row groups
    assert torch.equal(store.lookup(ids, labels, key_mask=mask), whole.lookup(ids, labels, key_mask=mask))
    assert sum(map(len, store._held.values())) <= max(held, 70)  # a row group of 50 tokens, and its last document
    again = pickle.loads(pickle.dumps(store))  # as workers of a loader get it
    assert torch.equal(again.lookup(**first), store.lookup(**first))


def test_more_parts_than_a_process_may_have_open(folder, monkeypatch):
    monkeypatch.setattr(writer_module, "PART_TOKENS", 1)
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 1)
    written(folder)
    opened, at_once = [], []

    def counted(*args, **options):
        file = open(*args, **options)
        opened.append(file)
        at_once.append(sum(not each.closed for each in opened))
        return file

    monkeypatch.setattr(reader_module, "open", counted, raising=False)
    store = HistoryStore.open(folder)
    assert len(store) == 40 and len(opened) > 100 and max(at_once) <= 2


def test_what_is_damaged_later_is_named(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "HELD_TOKENS", 0)
    store, part = HistoryStore.open(written(folder)), folder / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    ids, labels, _, mask = batch()
    with pytest.raises(ValueError, match="part-00000.parquet cannot be read any more"):
        store.lookup(ids, labels, key_mask=mask)


def rewritten(path, change=lambda table: table, header=None, **options):
    """A store whose table or header somebody has changed."""
    made = pq.ParquetFile(path).metadata.metadata[b"tokensel"]
    header = made if header is None else header(json.loads(made))
    pq.write_table(change(pq.read_table(path)).replace_schema_metadata({b"tokensel": header}), path, **options)


def infinite(table):
    values = table["nll"].combine_chunks()
    flat = values.flatten().to_numpy().copy()
    flat[3] = torch.inf
    lists = pa.ListArray.from_arrays(values.offsets, flat, type=values.type)
    return table.set_column(2, table.schema.field(2), lists)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"header": lambda h: "[" * 100_000}, "has a header that cannot be read"),
        ({"header": lambda h: json.dumps(h | {"content": ["nll"]})}, "which this version of tokensel does not know"),
        ({"header": lambda h: json.dumps(h | {"chat": "x"})}, "has a chat without template and turns"),
        ({"header": lambda h: json.dumps({"format_version": 1})}, "the header of .* lacks tokenizer"),
        ({"change": infinite}, "a value that is infinite"),
        ({"change": lambda table: table.select(["key", "length"])}, "has the columns .* and so is no history store"),
    ],
)
def test_a_changed_file_is_named_with_what_is_wrong(tmp_path, change, message):
    path = written(tmp_path / "h.parquet")
    rewritten(path, **change)
    with pytest.raises(ValueError, match=message) as error:
        HistoryStore.open(path)
    assert str(path) in str(error.value)


def test_a_file_that_expands_is_refused_before_it_does(tmp_path):
    path = written(tmp_path / "h.parquet")
    values = pa.array([numpy.ones(1 << 20, numpy.float32)], pq.read_table(path).schema.field(2).type)

    def many(table):
        return pa.table([table["key"][:1], pa.array([1 << 20], pa.int32()), values], schema=table.schema)

    rewritten(path, many, compression="zstd")
    with pytest.raises(ValueError, match="would need .* bytes of memory, which no store of its size does"):
        HistoryStore.open(path)


def test_lists_that_lengths_do_not_fit_are_refused(tmp_path):
    path = written(tmp_path / "h.parquet")
    table = pq.read_table(path)
    lengths = table["length"].to_numpy().copy()
    lengths[:2] = lengths[0] - 1, lengths[1] + 1  # the sum stays
    changed = table.set_column(1, table.schema.field(1), [lengths])
    pq.write_table(changed.replace_schema_metadata(pq.ParquetFile(path).metadata.metadata), path)
    with pytest.raises(ValueError, match="lists that do not have the lengths of their documents"):
        HistoryStore.open(path)
