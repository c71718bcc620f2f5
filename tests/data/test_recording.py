from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import next_token_nll
from recorded import LIMIT, ROWS, arguments, select

import tokensel.store.writer as writer_module
from tokensel import model_facts, ranking, recording
from tokensel.cli import main
from tokensel.data import encode_rows, load_rows
from tokensel.documents import document_keys
from tokensel.store import HistoryMissError, HistoryStore
from tokensel.store.encoded import write_documents
from tokensel.store.shards import Shards

pytestmark = pytest.mark.usefixtures("small_row_groups")

# `tokensel score`, killed and resumed


KILLED_WHILE_WRITING = """
import os, signal, sys
import tokensel.store.shards
import tokensel.store.writer
from tokensel.cli import main

tokensel.store.writer.ROW_GROUP_TOKENS = 50
tokensel.store.shards.SHARD_TOKENS = 1  # a shard a batch
records, last, write = 0, int(sys.argv[1]), tokensel.store.shards.pq.write_table
def write_until(table, path, **options):
    global records
    records += 1
    if records > last:  # in the middle of a shard
        path.write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    write(table, path, **options)
tokensel.store.shards.pq.write_table = write_until
main(sys.argv[2:])
"""


def run_until_killed(records, argv):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(records), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


APPEND = Shards.append


def break_after(records, monkeypatch):
    """The next run fails when it has recorded so many batches; the one after does not."""
    left = iter(range(records))

    def append(*args):
        if next(left, None) is None:
            monkeypatch.setattr(Shards, "append", APPEND)
            raise OSError("broken")
        APPEND(*args)

    monkeypatch.setattr(Shards, "append", append)


@pytest.fixture
def scored_rows(monkeypatch):
    """Numbers of tokens of the rows that pass through the model."""
    lengths, original = [], recording.response_losses

    def counting(*args, **kwargs):
        losses = original(*args, **kwargs)
        return lambda documents: lengths.extend(map(len, documents)) or losses(documents)

    monkeypatch.setattr(recording, "response_losses", counting)
    return lengths


@pytest.mark.slow  # `test_faults.py` kills quicker
def test_a_killed_score_goes_on_and_writes_the_same_bytes(tmp_path, model_dir, data, capsys, scored_rows):
    whole, output = tmp_path / "whole.parquet", tmp_path / "h.parquet"
    assert main(arguments(model_dir, data, whole)) == 0
    all_rows = scored_rows.copy()
    assert all_rows == sorted(all_rows, reverse=True)  # the longest first
    assert len(all_rows) == 30 and "35 rows (5 of them repeated)" in capsys.readouterr().out
    run_until_killed(3, arguments(model_dir, data, output))
    assert not output.exists()
    scored_rows.clear()
    assert main(arguments(model_dir, data, output)) == 0
    assert scored_rows == all_rows[12:]  # none again, none left out
    assert f"going on with {output}.partial: 12 documents are done" in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.parquet", "rows.jsonl", "whole.parquet"]


def test_a_broken_select_goes_on_and_writes_the_same_bytes(tmp_path, stores, capsys, monkeypatch):
    files = {name: stores[name] for name in ("base", "reference")}
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 50)
    assert select(tmp_path / "whole.parquet", "token_cleaning", files) == 0
    text = ",".join(f"{name}={file}" for name, file in files.items())
    output = tmp_path / "w.parquet"
    argv = ["select", "--method", "token_cleaning", "--recorded", text, "--output", str(output)]
    break_after(4, monkeypatch)
    assert main(argv) == 2
    assert not output.exists() and (tmp_path / "w.parquet.partial" / "state.json").is_file()
    ranked, original = [], ranking.top_threshold
    monkeypatch.setattr(ranking, "top_threshold", lambda *a: ranked.append(1) or original(*a))
    written, append = [], Shards.append
    monkeypatch.setattr(Shards, "append", lambda self, keys, *rest: written.extend(keys) or append(self, keys, *rest))
    assert main(argv) == 0
    assert not ranked and 0 < len(written) < 40
    assert f"{40 - len(written)} documents are done" in capsys.readouterr().out
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("what", ["max_length", "dataset", "weights", "without_prompt", "dtype"])
def test_a_score_with_other_settings_is_refused(tmp_path, model_dir, data, capsys, monkeypatch, what):
    output = tmp_path / "h.parquet"
    break_after(2, monkeypatch)
    assert main(arguments(model_dir, data, output)) == 2
    changed = {"max_length": {"max_length": 63}, "without_prompt": {"without_prompt": "true"}}.get(what, {})
    if what == "dtype":
        changed = {"dtype": "bfloat16"}
    if what == "dataset":
        Path(data).write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    if what == "weights":
        monkeypatch.setattr(model_facts, "weights_fingerprint", lambda model: "another")
    capsys.readouterr()
    assert main(arguments(model_dir, data, output, **changed)) == 2
    error = capsys.readouterr().err
    assert f"{output}.partial belongs to an unfinished run with other settings: " in error and f"{what} was" in error
    assert not output.exists()


def test_equal_tokens_with_other_labels_are_recorded_with_the_labels_of_all(tmp_path, model_dir):
    """Each of the rows is answered for; the losses are those of the model."""
    from transformers import AutoModelForCausalLM

    tokens = [40, 41, 42, 43, 44]
    rows = [[-100, 41, -100, -100, -100], [-100, -100, 42, 43, -100], [-100, 41, -100, -100, -100]]
    lines = [{"input_ids": tokens, "labels": labels} for labels in rows]
    data, output = tmp_path / "x.jsonl", tmp_path / "h.parquet"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(arguments(model_dir, data, output)) == 0
    store, ids = HistoryStore.open(output), torch.tensor([tokens])
    with torch.no_grad():
        nll = next_token_nll(AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits[0].double(), ids[0])
    for labels in torch.tensor(rows):
        found = store.lookup(ids, labels[None])[0]
        torch.testing.assert_close(found[1:].double(), nll.where(labels[1:] != -100, 0), rtol=1e-5, atol=1e-5)
    with pytest.raises(HistoryMissError, match="has a label now and had none then"):
        store.lookup(ids, ids)


def test_a_resumed_score_may_use_another_batch_size(tmp_path, model_dir, data, scored_rows, monkeypatch):
    output = tmp_path / "h.parquet"
    break_after(2, monkeypatch)
    assert main(arguments(model_dir, data, output)) == 2
    scored_rows.clear()
    assert main(arguments(model_dir, data, output, batch_size=1)) == 0
    assert len(scored_rows) == 30 - 8 and len(HistoryStore.open(output)) == 30


def test_the_fingerprint_of_weights_notices_training(model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    before = model_facts.weights_fingerprint(model)
    assert model_facts.weights_fingerprint(AutoModelForCausalLM.from_pretrained(model_dir)) == before
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    assert model_facts.weights_fingerprint(model) != before


def test_documents_stand_in_the_order_of_the_data(tmp_path, model_dir, data):
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    assert main(arguments(model_dir, data, tmp_path / "h.parquet")) == 0
    rows, _ = encode_rows(load_rows(data), AutoTokenizer.from_pretrained(model_dir), LIMIT)
    expected = [int(document_keys(torch.tensor([ids]))[0, 0]) for ids in rows["input_ids"]][:30]
    assert pq.read_table(tmp_path / "h.parquet")["key"].to_pylist() == expected
    documents = write_documents(tmp_path / "documents", rows)
    assert documents.keys[:30].tolist() == expected and documents.numbers().tolist() == list(range(30))
    assert documents.digest != write_documents(tmp_path / "others", rows.select(range(34))).digest
