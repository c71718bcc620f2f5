"""Fixtures that several files of this folder share."""

from __future__ import annotations

import pytest
from tiny import padded, samples
from training import TOKENIZER, build, record

from tokensel.testing import make_model


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """The losses of another model than the one that is trained, so that REL is far above rounding."""
    return record(tmp_path_factory.mktemp("history") / "h.parquet", build(seed=2))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(directory, model): another hidden size, the same tokenizer, and a head padded by seven rows."""
    path = tmp_path_factory.mktemp("reference")
    model = make_model(TOKENIZER, hidden_size=48, layers=1, heads=4, kv_heads=2, seed=5).double()
    model.resize_token_embeddings(len(TOKENIZER) + 7)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path), model


@pytest.fixture
def batch():
    return padded(samples())
