"""The data of the commands: splits, lists of files, streams, and rows that train and evaluation would share."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from commands import LIMIT, ROWS, error_of, flags, score, train, write

from tokensel.cli import main
from tokensel.loading import held_out
from tokensel.settings import RunArguments
from tokensel.store import HistoryStore

TRAINED, HELD_OUT = ROWS[:8], ROWS[8:]


@pytest.fixture
def splits(tmp_path):
    """A directory whose files' names tell their splits."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", TRAINED)
    write(tmp_path / "data" / "test.jsonl", HELD_OUT)
    return tmp_path / "data"


def eval_loss(run):
    return json.loads((Path(run) / "all_results.json").read_text())["eval_loss"]


def test_held_out_rows_are_of_the_split_that_is_named(tmp_path, model_dir, splits):
    trained, held_out = splits / "train.jsonl", splits / "test.jsonl"
    runs = {
        "split": (splits, {"eval_dataset_split": "test"}),
        "files": (trained, {"eval_dataset_name": held_out}),
        "trained": (held_out, {"eval_dataset_name": trained}),
    }
    losses = {}
    for name, (data, settings) in runs.items():
        assert train(model_dir, data, tmp_path / name, method="random", learning_rate=1e-9, **settings) == 0
        losses[name] = eval_loss(tmp_path / name)
    assert losses["split"] == pytest.approx(losses["files"], rel=1e-6)
    assert losses["trained"] != pytest.approx(losses["files"], rel=1e-3)


@pytest.mark.parametrize("name", ["directory", "file", "file in a list", "split of another name", "name"])
def test_training_rows_are_not_held_out(tmp_path, model_dir, splits, capsys, no_loading, name):
    file = (splits / "train.jsonl").resolve()
    data, settings, named = {
        "directory": (splits, {"eval_dataset_name": splits}, file),
        "file": (file, {"eval_dataset_name": splits / ".." / "data" / "train.jsonl"}, file),
        "file in a list": (splits, {"eval_dataset_name": file}, file),
        "split of another name": (splits, {"eval_dataset_split": "train"}, file),
        "name": ("owner/name", {"eval_dataset_name": "owner/name"}, "owner/name (train)"),
    }[name]
    assert train(model_dir, data, tmp_path / "run", method="random", **settings) == 2
    assert error_of(capsys).startswith(f"{named} would be trained and held out; set eval_dataset_split to another")


SLICES = [
    ("train", "train[:3]", True),
    ("train[:3]", "train", True),
    ("train[:3]", "train[2:]", True),
    ("train[:90%]", "train[89%:]", True),
    ("train[:90%]", "train[3:]", True),
    ("train[:-10%]", "train[90%:]", True),  # of 5 rows all, and the last
    ("train[:90%](pct1_dropremainder)", "train[90%:]", True),
    ("test+train[:3]", "train[2:4]", True),
    ("train", "all", True),
    ("train[:3]", "train[3:]", False),
    ("train[:90%]", "train[90%:]", False),
    ("train[90%:]", "train[:90%]", False),
    ("train[:-10%]", "train[-10%:]", False),
    ("train[:2]", "test+train[2:3]", False),
    ("train", "test[:3]", False),
]


@pytest.mark.parametrize("trained, tried, both", SLICES)
@pytest.mark.parametrize("named", [False, True], ids=["directory", "name"])
def test_slices_of_a_split_are_held_out_only_where_no_row_is_trained(trained, tried, both, named, splits):
    name = ["owner/name" if named else str(splits)]
    settings = RunArguments(dataset_name=name, dataset_split=trained, eval_dataset_split=tried)
    if both:
        with pytest.raises(ValueError, match=r"would be trained and held out; .*train\[:90%\] and train\[90%:\]"):
            held_out(settings)
    else:
        assert held_out(settings) == (name, tried)


def test_a_slice_of_a_directory_is_not_held_out_beside_its_file(splits):
    file, place = [str(splits / "train.jsonl")], [str(splits / ".." / "data")]
    with pytest.raises(ValueError, match="train.jsonl would be trained and held out"):
        held_out(RunArguments(dataset_name=file, eval_dataset_name=place, eval_dataset_split="train[:3]"))


def test_a_file_has_no_other_split_to_hold_out(tmp_path, model_dir, splits, capsys, no_loading):
    settings = {"method": "random", "eval_dataset_split": "test"}
    assert train(model_dir, splits / "train.jsonl", tmp_path / "run", **settings) == 2
    assert "train.jsonl is a file, whose rows are all of the split 'train'; got 'test'" in error_of(capsys)


