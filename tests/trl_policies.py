"""Tiny trainings by TRL's trainers of preferences and policies, and what is compared of two."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
from training import PLAIN, TOKENIZER, build, largest_difference, weights
from transformers import AutoModelForCausalLM

from tokensel.testing import make_rows

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'tokensel[trl]'")
if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
    pytest.skip(f"TRL {trl.__version__} does not ask its models for log-probabilities", allow_module_level=True)

ROWS = make_rows(12, seed=5)
PAIRS = [
    {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
    for a, b in zip(ROWS[::2], ROWS[1::2], strict=True)
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS[:4]]
# float64 models; TRL's log-probabilities are float32, ours are the model's
CLOSE = {"rel": 1e-4, "abs": 2e-5}


def lengths(completions, **_):
    return [float(len(text) % 7) for text in completions]


def settings(tmp_path, **changes):
    ours = {"output_dir": str(tmp_path / "out"), "bf16": False, "learning_rate": 0.02, "max_steps": 2}
    return PLAIN | ours | changes


def maker(tmp_path):
    """`make(kind, **settings)`: a trainer of TRL on a model that it can load again as the reference."""
    build().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")

    def make(kind, peft_config=None, **changes):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
        return made(kind, tmp_path, model, peft_config, **changes)

    return make


def made(kind, tmp_path, model, peft_config, **changes):
    common = {"processing_class": copy.deepcopy(TOKENIZER), "peft_config": peft_config}
    trainer, config = (getattr(trl, f"{kind}{part}") for part in ("Trainer", "Config"))
    if kind in ("GRPO", "RLOO"):
        how = {"num_generations": 2, "max_completion_length": 8, "temperature": 0.7, "beta": 0.1}
        args, rows = config(**settings(tmp_path, **how | changes)), datasets.Dataset.from_list(PROMPTS)
        return trainer(model, reward_funcs=lengths, args=args, train_dataset=rows, **common)
    rows = datasets.Dataset.from_list(PAIRS if kind == "DPO" else LABELLED)
    return trainer(model, args=config(**settings(tmp_path, **changes)), train_dataset=rows, **common)


def logged(trainer):
    """What is measured at each step, but for times."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [
        {name: x for name, x in entry.items() if not any(t in name for t in ("time", "runtime"))} for entry in entries
    ]


def assert_same_run(ours, theirs, ties=()):
    """ties: what is counted by comparing two numbers that are equal but for their rounding."""
    assert len(logged(ours)) == 2
    for mine, trls in zip(logged(ours), logged(theirs), strict=True):
        assert mine.keys() == trls.keys()
        for name in mine.keys() - set(ties):
            assert mine[name] == pytest.approx(trls[name], **CLOSE, nan_ok=True), name
    assert largest_difference(weights(ours), weights(theirs)) < 1e-5
    assert any(entry["grad_norm"] > 1e-3 for entry in logged(theirs))
