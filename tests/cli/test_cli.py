from __future__ import annotations

import dataclasses
import json
import math
import re
import types

import pytest
import torch
import yaml
from commands import LIMIT, ROWS, TRAIN, error_of, score, train, write
from oracles import next_token_nll
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokensel
from tokensel import cli, methods
from tokensel.arguments import SelectionArguments
from tokensel.cli import main
from tokensel.finetune import last_complete_checkpoint
from tokensel.store import HistoryStore
from tokensel.testing import make_rows


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
@pytest.mark.slow
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
                nll = next_token_nll(model.eval()(ids).logits[0], ids[0])
            values.append(nll[len(prompt) - 1 :].double())
        looked_up = history.lookup(ids, labels)[0]
        assert not looked_up[: len(prompt)].any()
        found.append(looked_up[len(prompt) :].double())
    truth, eager, found = torch.cat(truths), torch.cat(eager), torch.cat(found)
    ulp = float(truth.max()) * torch.finfo(torch.float32).eps
    assert float((found - truth).abs().max()) <= 2 * float((eager - truth).abs().max()) + 2 * ulp
    assert f"{len(truth)} response tokens, mean NLL {float(truth.mean()):.4f} nats" in printed


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
    last = "--output_dir and --method" if command == "train" else "--output"
    first += "," if command == "train" else " and"
    assert f"Needs {first} {last}." in " ".join(text.split())


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
