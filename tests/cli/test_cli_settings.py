from __future__ import annotations

import json

import pytest
import yaml
from commands import ROWS, TRAIN, error_of, flags, score, train, write
from transformers import AutoTokenizer

import tokensel
from tokensel import methods
from tokensel.cli import main


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch):
    monkeypatch.delenv("TOKENSEL_TRACEBACK", raising=False)


# Settings: YAML, flags, and both


@pytest.mark.parametrize("text, layers", [("", [-1]), ("layer: 0", [0]), ("layer: [-1, -2]", [-1, -2])])
@pytest.mark.parametrize("given", [[], [3], [-2, 1]])
def test_one_layer_or_several_in_yaml_and_as_flags(tmp_path, monkeypatch, text, layers, given):
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: m\ndataset_name: d\noutput_dir: {tmp_path}\nmethod: full\n{text}\n")
    read = []
    monkeypatch.setattr("tokensel.finetune.train", lambda settings, arguments: read.append(arguments.layer))
    assert main(["train", str(path), *(["--layer", *map(str, given)] if given else [])]) == 0
    assert read == [given or layers]


def test_flags_win_over_yaml(tmp_path, model_dir, data, capsys):
    config = tmp_path / "run.yaml"
    settings = TRAIN | {"use_cpu": True, "model_name_or_path": model_dir, "dataset_name": data, "method": "random"}
    settings |= {"method_args": {"rho": 0.2}, "learning_rate": 1e-3, "max_steps": 1, "output_dir": str(tmp_path / "a")}
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config)]) == 0
    assert "1 steps" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "a/all_results.json").read_text())
    assert 0.2 <= metrics["kept_share"] < 0.25
    more = flags(output_dir=tmp_path / "b", max_steps=2, method_args="rho=0.8")
    assert main(["train", str(config), *more]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert 0.8 <= json.loads((tmp_path / "b/all_results.json").read_text())["kept_share"] < 0.85
    logged = json.loads((tmp_path / "b/trainer_state.json").read_text())["log_history"]
    assert logged[0]["learning_rate"] == 1e-3  # from the file, beside the flags


def test_the_recipe_in_the_examples_is_read(tmp_path, model_dir, data):
    from pathlib import Path

    recipe = Path(tokensel.__file__).parents[1] / "examples/sstoken_lora.yaml"
    more = TRAIN | {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": tmp_path / "run"}
    assert main(["train", str(recipe), *flags(**more)]) == 0
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["r"] == 64


@pytest.mark.parametrize("command", ["score", "train"])
@pytest.mark.parametrize(
    "text, message",
    [
        ("dataset_nam: rows.jsonl\nzz: 1\n", "unknown settings dataset_nam, zz; `tokensel COMMAND --help` lists all"),
        ("- a\n- b\n", "must be a mapping of settings to values; found list"),
        ("just words\n", "must be a mapping of settings to values; found str"),
        ("a: [1\n", "is not YAML"),
        ("a: 1\n\tb: 2\n", "is not YAML"),
    ],
    ids=["unknown", "list", "words", "open bracket", "tab"],
)
def test_a_bad_configuration_is_named(tmp_path, capsys, no_loading, command, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tokensel: error: {path}") and message.replace("COMMAND", command) in error


@pytest.mark.parametrize(
    "text", ["method_args: [0.5, 0.6]", "method_args: 0.5", "max_length: 64.5", "max_length: [64]"]
)
def test_a_setting_of_the_wrong_type_in_yaml_is_named(tmp_path, model_dir, data, capsys, no_loading, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    more = {name: value for name, value in TRAIN.items() if name != "max_length"}
    more |= {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": tmp_path / "run"}
    assert main(["train", str(path), *flags(**more)]) == 2
    assert text.partition(":")[0] in error_of(capsys)


def test_a_flag_of_the_wrong_type_is_named(capsys):
    assert main(["train", "--max_length", "long"]) == 2
    assert "argument --max_length: invalid int value: 'long'" in error_of(capsys).replace("/--max-length", "")


def test_a_missing_configuration_is_named(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert f"no configuration file {tmp_path / 'none.yaml'}" in error_of(capsys)


def test_an_empty_configuration_is_no_settings(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert main(["score", str(tmp_path / "empty.yaml")]) == 2
    assert error_of(capsys).startswith("missing setting: model_name_or_path, dataset_name, output")


@pytest.mark.parametrize(
    "command, given, missing",
    [
        ("score", {}, "model_name_or_path, dataset_name, output"),
        ("score", {"model_name_or_path": "m", "output": "o"}, "dataset_name"),
        ("train", {"output_dir": "o"}, "model_name_or_path, dataset_name, method"),
        ("train", {"model_name_or_path": "m", "dataset_name": "d.jsonl"}, "output_dir, method"),
    ],
)
def test_missing_settings_are_named(tmp_path, monkeypatch, capsys, no_loading, command, given, missing):
    monkeypatch.chdir(tmp_path)
    more = {"use_cpu": "true", "report_to": "none"} if command == "train" else {}
    assert main([command, *flags(**given, **more)]) == 2
    assert error_of(capsys).startswith(f"missing setting: {missing} (in the YAML file or as --{missing.split(',')[0]} ")
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_is_named(capsys, no_loading):
    assert main(["score", "--outputs", "x"]) == 2
    assert "--outputs" in error_of(capsys)


@pytest.mark.parametrize("command, near", [("tran", "train"), ("scor", "score"), ("kernel", "kernels"), ("xyz", None)])
def test_an_unknown_command_is_named_with_the_nearest(capsys, command, near):
    assert main([command]) == 2
    hint = "." if near is None else f"; did you mean {near!r}?"
    commands = "score, select, train, methods, report, kernels, tune"
    assert error_of(capsys) == f"unknown command {command!r}{hint} There are {commands} (tokensel --help)"


@pytest.mark.parametrize("command", ["score", "train"])
def test_a_misspelt_setting_is_named_with_the_nearest(tmp_path, capsys, no_loading, command):
    (tmp_path / "run.yaml").write_text("max_lenght: 9\n")
    assert main([command, str(tmp_path / "run.yaml")]) == 2
    assert "unknown settings max_lenght (did you mean max_length?); " in error_of(capsys)
    assert main([command, "--max_lenght", "9"]) == 2
    assert "unknown: --max_lenght 9 (did you mean max_length?)" in error_of(capsys)


def test_a_setting_of_an_earlier_version_says_what_became_of_it(tmp_path, capsys, no_loading):
    (tmp_path / "run.yaml").write_text("head_weights: entropy\n")
    expected = "head_weights: it went in 0.2, and every head counts the same; leave it out"
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert error_of(capsys) == f"{tmp_path / 'run.yaml'}: {expected}"
    assert main(["train", "--head_weights", "entropy"]) == 2
    assert error_of(capsys) == expected
    with pytest.raises(ValueError, match=r"has no parameter rel_scale \(it went in 0.2: .*\); it takes: gamma, rho"):
        methods.get("sstoken", rel_scale="rank")


def test_a_choice_that_does_not_exist_is_named_in_yaml_as_by_a_flag(tmp_path, capsys, no_loading):
    (tmp_path / "run.yaml").write_text("dtype: float99\n")
    assert main(["score", str(tmp_path / "run.yaml")]) == 2
    assert "argument --dtype: invalid choice: 'float99' (choose from 'auto', 'float32'" in error_of(capsys)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "sstokn"}, "unknown method 'sstokn'; did you mean 'sstoken'?"),
        ({"method": "random", "method_args": "gamma=1"}, "method 'random' has no parameter gamma"),
        ({"method_args": "rho=0"}, "rho must be in (0, 1]"),
        ({"method_args": "rho"}, "method_args must look like gamma=0.5,rho=0.6; cannot read 'rho'"),
        ({"method_args": "rho=abc"}, "rho"),
        ({"method_args": "{rho: 0.5}"}, "method_args"),
    ],
    ids=["method", "parameter", "rho", "no value", "word", "not JSON"],
)
def test_a_wrong_method_fails_before_anything_is_loaded(
    tmp_path, model_dir, data, capsys, no_loading, settings, message
):
    assert train(model_dir, data, tmp_path / "run", **settings) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "run").exists()


# Text that cannot be used


@pytest.mark.parametrize("command", ["score", "train"])
@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ":2: "),
        ('{"prompt": "a", "completion": "b"}\n\n[1]\n', ":3: expected one JSON object a line, found list"),
        ("", " has no rows"),
        ('\n{"txt": "a"}\n', ":2: its columns are ['txt']; accepted are"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": null, "completion": "b"}\n', ":2: prompt must be a string"),
        ('{"input_ids": [1, 9999], "labels": [-100, 9999]}\n', ":1: input_ids holds 9999, but the tokenizer has"),
        ('{"prompt": "a", "completion": ""}\n', "none of the 1 rows has a response token"),
    ],
    ids=["not JSON", "a list", "empty", "columns", "null", "token id", "no response"],
)
def test_bad_data_is_named(tmp_path, model_dir, capsys, no_loading, command, text, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    if command == "score":
        assert score(model_dir, str(data), tmp_path / "h.parquet") == 2
    else:
        assert train(model_dir, str(data), tmp_path / "run", method="random") == 2
    error = error_of(capsys)
    assert message in error and (str(data) in error or error.startswith("none of"))
    assert not (tmp_path / "h.parquet").exists()


def test_a_missing_data_file_is_named(tmp_path, model_dir, capsys, no_loading):
    assert score(model_dir, str(tmp_path / "none.jsonl"), tmp_path / "h.parquet") == 2
    assert str(tmp_path / "none.jsonl") in error_of(capsys)


def test_truncated_rows_and_rows_without_a_response_are_counted(tmp_path, model_dir, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [
        *ROWS,
        {"prompt": "Ada buys.\n", "completion": ""},
        {"prompt": "Ada buys. " * 40, "completion": "Ada pays."},
    ]
    sizes = [
        (len(tokenizer(r["prompt"])["input_ids"]), len(tokenizer(r["completion"])["input_ids"])) for r in rows[:-2]
    ]
    limit = sorted(p + c for p, c in sizes)[6]  # the response's own <s> stands for the </s> that is appended
    assert all(p < limit for p, _ in sizes)
    cut = sum(p + c > limit for p, c in sizes)
    tokens, responses = sum(min(p + c, limit) for p, c in sizes), sum(min(p + c, limit) - p for p, c in sizes)
    expected = (
        f"14 rows: 12 kept ({cut} of them cut at the length limit), 2 dropped without a response token; "
        f"{tokens} tokens, {responses} of them response tokens"
    )
    data, store = write(tmp_path / "rows.jsonl", rows), tmp_path / "h.parquet"
    assert cut > 0
    assert score(model_dir, data, store, max_length=limit) == 0
    printed = capsys.readouterr().out
    assert expected in printed and f"12 rows, {responses} response tokens" in printed
    history = {"history": "recorded", "history_store": store}
    assert train(model_dir, data, tmp_path / "run", max_length=limit, **history) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("text", ["help: 1", "layer: []", "packing: maybe", "max_length: long"])
def test_a_value_that_a_flag_would_refuse_is_refused_with_the_name_of_its_file(tmp_path, capsys, no_loading, text):
    (tmp_path / "run.yaml").write_text(text + "\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert error_of(capsys).startswith(f"{tmp_path / 'run.yaml'}: ")
