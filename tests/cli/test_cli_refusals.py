from __future__ import annotations

import errno
import shutil
import types
from pathlib import Path

import pyarrow.parquet
import pytest
from commands import error_of, make_tokenizer_with_chat, score, train, write
from transformers import AutoTokenizer

from tokensel.cli import main
from tokensel.testing import make_model, make_rows


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch):
    monkeypatch.delenv("TOKENSEL_TRACEBACK", raising=False)


# Stores and models that do not fit


def test_a_store_of_another_tokenizer_is_refused(tmp_path, model_dir, data, capsys):
    other, store = tmp_path / "other", tmp_path / "h.parquet"
    tokenizer = make_tokenizer_with_chat(seed=9)
    make_model(tokenizer, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=0).save_pretrained(other)
    tokenizer.save_pretrained(other)
    assert score(other, data, store) == 0
    assert train(model_dir, data, tmp_path / "run", history="recorded", history_store=store) == 2
    error = error_of(capsys)
    assert f"{store} was made with another tokenizer" in error and str(other) in error


def test_a_store_of_another_length_is_refused(tmp_path, model_dir, data, capsys):
    store = tmp_path / "h.parquet"
    assert score(model_dir, data, store, max_length=40) == 0
    assert train(model_dir, data, tmp_path / "run", history="recorded", history_store=store) == 2
    error = error_of(capsys)
    assert "not in the history store" in error and "max_length 40" in error and "tokensel score" in error


def test_a_store_of_another_dataset_is_refused(tmp_path, model_dir, data, capsys):
    store, other = tmp_path / "h.parquet", write(tmp_path / "other.jsonl", make_rows(12, seed=8))
    assert score(model_dir, other, store) == 0
    assert train(model_dir, data, tmp_path / "run", history="recorded", history_store=store) == 2
    error = error_of(capsys)
    assert "not in the history store" in error and f"dataset {other!r}" in error


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"history": "none"}, "method 'sstoken' needs a history"),
        ({"history": "recorded"}, "history='recorded' and history_store go together"),
        ({"history": "recorded", "history_store": "none.parquet"}, "none.parquet"),
        ({"history": "adapter_off"}, "needs a PEFT model"),
        ({"method": "attention", "layer": 9}, "layer 9 does not exist"),
        ({"method": "attention", "row": "predictor", "prompt": "context"}, "row='predictor' cannot be combined"),
        ({"method": "random", "impl": "fused"}, "impl='fused' needs a GPU"),
    ],
)
def test_settings_that_contradict_each_other_end_in_one_line(
    tmp_path, model_dir, data, capsys, no_interpreter, settings, message
):
    assert train(model_dir, data, tmp_path / "run", **settings) == 2
    assert message in error_of(capsys)


def test_lora_on_the_head_is_refused(tmp_path, model_dir, data, capsys):
    settings = {"use_peft": "true", "lora_target_modules": "q_proj,lm_head", "history": "adapter_off"}
    assert train(model_dir, data, tmp_path / "run", **settings) == 2
    assert "LoRA on lm_head" in error_of(capsys)


@pytest.mark.parametrize("command", ["score", "train", "train, held-out"])
def test_rows_longer_than_the_model_has_positions_are_refused(tmp_path, model_dir, data, capsys, command):
    long = write(tmp_path / "long.jsonl", [{"prompt": "Ada buys. ", "completion": "Ada pays. " * 200}])
    if command == "score":
        assert score(model_dir, long, tmp_path / "h.parquet", max_length=513) == 2
    elif command == "train":
        assert train(model_dir, long, tmp_path / "run", method="random", max_length=513) == 2
    else:
        settings = {"method": "random", "max_length": 513, "eval_dataset_name": long}
        assert train(model_dir, data, tmp_path / "run", **settings) == 2
    expected = f"{long} has rows of up to 513 tokens, but {model_dir} has 512 positions; cut them with --max_length 512"
    assert expected in error_of(capsys)
    assert score(model_dir, long, tmp_path / "h.parquet", max_length=512) == 0