def test_the_split_that_is_held_out_where_none_is_named(splits):
    file = [str(splits / "train.jsonl")]
    beside = RunArguments(dataset_name=[str(splits)], dataset_split="test", eval_dataset_name=file)
    assert held_out(beside) == (file, "train")  # a file has no other
    other = RunArguments(dataset_name=["owner/name"], dataset_split="train_sft", eval_dataset_name=["other/name"])
    assert held_out(other) == (["other/name"], "train_sft")
    assert held_out(RunArguments(dataset_name=file)) is None


def test_a_list_of_files_in_a_flag_and_in_yaml_is_one_dataset(tmp_path, model_dir, splits, capsys):
    files = [str(splits / "train.jsonl"), str(splits / "test.jsonl")]
    more = flags(model_name_or_path=model_dir, max_length=LIMIT)
    assert main(["score", "--dataset_name", *files, *more, "--output", str(tmp_path / "flag.parquet")]) == 0
    assert f"{', '.join(files)}: {len(ROWS)} rows: {len(ROWS)} kept" in capsys.readouterr().out
    (tmp_path / "x.yaml").write_text(f"dataset_name: [{', '.join(files)}]\n")
    assert main(["score", str(tmp_path / "x.yaml"), *more, "--output", str(tmp_path / "yaml.parquet")]) == 0
    stores = [HistoryStore.open(tmp_path / f"{name}.parquet") for name in ("flag", "yaml")]
    assert stores[0].metadata["documents"] == stores[1].metadata["documents"] == len(ROWS)
    assert stores[0].metadata["dataset"] == ", ".join(files)


def test_a_bad_row_of_a_list_names_its_file_and_line(tmp_path, model_dir, splits, capsys):
    bad = write(tmp_path / "bad.jsonl", [*HELD_OUT[:2], {"conversations": [{"from": "bot", "value": "a"}]}])
    arguments = flags(model_name_or_path=model_dir, output=tmp_path / "h.parquet")
    assert main(["score", "--dataset_name", str(splits / "train.jsonl"), bad, *arguments]) == 2
    assert error_of(capsys).startswith(f"{bad}:3: conversations[0].from is 'bot'; known roles are")


def test_roles_and_rejected_answers_by_settings(tmp_path, model_dir, capsys):
    pair = {"chosen": [{"role": "user", "content": "Ada"}, {"role": "bot", "content": "pays."}]}
    pair["rejected"] = [pair["chosen"][0], {"role": "bot", "content": "runs away."}]
    path = write(tmp_path / "pairs.jsonl", [pair])
    settings = {"role_names": "bot=assistant", "rejected_weight": -1}
    assert score(model_dir, path, tmp_path / "h.parquet", **settings) == 0, capsys.readouterr().err
    assert "1 rows, 2 documents: 2 kept" in capsys.readouterr().out
    assert HistoryStore.open(tmp_path / "h.parquet").metadata["documents"] == 2
    assert score(model_dir, path, tmp_path / "i.parquet", role_names="bot=1") == 2
    assert error_of(capsys) == "role_names must map names to names, such as bot to assistant; got {'bot': 1}"


def test_a_stream_trains_what_is_read_at_once(tmp_path, model_dir, splits, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = {"method": "full", "eval_dataset_split": "test", "max_steps": 2, "seed": 3}
    settings["train_sampling_strategy"] = "sequential"
    for streaming in ("false", "true"):
        run = tmp_path / streaming
        assert train(model_dir, splits, run, dataset_streaming=streaming, **settings) == 0, capsys.readouterr().err
    assert eval_loss(tmp_path / "true") == pytest.approx(eval_loss(tmp_path / "false"), rel=1e-6)
    assert capsys.readouterr().out.count(f"{splits}: 8 rows: 8 kept") == 2
    assert train(model_dir, splits, tmp_path / "long", dataset_streaming="true", method="full", max_length=513) == 2
    assert "has rows of up to 513 tokens" in error_of(capsys)


def test_rejected_answers_are_what_critical_tokens_trains_against(tmp_path, model_dir, capsys):
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " Nobody knows."} for row in ROWS[:4]]
    path = write(tmp_path / "pairs.jsonl", pairs)
    settings = {"contrast_model_name_or_path": model_dir, "rejected_weight": -1}
    assert score(model_dir, path, tmp_path / "c.parquet", **settings) == 0, capsys.readouterr().err
    settings = {"method": "critical_tokens", "recorded": f"contrast={tmp_path / 'c.parquet'}", "rejected_weight": -1}
    assert train(model_dir, path, tmp_path / "run", max_steps=1, record_samples=8, **settings) == 0
    first = json.loads((tmp_path / "run" / "selection.jsonl").read_text().splitlines()[0])
    signs = [{weight > 0 for weight in sample["weight"] if weight is not None} for sample in first["samples"]]
    assert signs == [{True}, {False}] * 4  # chosen and rejected, in turn
