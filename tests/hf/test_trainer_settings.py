"""Models here are float64 and optimizers SGD, so that equal updates are equal to rounding, far below real changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from training import (
    PLAIN,
    ROWS,
    TOKENIZER,
    build,
    build_lora,
    make_trainer,
    record,
    run,
)
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import tokensel
from tokensel.arguments import SelectiveTrainingArguments, parse_mapping
from tokensel.store import HistoryMissError
from tokensel.testing import make_rows, make_tokenizer
from tokensel.trainer import SelectiveTrainer

# Settings that cannot be


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"method": "random", "history": "emma"},
            "history must be one of auto, none, recorded, last_seen, .*reference; got 'emma'",
        ),
        (
            {"method": "sstoken", "history": "none"},
            "method 'sstoken' needs a history: history 'recorded' with history_store",
        ),
        ({"method": "history_excess", "history": "none"}, "method 'history_excess' needs a history"),
        ({"method": "rel", "history": "recorded"}, "history='recorded' and history_store go together"),
        (
            {"method": "random", "history": "none", "history_store": "h.parquet"},
            "history='recorded' and history_store go together",
        ),
        ({"method": "random", "label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        (
            {"method": "random", "loss_denominator": "batch"},
            "loss_denominator must be one of step, micro_batch; got 'batch'",
        ),
        ({"method": "rel", "history": "adapter_off"}, "history='adapter_off' needs a PEFT model"),
        ({"method": "sstokn"}, "unknown method 'sstokn'; did you mean 'sstoken'"),
        ({"method": "random", "method_args": "gamma=1"}, "method 'random' has no parameter gamma; it takes: rho, seed"),
        ({"method": "random", "method_args": "rho=1.5"}, r"rho must be in \(0, 1\].*got 1.5"),
        ({"method": "attention", "layer": 7}, "layer 7 does not exist"),
        ({"method": "attention", "layer": [-1, 7]}, "layer 7 does not exist"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("plain", [None, TrainingArguments(output_dir="unused", use_cpu=True)])
def test_plain_arguments_do_where_the_method_is_given(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    collator = DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")
    method = tokensel.methods.get("random", rho=0.25)
    trainer = SelectiveTrainer(build(), plain, collator, ROWS, processing_class=TOKENIZER, method=method)
    assert (trainer.args.history, trainer.args.layer, trainer.args.loss_denominator) == ("none", [-1], "step")
    assert plain is None or not hasattr(plain, "history")  # the caller's stay as they were
    ours = r"set it to one of .*args=SelectiveTrainingArguments\(method=.*method=tokensel.methods.get"
    with pytest.raises(ValueError, match=f"method is missing, and has no default; {ours}"):
        SelectiveTrainer(build(), plain, collator, ROWS, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match="method 'rho1' needs .*recorded"):
        SelectiveTrainer(build(), plain, collator, ROWS, method=tokensel.methods.get("rho1"))


def test_arguments_of_the_users_own_may_have_some_of_the_fields(tmp_path):
    @dataclasses.dataclass
    class Few(TrainingArguments):
        method: str = "random"
        method_args: str = "rho=0.5"

    few = Few(output_dir=str(tmp_path), **PLAIN)
    collator = DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")
    trainer = SelectiveTrainer(build(), few, collator, ROWS, processing_class=TOKENIZER)
    assert trainer.method.rule.rho == 0.5 and trainer.args.history == "none"


def test_a_second_trainer_of_a_model_takes_the_patch_and_the_first_takes_it_back(tmp_path):
    model = build()
    first = make_trainer(tmp_path, model, method="attention", max_steps=1)
    second = make_trainer(tmp_path, model, method="random", max_steps=1, layer=[0])
    assert list(first._patched.layers) == [1] and model._tokensel_patched is second._patched
    second.train()
    first.train()  # measures attention again
    assert list(model._tokensel_patched.layers) == [1] and first.seen[0][1].mass is not None
    tokensel.remove(model)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_a_trainer_that_is_refused_leaves_the_patch_of_the_first(tmp_path):
    model, rows = build(), ROWS.select(range(3))
    first = make_trainer(tmp_path, model, method="attention", eval_dataset=rows)
    expected, patched = first.evaluate()["eval_loss"], model._tokensel_patched
    for settings in ({"method": "rel", "history": "reference"}, {"method": "full", "record_samples": -1}):
        with pytest.raises(ValueError):
            make_trainer(tmp_path, model, **settings)
        assert model._tokensel_patched is patched
    for other in (lambda: make_trainer(tmp_path, model, method="full"), lambda: tokensel.remove(model)):
        other()
        assert first.evaluate()["eval_loss"] == expected == first.predict(rows).metrics["test_loss"]
    assert model._tokensel_patched is first._patched
    first.train()


def test_a_loss_function_of_the_users_own_is_refused_rather_than_ignored(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        make_trainer(tmp_path, method="random", compute_loss_func=lambda outputs, labels, **_: outputs.logits.mean())


@pytest.mark.parametrize("name", ["row", "prompt", "impl"])
def test_a_misspelt_choice_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'middle'"):
        run(tmp_path, method="attention", max_steps=1, **{name: "middle"})


def test_attention_alone_needs_no_history(tmp_path):
    trainer = run(tmp_path, method="sstoken", method_args="gamma=0", max_steps=1)
    assert trainer.seen[0][1].history_nll is None and trainer.seen[0][1].mass is not None


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.base_layer.weight"])
def test_a_trained_base_has_no_adapter_off_history(tmp_path, name):
    model = build_lora()
    model.get_parameter(f"base_model.model.{name}").requires_grad_(True)
    with pytest.raises(ValueError, match=f"needs the base model frozen, but .*{name} is trained"):
        make_trainer(tmp_path, model, method="rel", history="adapter_off")


WITHOUT_LABELS = ROWS.select_columns(["input_ids"])


def whole_rows(rows):
    batch = TOKENIZER.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
    return dict(batch) | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def all_but_four(rows):
    batch = whole_rows(rows)
    batch["labels"][:, :4] = -100
    return batch


class Once(torch.utils.data.IterableDataset):
    """Rows that can be read once."""

    def __init__(self):
        self.rows = iter(list(WITHOUT_LABELS))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


def test_prompts_are_looked_for_in_what_the_collator_makes(tmp_path):
    for rows in (WITHOUT_LABELS, WITHOUT_LABELS.to_iterable_dataset(), list(WITHOUT_LABELS)):
        with pytest.raises(ValueError, match="the first 16 rows of the training data, as the data collator"):
            make_trainer(tmp_path, rows=rows, method="attention", max_steps=1, collator=whole_rows)
        trainer = make_trainer(tmp_path, rows=rows, method="attention", max_steps=1, collator=all_but_four)
        trainer.train()
        assert float(trainer.seen[0][1].mass.sum()) > 0


def test_rows_that_can_be_read_once_are_left_for_the_training(tmp_path):
    trainer = make_trainer(tmp_path, rows=Once(), method="attention", max_steps=1, collator=whole_rows)
    assert len(list(trainer.train_dataset)) == len(ROWS)


def test_a_store_of_another_tokenizer_is_refused_at_construction(tmp_path):
    other = make_tokenizer(make_rows(80, seed=8), vocab_size=400)
    path = record(tmp_path / "h.parquet", build(), ROWS.select(range(2)), tokenizer=other)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        make_trainer(tmp_path, method="rel", history="recorded", history_store=path)


def test_a_document_that_was_not_recorded_is_named(tmp_path):
    path = record(tmp_path / "h.parquet", build(), ROWS.select(range(3)))
    with pytest.raises(HistoryMissError) as error:
        run(tmp_path, rows=ROWS.select([3]), method="rel", history="recorded", history_store=path)
    message = str(error.value)
    assert str(ROWS[3]["input_ids"][:8]) in message and f"{len(ROWS[3]['input_ids'])} tokens" in message
    assert path in message and "tokensel score" in message


# Method arguments


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, {}),
        ("", {}),
        ({}, {}),
        ({"gamma": 0.25, "debias": None}, {"gamma": 0.25, "debias": None}),
        ("gamma=0.5,rho=0.6", {"gamma": 0.5, "rho": 0.6}),
        (" gamma = 0.5 , rho = 1 ", {"gamma": 0.5, "rho": 1}),
        ("rel_sign=-1,rel_floor=1e-3", {"rel_sign": -1, "rel_floor": 1e-3}),
        ("debias=uniform,seed=3", {"debias": "uniform", "seed": 3}),
        ("debias=null", {"debias": None}),
        ('{"gamma": 0.5, "debias": "uniform"}', {"gamma": 0.5, "debias": "uniform"}),
    ],
)
def test_method_args_are_read(text, expected):
    assert parse_mapping("method_args", text, "gamma=0.5,rho=0.6") == expected


@pytest.mark.parametrize("text", ["gamma", "gamma=", "=0.5", "gamma=0.5,", "gamma:0.5", "gamma=0.5,,rho=1"])
def test_method_args_that_cannot_be_read_are_named(text):
    with pytest.raises(ValueError, match="method_args must look like gamma=0.5,rho=0.6; cannot read"):
        parse_mapping("method_args", text, "gamma=0.5,rho=0.6")


def test_a_mapping_of_method_args_is_not_the_callers(tmp_path):
    given = {"rho": 0.5}
    parse_mapping("method_args", given, "rho=0.6")["rho"] = 1
    assert given == {"rho": 0.5}
    arguments = SelectiveTrainingArguments(output_dir=str(tmp_path), use_cpu=True, method="random", method_args=given)
    assert arguments.build_method().rule.rho == 0.5


@pytest.mark.parametrize("text", ["rho=abc", "rho=null", "rho=[1]", "gamma=x", "rel_floor=x"])
def test_a_method_argument_of_the_wrong_type_is_named(tmp_path, text):
    arguments = SelectiveTrainingArguments(output_dir=str(tmp_path), use_cpu=True, method="sstoken", method_args=text)
    with pytest.raises((ValueError, TypeError), match=text.partition("=")[0]):
        arguments.build_method()