@pytest.mark.parametrize("token", ["in the text", "for padding"])
def test_a_token_without_an_embedding_is_named(tmp_path, model_dir, capsys, token):
    other = tmp_path / "other"
    tokenizer = make_tokenizer_with_chat()
    known = len(tokenizer)
    make_model(tokenizer, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=0).save_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    if token == "for padding":
        tokenizer.pad_token = "<new>"
    tokenizer.save_pretrained(other)
    row = {"prompt": "Ada buys.", "completion": " Ada pays" + " <new>" * (token == "in the text")}
    assert score(other, write(tmp_path / "rows.jsonl", [row]), tmp_path / "h.parquet") == 2
    assert f"token {known} ('<new>') has no embedding: {other} has {known}." in error_of(capsys)


def test_a_damaged_weights_file_is_named(tmp_path, model_dir, data, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(model_dir, damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert score(damaged, data, tmp_path / "h.parquet") == 2
    assert f"{damaged} cannot be loaded: SafetensorError" in error_of(capsys)


NOT_THERE = ["{}/no-model", "./no-model", "../no/model", "~/model", "a/b/c", "no-model/", "{}/rows.jsonl"]


@pytest.mark.parametrize("name", NOT_THERE)
def test_a_model_that_is_not_there_is_named_before_a_hub_is_asked(tmp_path, data, capsys, monkeypatch, name):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("a hub was asked"))
    name = name.format(tmp_path)
    what = "it is a file" if name.endswith(".jsonl") else "no such directory"
    expected = f"model_name_or_path: {what}; give a model's directory or its hub name: '{str(Path(name))}'"
    assert score(name, data, tmp_path / "h.parquet") == 2
    assert expected in error_of(capsys)
    assert train(name, data, tmp_path / "run") == 2
    assert expected in error_of(capsys)


def test_a_run_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path / "run")]) == 2
    assert error_of(capsys) == f"{tmp_path / 'run'}: no such directory; give the output_dir of a training"


def test_a_directory_without_a_model_says_so(tmp_path, data, capsys):
    assert score(tmp_path, data, tmp_path / "h.parquet") == 2
    assert f"model_name_or_path: no model's directory, for it has no config.json: '{tmp_path}'" in error_of(capsys)


@pytest.mark.parametrize("device", ["nonsense", "cuda:77"])
def test_a_device_that_is_not_there_is_named(tmp_path, model_dir, data, capsys, device):
    assert score(model_dir, data, tmp_path / "h.parquet", device=device) == 2
    assert device.partition(":")[0] in capsys.readouterr().err
    assert not (tmp_path / "h.parquet").exists()


def test_a_dtype_that_does_not_exist_is_named(tmp_path, model_dir, data, capsys):
    assert score(model_dir, data, tmp_path / "h.parquet", dtype="float99") == 2
    assert "float99" in capsys.readouterr().err


def test_a_batch_size_of_zero_is_named(tmp_path, model_dir, data, capsys):
    assert score(model_dir, data, tmp_path / "h.parquet", batch_size=0) == 2
    assert "batch_size" in error_of(capsys)


def test_a_full_disk_while_scoring_leaves_no_store_and_says_how_to_go_on(
    tmp_path, model_dir, data, capsys, monkeypatch
):
    output = tmp_path / "h.parquet"

    class FullDisk(pyarrow.parquet.ParquetWriter):
        def write_table(self, *args):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tokensel.store.writer.pq", types.SimpleNamespace(ParquetWriter=FullDisk))
        assert score(model_dir, data, output) == 2
    error = error_of(capsys)
    assert "No space left on device while writing the history store; what was done is kept in" in error
    assert "run the same command again to go on" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.parquet.partial", "rows.jsonl"]
    assert score(model_dir, data, output) == 0
    assert f"{output}.partial: 12 documents are done" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.parquet", "rows.jsonl"]
