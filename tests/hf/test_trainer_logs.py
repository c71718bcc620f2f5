"""Models here are float64 and optimizers SGD, so that equal updates are equal to rounding, far below real changes."""

from __future__ import annotations

import types

import datasets
import pytest
import torch
from training import (
    ROWS,
    TIGHT,
    build,
    largest_difference,
    losses,
    run,
    weights,
)

import tokensel.metrics as metrics_module

# Metrics


def test_logged_metrics_are_those_of_the_selections(tmp_path, history, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(metrics_module, "time", types.SimpleNamespace(perf_counter=lambda: 2.0 * next(clock)))
    trainer = run(
        tmp_path,
        method="sstoken",
        method_args="rho=0.3",
        history="recorded",
        history_store=history,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        max_steps=5,
    )
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4] and len(trainer.seen) == 10

    def expected(seen, seconds):
        def of(name):
            return torch.cat([getattr(out, name)[out.response].double() for _, out in seen])

        kept, nll, rel = of("weights") > 0, of("nll"), of("history_nll") - of("nll")
        return {
            "kept_share": float(kept.double().mean()),
            "kept_nll": float(nll[kept].mean()),
            "dropped_nll": float(nll[~kept].mean()),
            "rel_mean": float(rel.mean()),
            "rel_std": float(rel.std(unbiased=False)),
            "prompt_mass": float(of("mass").mean()),
            "constant_score_share": 0.0,
            "tokens_per_second": sum(int(inputs["attention_mask"].sum()) for inputs, _ in seen) / seconds,
        }

    # the clock ticks once at the first step and once a log entry, by two seconds
    for entry, seen in zip(entries, (trainer.seen[:4], trainer.seen[4:8]), strict=True):
        metrics = expected(seen, 2)
        assert {name: entry[name] for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    # the fifth step was never logged on its own; the totals have it
    totals = trainer.selection_totals()
    responses = sum(int(out.response.sum()) for _, out in trainer.seen)
    assert totals == pytest.approx(expected(trainer.seen, 6) | {"responses": responses}, rel=1e-5)
    assert 0.3 < totals["kept_share"] < 0.35  # ceil


def test_metrics_leave_out_what_was_not_measured(tmp_path, history):
    entry = run(tmp_path, method="full", max_steps=1).state.log_history[0]
    assert entry["kept_share"] == 1 and not {"rel_mean", "rel_std", "prompt_mass", "dropped_nll"} & set(entry)
    entry = run(tmp_path, method="random", max_steps=1, history="recorded", history_store=history).state.log_history[0]
    assert {"rel_mean", "rel_std", "dropped_nll"} <= set(entry) and "prompt_mass" not in entry


def test_tokens_are_counted_with_packing_too(tmp_path):
    trainer = run(tmp_path, method="full", packing=True, max_steps=1)
    seconds = trainer._selection_log.totals["seconds"]
    tokens = trainer.seen[0][0]["input_ids"].numel()
    assert trainer.selection_totals()["tokens_per_second"] == pytest.approx(tokens / seconds)


# Rows without a response


def without_response(row):
    return {"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])}


@pytest.mark.parametrize("denominator", ["step", "micro_batch"])
def test_a_step_without_any_response_changes_nothing(tmp_path, denominator):
    rows = datasets.Dataset.from_list([without_response(ROWS[i]) for i in range(4)])
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"per_device_train_batch_size": 2, "loss_denominator": denominator, "gradient_accumulation_steps": 2}
    trainer = run(tmp_path, model, rows, method="attention", **settings)
    # transformers 4 logs no gradient norm where none is clipped
    assert losses(trainer) == [0.0] and trainer.state.log_history[0].get("grad_norm", 0) == 0
    assert trainer.state.log_history[0]["kept_share"] == 0
    assert largest_difference(before, weights(trainer)) == 0


def test_a_micro_batch_without_any_response_adds_nothing(tmp_path, history):
    settings = {"method": "sstoken", "history": "recorded", "history_store": history}
    rows = datasets.Dataset.from_list([ROWS[0], without_response(ROWS[1])])
    mixed = run(tmp_path, rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=2, **settings)
    alone = run(tmp_path, rows=ROWS.select([0]), per_device_train_batch_size=1, **settings)
    assert losses(mixed) == pytest.approx(losses(alone), rel=1e-6)
    assert largest_difference(weights(mixed), weights(alone)) < TIGHT


def test_the_published_denominator_survives_a_micro_batch_without_a_response(tmp_path):
    rows = datasets.Dataset.from_list([ROWS[0], without_response(ROWS[1])])
    trainer = run(
        tmp_path,
        rows=rows,
        method="random",
        loss_denominator="micro_batch",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    assert all(torch.isfinite(p).all() for p in weights(trainer).values()) and losses(trainer)[0] > 0
