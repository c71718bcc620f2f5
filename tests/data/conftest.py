"""Fixtures of the tests of recorded losses."""

from __future__ import annotations

import json

import pytest
import recorded
import stored

import tokensel.store.writer as writer_module
from tokensel.store import HistoryStore
from tokensel.testing import make_model, make_rows, make_tokenizer


@pytest.fixture
def small_row_groups(monkeypatch):
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 50)
    monkeypatch.delenv("TOKENSEL_TRACEBACK", raising=False)


@pytest.fixture
def stores(tmp_path):
    documents = recorded.make_documents()
    files = {}
    for i, name in enumerate(("base", "reference", "alone")):
        writer_module.ROW_GROUP_TOKENS = 50 + 23 * i  # so that the files' row groups end at different documents
        files[name] = recorded.write(tmp_path / f"{name}.parquet", documents, name)
    return files


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(make_rows(60, seed=5), vocab_size=320)
    make_model(tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=1, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [*recorded.ROWS, *recorded.ROWS[:5]]  # five rows come twice
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def store(tmp_path):
    path = stored.write(
        tmp_path / "h.parquet", stored.make_documents(), model="tiny", max_length=64, dataset="rows.jsonl"
    )
    return HistoryStore.open(path)
