"""What an evaluation says: the loss of the held-out response tokens, by whichever way it is computed."""

from __future__ import annotations

import copy
import warnings

import datasets
import pytest
import torch
from training import (
    PLAIN,
    ROWS,
    TOKENIZER,
    build,
    eager_nll,
    largest_difference,
    make_rows_of_ids,
    make_trainer,
    run,
    weights,
)
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments


def mean_nll(model, rows):
    """Over all response tokens, one row at a time from the model's own logits."""
    parts = [eager_nll(model, row)[torch.tensor(row["labels"]) != -100] for row in rows]
    return float(torch.cat(parts).mean())


def measure(prediction):
    logits, labels = prediction
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != -100)
    found = {"right": int(right.sum()), "width": logits.shape[-1], "spread": float(abs(logits).mean())}
    return found | {"responses": int((labels[:, 1:] != -100).sum())}


class BreaksOff(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_evaluation_makes_no_logits(tmp_path, history, monkeypatch):
    model = build(dtype=torch.float32)
    settings = {"method": "sstoken", "history": "recorded", "history_store": history}
    trainer = make_trainer(tmp_path, model, eval_dataset=ROWS, per_device_eval_batch_size=4, **settings)
    head, calls = model.lm_head.forward, []

    def no_logits(hidden, *args, tokensel_function=None, **kwargs):
        calls.append(tokensel_function is not None)
        return head(hidden, *args, tokensel_function=tokensel_function, **kwargs)

    monkeypatch.setattr(model.lm_head, "forward", no_logits)
    trainer.evaluate()
    assert calls == [True] * 4


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_is_the_mean_over_tokens_however_they_are_batched(tmp_path, size, with_logits):
    """And rows without a label are none of them: a batch of such rows is no loss of 0."""
    empty = [{"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])} for row in ROWS.select(range(3))]
    rows = datasets.Dataset.from_list([*empty, *ROWS.select(range(4, 9))])
    extra = {"compute_metrics": measure} if with_logits else {}
    trainer = make_trainer(tmp_path, eval_dataset=rows, per_device_eval_batch_size=size, method="full", **extra)
    expected = mean_nll(build(), rows.select(range(3, 8)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(ROWS.select([4]))["eval_loss"] == pytest.approx(mean_nll(build(), [ROWS[4]]), rel=1e-6)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("collator", [DataCollatorWithPadding, DataCollatorForSeq2Seq])
def test_rows_without_labels_have_no_loss_and_cannot_be_trained(tmp_path, collator):
    rows, extra = ROWS.remove_columns("labels").select(range(5)), {"collator": collator(TOKENIZER, return_tensors="pt")}
    trainer = make_trainer(tmp_path, rows=rows, eval_dataset=rows, method="random", **extra)
    assert "eval_runtime" in (found := trainer.evaluate()) and "eval_loss" not in found
    with pytest.raises(ValueError, match="the batch has no labels .*DataCollatorForSeq2Seq"):
        trainer.train()


def test_each_held_out_set_has_its_own_loss(tmp_path):
    held_out = {"a": ROWS.select([0, 1]), "b": ROWS.select([2])}
    found = make_trainer(tmp_path, method="full", eval_dataset=held_out).evaluate()
    expected = [mean_nll(build(), held_out[name]) for name in "ab"]
    assert [found["eval_a_loss"], found["eval_b_loss"]] == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_that_broke_off_is_not_part_of_the_next(tmp_path):
    trainer = make_trainer(tmp_path, method="full", eval_dataset=ROWS.select([0, 1, 2]), per_device_eval_batch_size=1)
    trainer.add_callback(BreaksOff())
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.remove_callback(BreaksOff)
    assert trainer.evaluate(ROWS.select([4]))["eval_loss"] == pytest.approx(mean_nll(build(), [ROWS[4]]), rel=1e-6)


def padded_to(width, row):
    more = width - len(row["input_ids"])
    ids = [*row["input_ids"], *[TOKENIZER.pad_token_id] * more]
    mask = [1] * len(row["input_ids"]) + [0] * more
    return {"input_ids": ids, "labels": list(ids), "attention_mask": mask}


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "attention_mask")}


def test_labels_on_padding_are_dropped_everywhere_and_told_once(tmp_path):
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS.select(range(6))]
    rows = datasets.Dataset.from_list([padded_to(120, row) for row in whole])
    on_padding = sum(120 - len(row["input_ids"]) for row in whole)
    expected, losses = mean_nll(build(), [{**r, "labels": [-100, *r["labels"][1:]]} for r in whole]), []
    for extra in ({}, {"compute_metrics": measure}):
        trainer = make_trainer(tmp_path, method="full", eval_dataset=rows, collator=collate, **extra)
        with pytest.warns(UserWarning, match=f"^{on_padding} labels so far stand on padding"):
            found = trainer.evaluate()
        with warnings.catch_warnings(record=True) as again:
            warnings.simplefilter("always")
            trainer.evaluate()
        assert not [w for w in again if "stand on padding" in str(w.message)]
        losses.append(found["eval_loss"])
    assert losses == pytest.approx([expected] * 2, rel=1e-6)
    assert found["eval_responses"] == sum(len(row["input_ids"]) - 1 for row in whole)  # nothing predicts the first
    model = build()
    with pytest.warns(UserWarning, match="stand on padding"):
        padded = run(tmp_path, model, rows=rows, method="full", collator=collate, max_steps=1)
    plain = run(tmp_path, rows=datasets.Dataset.from_list(whole), method="full", max_steps=1)
    assert largest_difference(weights(padded), weights(plain)) < 1e-12


def test_evaluation_needs_no_recorded_history_of_the_held_out_rows(tmp_path, history):
    rows = make_rows_of_ids(4, seed=99)
    trainer = make_trainer(
        tmp_path, eval_dataset=rows, method="sstoken", history="recorded", history_store=history, eval_strategy="steps"
    )
    trainer.args.eval_steps = 2
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2  # of four steps


def test_compute_metrics_sees_what_the_base_trainer_gives(tmp_path):
    model = build(dtype=torch.float32)
    arguments = TrainingArguments(output_dir=str(tmp_path / "plain"), per_device_eval_batch_size=4, **PLAIN)
    collator = DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")
    plain = Trainer(
        copy.deepcopy(model),
        arguments,
        data_collator=collator,
        eval_dataset=ROWS,
        processing_class=TOKENIZER,
        compute_metrics=measure,
    )
    trainer = make_trainer(
        tmp_path, model, eval_dataset=ROWS, compute_metrics=measure, per_device_eval_batch_size=4, method="random"
    )
    expected, found = plain.evaluate(), trainer.evaluate()
    names = [f"eval_{name}" for name in ("right", "width", "spread", "responses")]
    assert found["eval_width"] == len(TOKENIZER)
    assert {n: found[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-6)


def test_training_goes_on_after_evaluation(tmp_path):
    with_eval = make_trainer(tmp_path, method="random", eval_dataset=ROWS, eval_strategy="steps")
    with_eval.args.eval_steps = 1
    with_eval.train()
    assert largest_difference(weights(with_eval), weights(run(tmp_path, method="random"))) == 0
