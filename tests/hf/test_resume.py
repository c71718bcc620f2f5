"""A training run that is killed in its middle goes on to the very same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokensel import cli, finetune
from tokensel.testing import make_model, make_rows, make_tokenizer

STEPS, SAVE_STEPS = 40, 4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(model directory, data, store): a history from another model than the one that is trained."""
    path = tmp_path_factory.mktemp("resume")
    rows = make_rows(64, seed=0)
    tokenizer = make_tokenizer(rows, vocab_size=320)
    for name, seed in (("model", 1), ("earlier", 2)):
        model = make_model(tokenizer, hidden_size=64, layers=3, heads=4, kv_heads=2, seed=seed)
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    data, store = path / "rows.jsonl", path / "h.parquet"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model_name_or_path", path / "earlier", "--dataset_name", data, "--output", store]
    assert cli.main(["score", *map(str, arguments)]) == 0
    return path / "model", data, store


def start(recorded, out, *more):
    """Trains LoRA adapters with dropout, shuffling and AdamW in a process of its own, on one thread."""
    model, data, store = recorded
    settings = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "history": "recorded",
        "history_store": store,
        "method": "sstoken",
        "use_peft": "true",
        "lora_r": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "use_cpu": "true",
        "full_determinism": "true",
        "report_to": "none",
    }
    command = [sys.executable, "-m", "tokensel.cli", "train"]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    log = open(out.with_suffix(".log"), "ab")
    with log:
        return subprocess.Popen([*command, *more], env=environment, stdout=log, stderr=log)


def wait_for(condition, process, seconds=120):
    """Waits until `condition()` or the process's end."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.002)


def finish(process, out):
    assert process.wait(timeout=120) == 0, out.with_suffix(".log").read_text()


def adapter(path):
    return load_file(path / "adapter_model.safetensors")


def logged_losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [
        (entry["step"], entry["loss"], entry["kept_share"], entry["rel_mean"]) for entry in history if "loss" in entry
    ]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(recorded, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted, process = start(recorded, whole), start(recorded, killed)
    try:
        second = killed / f"checkpoint-{2 * SAVE_STEPS}" / "trainer_state.json"
        wait_for(second.is_file, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, killed.with_suffix(".log").read_text()
        # it really was in the middle
        assert second.is_file() and not (killed / "adapter_model.safetensors").exists()
        reached = max(int(path.name.rpartition("-")[2]) for path in killed.glob("checkpoint-*"))
        assert 2 * SAVE_STEPS <= reached < STEPS

        # as if the kill had come while a checkpoint was written: everything but the trainer's state, half of a file
        complete = Path(finetune.last_complete_checkpoint(str(killed)))
        half = killed / f"checkpoint-{int(complete.name.rpartition('-')[2]) + SAVE_STEPS}"
        shutil.copytree(complete, half, ignore=shutil.ignore_patterns("trainer_state.json"), dirs_exist_ok=True)
        (half / "trainer_state.json").unlink(missing_ok=True)
        weights = (half / "adapter_model.safetensors").read_bytes()
        (half / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
        assert finetune.last_complete_checkpoint(str(killed)) == str(complete)

        first = (killed / f"checkpoint-{SAVE_STEPS}" / "trainer_state.json").stat().st_mtime_ns
        resumed = start(recorded, killed, "--resume_from_checkpoint", "last")
        finish(resumed, killed)
        # it did not begin anew, which would end with the same weights
        assert (killed / f"checkpoint-{SAVE_STEPS}" / "trainer_state.json").stat().st_mtime_ns == first
        finish(uninterrupted, whole)
    finally:
        for started in (uninterrupted, process):
            if started.poll() is None:
                started.kill()
                started.wait()

    expected, found = adapter(whole), adapter(killed)
    assert expected.keys() == found.keys() and len(expected) == 3 * 7 * 2
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    first = adapter(whole / f"checkpoint-{SAVE_STEPS}")
    assert any(not torch.equal(first[name], expected[name]) for name in expected)
    # and the log reads as if nothing had happened
    assert [step for step, *_ in logged_losses(whole)] == list(range(1, STEPS + 1))
    assert logged_losses(killed) == logged_losses(whole)
