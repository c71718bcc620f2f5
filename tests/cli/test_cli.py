from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
import shutil
import types

import pyarrow.parquet
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokensel
from tokensel import cli, methods
from tokensel.arguments import SelectionArguments
from tokensel.cli import main
from tokensel.finetune import last_complete_checkpoint
from tokensel.store import HistoryStore
from tokensel.testing import make_model, make_rows, make_tokenizer

ROWS = make_rows(12, seed=5)
LIMIT = 64
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}A"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


def make_tokenizer_with_chat(seed=5, vocab_size=320):
    tokenizer = make_tokenizer(make_rows(60, seed=seed), vocab_size=vocab_size)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer_with_chat()
    make_model(tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=1, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def layout(row, kind):
    if kind == "prompt":
        return row
    if kind == "question":
        return {"question": row["prompt"].strip(), "answer": row["completion"]}
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def score(model_dir, data, output, **settings):
    settings = {"model_name_or_path": model_dir, "dataset_name": data, "max_length": LIMIT, "output": output} | settings
    return main(["score", *flags(**settings)])


TRAIN = {
    "use_cpu": "true",
    "report_to": "none",
    "max_length": LIMIT,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
}


def train(model_dir, data, out, *more, **settings):
    settings = TRAIN | {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": out} | settings
    return main(["train", *flags(**settings), *more])


def error_of(capsys):
    """The error message: one line, a hint in the next, no traceback. An unfinished progress bar may stand before."""
    err = capsys.readouterr().err
    (found,) = re.findall(r"tokensel: error: (.*)\n\(set TOKENSEL_TRACEBACK=1 to see where\)\n", err)
    assert "Traceback" not in err
    return found


@pytest.fixture
def no_loading(monkeypatch):
    """Fails the test if a model is loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch):
    monkeypatch.delenv("TOKENSEL_TRACEBACK", raising=False)


# From text to a trained model


@pytest.mark.parametrize("kind", ["prompt", "question", "messages"])
def test_score_then_train_on_every_layout(tmp_path, model_dir, capsys, kind):
    data = write(tmp_path / "rows.jsonl", [layout(row, kind) for row in ROWS])
    store, out = str(tmp_path / "new/h.parquet"), tmp_path / "run"
    assert score(model_dir, data, store) == 0
    printed = capsys.readouterr().out
    assert f"{data}: 12 rows: 12 kept" in printed and f"{store}: 12 rows, " in printed
    assert train(model_dir, data, out, history="recorded", history_store=store, method="sstoken") == 0
    printed = capsys.readouterr().out
    assert f"{out}: 2 steps, train loss " in printed and "tokens/s, peak memory" in printed
    metrics = json.loads((out / "all_results.json").read_text())
    assert 0.6 <= metrics["kept_share"] < 0.65 and metrics["responses"] > 100
    assert {"rel_mean", "rel_std", "prompt_mass", "kept_nll", "tokens_per_second", "peak_memory_mib"} <= set(metrics)
    assert math.isfinite(metrics["train_loss"])
    before, after = load_file(f"{model_dir}/model.safetensors"), load_file(out / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    reloaded = AutoTokenizer.from_pretrained(out)
    assert reloaded.get_vocab() == AutoTokenizer.from_pretrained(model_dir).get_vocab()


@pytest.mark.parametrize("history", ["recorded", "adapter_off"])
def test_lora_leaves_an_adapter_for_plain_peft(tmp_path, model_dir, data, history):
    store, out = str(tmp_path / "h.parquet"), tmp_path / "run"
    settings = {"history": history}
    if history == "recorded":
        assert score(model_dir, data, store) == 0
        settings["history_store"] = store
    settings |= {"use_peft": "true", "lora_r": 4, "lora_target_modules": "q_proj,up_proj", "learning_rate": 0.01}
    assert train(model_dir, data, out, **settings) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 4 and sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    assert config["lora_dropout"] == 0.1 and config["lora_alpha"] == 16
    assert not (out / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.arange(3, 20)[None]
    plain = base.eval()(ids).logits
    tuned = PeftModel.from_pretrained(base, out).eval()(ids).logits
    assert tuned.shape == plain.shape and not torch.allclose(tuned, plain)


def test_all_linear_never_takes_the_head(tmp_path, model_dir, data):
    out = tmp_path / "run"
    assert train(model_dir, data, out, use_peft="true", method="random", lora_r=2) == 0
    names = {name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_lora_trains_with_gradient_checkpointing(tmp_path, model_dir, data, reentrant):
    how = {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": f'{{"use_reentrant": {reentrant}}}'}
    settings = {"use_peft": "true", "method": "random", "lora_r": 2, "lora_dropout": 0.0}
    for name, more in (("saving", how), ("plain", {})):
        assert train(model_dir, data, tmp_path / name, **settings, **more) == 0
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saving", "plain"))
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-7), name
    assert any(bool(a[name].any()) for name in a if "lora_B" in name)


def test_packing_and_held_out_rows(tmp_path, model_dir, data, capsys):
    held_out, out = write(tmp_path / "held_out.jsonl", make_rows(6, seed=6)), tmp_path / "run"
    store = str(tmp_path / "h.parquet")
    assert score(model_dir, data, store) == 0
    settings = {"history": "recorded", "history_store": store, "packing": "true", "eval_dataset_name": held_out}
    assert train(model_dir, data, out, **settings) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((out / "all_results.json").read_text())
    assert f"{held_out}: 6 rows: 6 kept" in printed
    assert f"held-out loss {metrics['eval_loss']:.4f}, kept {metrics['kept_share']:.1%}" in printed


def test_the_same_command_gives_the_same_weights(tmp_path, model_dir, data):
    for name in ("a", "b"):
        assert train(model_dir, data, tmp_path / name, method="random", use_peft="true", lora_r=2) == 0
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, and this is about a CPU")
def test_every_implementation_trains_the_same_model(tmp_path, model_dir):
    """`impl` in the YAML: losses and weights after two steps on a recorded history."""
    pytest.importorskip("triton")
    data, found = write(tmp_path / "few.jsonl", ROWS[:2]), {}
    for impl in ("reference", "chunked", "fused"):
        store, out = tmp_path / f"{impl}.parquet", tmp_path / impl
        assert score(model_dir, data, store, impl=impl) == 0
        settings = {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": str(out), "impl": impl}
        settings |= {"method": "sstoken", "history": "recorded", "history_store": str(store)}
        settings |= TRAIN | {"use_cpu": True, "per_device_train_batch_size": 1}
        settings["method_args"] = "rel_floor=0.1"  # REL of the first step is rounding alone, which would be stretched
        settings |= {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "seed": 1}
        file = tmp_path / f"{impl}.yaml"
        file.write_text(yaml.safe_dump(settings))
        assert main(["train", str(file)]) == 0
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        found[impl] = ([entry["loss"] for entry in log if "loss" in entry], load_file(out / "model.safetensors"))
    losses, weights = found.pop("reference")
    before = load_file(f"{model_dir}/model.safetensors")
    assert len(losses) == 2 and not any(torch.equal(weights[name], before[name]) for name in weights)
    for other_losses, other_weights in found.values():
        assert other_losses == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=2e-6)


def test_the_store_holds_the_models_own_losses(tmp_path, model_dir, data, capsys):
    store = tmp_path / "h.parquet"
    assert score(model_dir, data, store, batch_size=5) == 0
    printed = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    truth_model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager")
    eager_model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    history, truths, eager, found = HistoryStore.open(store, tokenizer=tokenizer), [], [], []
    assert len(history) == len(ROWS)
    assert history.metadata["model"] == model_dir and history.metadata["dataset"] == data
    assert history.metadata["max_length"] == LIMIT
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])[:, :LIMIT]
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        for model, values in ((truth_model, truths), (eager_model, eager)):
            with torch.no_grad():
                logits = model.eval()(ids).logits[0, :-1]
            nll = torch.logsumexp(logits, -1) - logits.gather(-1, ids[0, 1:, None])[:, 0]
            values.append(nll[len(prompt) - 1 :].double())
        looked_up = history.lookup(ids, labels)[0]
        assert not looked_up[: len(prompt)].any()
        found.append(looked_up[len(prompt) :].double())
    truth, eager, found = torch.cat(truths), torch.cat(eager), torch.cat(found)
    ulp = float(truth.max()) * torch.finfo(torch.float32).eps
    assert float((found - truth).abs().max()) <= 2 * float((eager - truth).abs().max()) + 2 * ulp
    assert f"{len(truth)} response tokens, mean NLL {float(truth.mean()):.4f} nats" in printed


# Settings: YAML, flags, and both


@pytest.mark.parametrize("text, layers", [("", [-1]), ("layer: 0", [0]), ("layer: [-1, -2]", [-1, -2])])
@pytest.mark.parametrize("given", [[], [3], [-2, 1]])
def test_one_layer_or_several_in_yaml_and_as_flags(tmp_path, monkeypatch, text, layers, given):
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: m\ndataset_name: d\noutput_dir: {tmp_path}\n{text}\n")
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
    arguments = torch.load(tmp_path / "b/training_args.bin", weights_only=False)
    assert arguments.learning_rate == 1e-3  # from the file, beside the flags


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
        ("train", {"output_dir": "o"}, "model_name_or_path, dataset_name"),
        ("train", {"model_name_or_path": "m", "dataset_name": "d.jsonl"}, "output_dir"),
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
    hint = "" if near is None else f" did you mean {near!r}?"
    commands = "score, select, train, methods, report, kernels, tune"
    assert error_of(capsys) == f"unknown command {command!r};{hint} There are {commands} (tokensel --help)"


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


# What is there already


def test_score_does_not_overwrite_a_store(tmp_path, model_dir, data, capsys, no_loading):
    store = tmp_path / "h.parquet"
    store.write_bytes(b"precious")
    assert score(model_dir, data, store) == 2
    assert error_of(capsys) == f"output {store} exists; move it away or choose another name"
    assert store.read_bytes() == b"precious"


def test_train_does_not_overwrite_checkpoints_and_resumes_when_told(tmp_path, model_dir, data, capsys):
    out, settings = tmp_path / "run", {"method": "random", "save_strategy": "steps", "save_steps": 1}
    assert train(model_dir, data, out, **settings) == 0
    capsys.readouterr()
    assert train(model_dir, data, out, **settings) == 2
    assert f"output_dir {out} already holds checkpoints; go on with --resume_from_checkpoint last" in error_of(capsys)
    first = (out / "checkpoint-1/trainer_state.json").stat().st_mtime_ns
    assert train(model_dir, data, out, **settings | {"max_steps": 3}, resume_from_checkpoint="last") == 0
    assert "3 steps" in capsys.readouterr().out
    assert (out / "checkpoint-1/trainer_state.json").stat().st_mtime_ns == first  # it did not begin anew
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_nothing_to_resume_from_is_an_error(tmp_path, model_dir, data, capsys, no_loading):
    assert train(model_dir, data, tmp_path / "run", method="random", resume_from_checkpoint="last") == 2
    assert f"{tmp_path / 'run'} holds no complete checkpoint to resume from" in error_of(capsys)


def test_the_last_complete_checkpoint_is_the_newest_by_number(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        last_complete_checkpoint(str(tmp_path / "none"))
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/model.safetensors").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        last_complete_checkpoint(str(tmp_path))
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


# Text that cannot be used


@pytest.mark.parametrize("command", ["score", "train"])
@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ":2: "),
        ('{"prompt": "a", "completion": "b"}\n\n[1]\n', ":3: expected one JSON object a line, found list"),
        ("", " has no rows"),
        ('\n{"text": "a"}\n', ":2: its columns are ['text']; accepted are"),
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
        ({"method": "sstoken"}, "method 'sstoken' needs a history"),
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
    assert f"{damaged} holds a damaged weights file" in error_of(capsys)


def test_a_model_that_is_not_there_is_named(tmp_path, data, capsys):
    assert score(tmp_path / "no-model", data, tmp_path / "h.parquet") == 2
    assert str(tmp_path / "no-model") in capsys.readouterr().err


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


# What the commands say


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tokensel {tokensel.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_teaches(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    for part in ("tokensel score", "tokensel train", "--version", '"prompt"', '"question"', '"messages"', "random"):
        assert part in text


@pytest.mark.parametrize(
    "command, names",
    [
        ("score", ["model_name_or_path", "dataset_name", "output", "batch_size", "max_length", "device", "impl"]),
        ("select", ["method", "method_args", "recorded", "output"]),
        ("train", ["method", "method_args", "history_store", "lora_r", "packing", "loss_denominator", "learning_rate"]),
    ],
)
def test_help_of_a_command_lists_its_settings(command, names, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: tokensel {command}" in text and all(f"--{name} " in text for name in names)
    first = "--method, --recorded" if command == "select" else "--model_name_or_path, --dataset_name"
    last = "--output_dir" if command == "train" else "--output"
    assert f"Needs {first} and {last}." in " ".join(text.split())


def test_the_settings_of_the_selection_stand_last_as_the_help_says(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    listed = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)
    assert listed[listed.index("method") :] == [field.name for field in dataclasses.fields(SelectionArguments)]


def test_a_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setenv("TOKENSEL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command 'tran'"):
        main(["tran"])
    assert capsys.readouterr().err == ""


def test_argv_is_read_from_the_command_line_by_default(monkeypatch, capsys):
    monkeypatch.setattr(cli, "sys", types.SimpleNamespace(argv=["tokensel", "--version"]))
    assert main() == 0
    assert capsys.readouterr().out.startswith("tokensel ")


def test_methods_are_listed_and_explained(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    for name in methods.names():
        assert re.search(rf"^{name} .*{methods.get(name).scope}", listed, re.MULTILINE)
    assert main(["methods", "eslm"]) == 0
    explained = capsys.readouterr().out
    assert "ceil((1 - alpha) · n)" in explained and "parameters: alpha=0.1, by=nll" in explained
    assert main(["methods", "nmae"]) == 2 and main(["methods", "rel", "rho1"]) == 2
    assert "unknown method 'nmae'" in capsys.readouterr().err
