"""Models here are float64 and optimizers SGD, so that equal updates are equal to rounding, far below real changes."""

from __future__ import annotations

import copy
import math
import types

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tokensel.trainer as trainer_module
from tokensel.arguments import SelectiveTrainingArguments, parse_mapping
from tokensel.store import HistoryMissError, HistoryWriter
from tokensel.testing import make_model, make_rows, make_tokenizer, plant_noise
from tokensel.trainer import (
    SelectiveTrainer,
    TokenSelectionMixin,
)

TOKENIZER = make_tokenizer(make_rows(80, seed=7), vocab_size=384)
PLAIN = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.5,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 3,
    "per_device_train_batch_size": 4,
}


def make_rows_of_ids(n=16, seed=0):
    rows = plant_noise(make_rows(n, seed=seed), TOKENIZER, kind="none", share=0, seed=0)
    return datasets.Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])


ROWS = make_rows_of_ids()


def build(seed=1, dtype=torch.float64):
    return make_model(TOKENIZER, hidden_size=32, layers=2, heads=4, kv_heads=2, seed=seed).to(dtype)


def build_lora(dropout=0.0, random_adapter=True, **lora):
    torch.manual_seed(11)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=not random_adapter,
        **lora,
    )
    return get_peft_model(build(), config).double()


def eager_nll(model, row):
    """-log p of each token under the model, in float64 from its own logits; NaN for the first. (S,)"""
    ids = torch.tensor([row["input_ids"]])
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    model.train(training)
    nll = torch.logsumexp(logits, -1)[:-1] - logits[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return torch.cat([torch.full((1,), math.nan, dtype=torch.float64), nll])


def record(path, model, rows=None, tokenizer=TOKENIZER):
    with HistoryWriter(path, tokenizer=tokenizer, model="base", max_length=64, dataset="rows") as writer:
        for row in rows if rows is not None else ROWS:
            labels = torch.tensor([row["labels"]])
            writer.add(torch.tensor([row["input_ids"]]), labels, eager_nll(model, row)[None])
    return str(path)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """The losses of another model than the one that is trained, so that REL is far above rounding."""
    return record(tmp_path_factory.mktemp("history") / "h.parquet", build(seed=2))


class Recording(SelectiveTrainer):
    """Keeps every micro-batch's inputs and selection."""

    def record_selection(self, inputs, output):
        super().record_selection(inputs, output)
        self.__dict__.setdefault("seen", []).append((dict(inputs), output))


def make_trainer(tmp_path, model=None, rows=ROWS, cls=Recording, packing=False, collator=None, **settings):
    packed = DataCollatorWithFlattening(return_tensors="pt")
    extra = {
        name: settings.pop(name)
        for name in ("eval_dataset", "compute_metrics", "compute_loss_func")
        if name in settings
    }
    arguments = SelectiveTrainingArguments(output_dir=str(tmp_path / "out"), **PLAIN | settings)
    return cls(
        build() if model is None else model,
        arguments,
        data_collator=collator or (packed if packing else DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")),
        train_dataset=rows,
        processing_class=TOKENIZER,
        **extra,
    )


def run(*args, **settings):
    trainer = make_trainer(*args, **settings)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# 2 steps of float64 rounding on weights of order 1; an update moves them by more than 1e-2
TIGHT = 1e-12


# One step is one step, however it is split


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sstoken", "history": "recorded"},
        {"method": "sstoken", "history": "recorded", "method_args": "rel_warmup=8,rho=0.4"},
        {"method": "random", "method_args": "rho=0.5,seed=4"},
        {"method": "sstoken", "history": "recorded", "packing": True},
        {"method": "random", "packing": True},
        {"method": "full"},
        {"method": "rho1", "recorded": "reference={history}"},
        {"method": "history_excess", "history": "recorded", "method_args": "scope=batch,rho=0.3", "packing": True},
        {"method": "soft_weights", "history": "recorded"},
    ],
    ids=[
        "sstoken",
        "sstoken-warmup",
        "random",
        "sstoken-packed",
        "random-packed",
        "full",
        "rho1",
        "batch-packed",
        "dft",
    ],
)
def test_a_step_does_not_depend_on_how_it_is_split(tmp_path, history, settings):
    if settings.get("history") == "recorded":
        settings = settings | {"history_store": history}
    if "recorded" in settings:
        settings = settings | {"recorded": settings["recorded"].format(history=history)}
    runs = [
        run(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings)
        for size in (8, 4, 1)
    ]
    start = weights(make_trainer(tmp_path, **settings))
    whole = weights(runs[0])
    assert largest_difference(start, whole) > 1e-2
    assert [len(r.seen) for r in runs] == [2, 4, 16]  # two optimizer steps each
    for split in runs[1:]:
        assert losses(split) == pytest.approx(losses(runs[0]), rel=1e-6, abs=0)  # the log rounds
        assert largest_difference(whole, weights(split)) < TIGHT


def test_padded_and_packed_batches_train_alike(tmp_path, history):
    settings = {"method": "sstoken", "history": "recorded", "history_store": history}
    padded, packed = run(tmp_path, **settings), run(tmp_path, packing=True, **settings)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-6)
    assert largest_difference(weights(padded), weights(packed)) < TIGHT


def test_the_published_denominator_does_depend_on_how_a_step_is_split(tmp_path):
    settings = {"method": "random", "loss_denominator": "micro_batch"}
    whole = run(tmp_path, per_device_train_batch_size=8, **settings)
    split = run(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    assert largest_difference(weights(whole), weights(split)) > 1e-4


@pytest.mark.parametrize("denominator", ["step", "micro_batch"])
def test_the_loss_is_the_mean_that_its_denominator_says(tmp_path, denominator):
    trainer = run(
        tmp_path,
        method="random",
        loss_denominator=denominator,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    kept = [out.nll[out.weights > 0].double() for _, out in trainer.seen]
    steps = [kept[:4], kept[4:]]
    if denominator == "step":
        expected = [float(torch.cat(step).mean()) for step in steps]
    else:
        expected = [float(sum(part.mean() for part in step) / 4) for step in steps]
    digits = 4 if transformers.__version__ < "5" else 9  # that the trainer logs
    assert losses(trainer) == pytest.approx([round(value, digits) for value in expected], rel=1e-6)
    assert len({len(part) for part in kept}) > 1  # or both would be the same number


def test_random_draws_anew_in_each_optimizer_step(tmp_path):
    trainer = run(tmp_path, rows=ROWS.select([0]), method="random", max_steps=3, num_train_epochs=3)
    drawn = [tuple(out.weights[0].tolist()) for _, out in trainer.seen]
    assert len(set(drawn)) == 3 and len({sum(weights) for weights in drawn}) == 1


def test_rel_warmup_counts_samples_of_earlier_optimizer_steps(tmp_path, history):
    trainer = run(
        tmp_path,
        method="sstoken",
        method_args="rel_warmup=8",
        history="recorded",
        history_store=history,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    for number, (_, out) in enumerate(trainer.seen):
        only_attention = torch.where(out.response, 0.5 * out.mass, 0)
        same = torch.allclose(torch.where(out.response, out.score, 0), only_attention)
        assert same == (number < 4)


# The same training as others'


def test_full_trains_as_the_plain_trainer(tmp_path):
    settings = {"gradient_accumulation_steps": 2}
    ours = run(tmp_path, method="full", **settings)
    arguments = TrainingArguments(output_dir=str(tmp_path / "plain"), **PLAIN | settings)
    collator = DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")
    plain = Trainer(build(), arguments, data_collator=collator, train_dataset=ROWS, processing_class=TOKENIZER)
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6) and len(losses(ours)) == 2
    # transformers takes its softmax in float32 whatever the model's type; ours is float64 here
    assert largest_difference(weights(ours), weights(plain)) < 1e-6


def test_recorded_history_of_the_base_is_adapter_off_history(tmp_path):
    store = record(tmp_path / "base.parquet", build())
    live = run(tmp_path, build_lora(), method="sstoken", history="adapter_off")
    recorded = run(tmp_path, build_lora(), method="sstoken", history="recorded", history_store=store)
    for (_, a), (_, b) in zip(live.seen, recorded.seen, strict=True):
        assert torch.equal(a.response, b.response)
        # a store keeps float32: half a unit in the last place of each loss
        assert ((a.history_nll - b.history_nll).abs() <= a.history_nll * 2.0**-24).all()
        assert float((a.history_nll - a.nll).abs().max()) > 0.1  # the adapter does something
        assert torch.equal(a.weights, b.weights)
    assert largest_difference(weights(live), weights(recorded)) < TIGHT


def test_adapter_off_history_is_the_base_model_without_dropout(tmp_path):
    model = build_lora(dropout=0.5)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.5  # of the base itself
    trainer = run(tmp_path, model, method="sstoken", history="adapter_off", per_device_train_batch_size=1)
    base = build()
    for inputs, out in trainer.seen[-3:]:  # after the adapters were trained
        expected = eager_nll(base, {"input_ids": inputs["input_ids"][0].tolist()})
        assert torch.allclose(out.history_nll[0][1:], torch.where(out.response[0], expected, 0)[1:], rtol=1e-10)
    assert all(m.training for m in trainer.model.modules())
    assert not any(m._disable_adapters for m in trainer.model.modules() if hasattr(m, "_disable_adapters"))


def test_adapter_off_history_undoes_modules_to_save(tmp_path):
    trainer = run(
        tmp_path,
        build_lora(modules_to_save=["norm"]),
        method="rel",
        history="adapter_off",
        per_device_train_batch_size=1,
    )
    saved = trainer.model.base_model.model.model.norm.modules_to_save["default"].weight.detach()
    assert float((saved - 1).abs().max()) > 1e-4  # it was trained
    inputs, out = trainer.seen[-1]
    expected = eager_nll(build(), {"input_ids": inputs["input_ids"][0].tolist()})
    assert torch.allclose(out.history_nll[0][1:], torch.where(out.response[0], expected, 0)[1:], rtol=1e-10)


def test_the_base_stays_frozen_and_the_adapter_is_trained(tmp_path):
    before = build_lora().state_dict()
    after = run(tmp_path, build_lora(), method="sstoken", history="adapter_off").model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_a_saved_adapter_loads_in_plain_peft(tmp_path):
    trainer = run(tmp_path, build_lora(), method="sstoken", history="adapter_off")
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    fresh = PeftModel.from_pretrained(build(), tmp_path / "adapter").double().eval()
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(fresh(input_ids=ids).logits, ours)
        assert not torch.equal(build().eval()(input_ids=ids).logits, ours)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_weights(tmp_path, history, lora, reentrant):
    def settings(**more):
        how = {"history": "adapter_off"} if lora else {"history": "recorded", "history_store": history}
        model = build_lora() if lora else build()
        if lora and more:
            model.enable_input_require_grads()
        return {"model": model, "method": "sstoken", "max_steps": 2, **how, **more}

    plain = run(tmp_path, **settings())
    saving = run(
        tmp_path,
        **settings(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}),
    )
    assert saving.model.is_gradient_checkpointing
    for (_, a), (_, b) in zip(plain.seen, saving.seen, strict=True):
        assert torch.equal(a.weights, b.weights)
    assert largest_difference(weights(plain), weights(saving)) < TIGHT


# Metrics


def test_logged_metrics_are_those_of_the_selections(tmp_path, history, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(trainer_module, "time", types.SimpleNamespace(perf_counter=lambda: 2.0 * next(clock)))
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
    seconds = trainer._selection_totals["seconds"]
    tokens = trainer.seen[0][0]["input_ids"].numel()
    assert trainer.selection_totals()["tokens_per_second"] == pytest.approx(tokens / seconds)


# Evaluation


def plain_evaluation(tmp_path, model, rows, **extra):
    arguments = TrainingArguments(output_dir=str(tmp_path / "plain"), per_device_eval_batch_size=4, **PLAIN)
    return Trainer(
        model,
        arguments,
        data_collator=DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt"),
        eval_dataset=rows,
        processing_class=TOKENIZER,
        **extra,
    ).evaluate()


def test_evaluation_is_the_models_loss_without_logits(tmp_path, history, monkeypatch):
    model = build(dtype=torch.float32)
    expected = plain_evaluation(tmp_path, copy.deepcopy(model), ROWS)["eval_loss"]
    trainer = make_trainer(
        tmp_path,
        model,
        eval_dataset=ROWS,
        per_device_eval_batch_size=4,
        method="sstoken",
        history="recorded",
        history_store=history,
    )
    head, calls = model.lm_head.forward, []

    def no_logits(hidden, *args, tokensel_function=None, **kwargs):
        calls.append(tokensel_function is not None)
        return head(hidden, *args, tokensel_function=tokensel_function, **kwargs)

    monkeypatch.setattr(model.lm_head, "forward", no_logits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert calls == [True] * 4


def test_evaluation_needs_no_recorded_history_of_the_held_out_rows(tmp_path, history):
    rows = make_rows_of_ids(4, seed=99)
    trainer = make_trainer(
        tmp_path, eval_dataset=rows, method="sstoken", history="recorded", history_store=history, eval_strategy="steps"
    )
    trainer.args.eval_steps = 2
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2  # of four steps


def test_compute_metrics_sees_what_the_base_trainer_gives(tmp_path):
    def measure(prediction):
        logits, labels = prediction
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != -100)
        return {"right": int(right.sum()), "width": logits.shape[-1], "spread": float(abs(logits).mean())}

    model = build(dtype=torch.float32)
    expected = plain_evaluation(tmp_path, copy.deepcopy(model), ROWS, compute_metrics=measure)
    trainer = make_trainer(
        tmp_path, model, eval_dataset=ROWS, compute_metrics=measure, per_device_eval_batch_size=4, method="random"
    )
    found = trainer.evaluate()
    names = [name for name in expected if name in ("eval_right", "eval_width", "eval_spread", "eval_loss")]
    assert len(names) == 4 and found["eval_width"] == len(TOKENIZER)
    assert {n: found[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-6)


def test_training_goes_on_after_evaluation(tmp_path):
    with_eval = make_trainer(tmp_path, method="random", eval_dataset=ROWS, eval_strategy="steps")
    with_eval.args.eval_steps = 1
    with_eval.train()
    assert largest_difference(weights(with_eval), weights(run(tmp_path, method="random"))) == 0


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


# Other people's trainers


def test_the_mixin_works_over_a_trainer_of_the_users_own(tmp_path, history):
    class Mine(Trainer):
        """Counts steps, logs a value and makes an optimizer of its own."""

        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            super().log(logs | {"mine": 1.0}, *args, **kwargs)

        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
            return self.optimizer

    class MineSelective(TokenSelectionMixin, Mine):
        pass

    settings = {"method": "sstoken", "history": "recorded", "history_store": history}
    mine = run(tmp_path, cls=MineSelective, **settings)
    assert mine.steps == 4 and isinstance(mine.optimizer.optimizer, torch.optim.SGD)
    entry = mine.state.log_history[0]
    assert entry["mine"] == 1.0 and {"kept_share", "rel_mean", "loss"} <= set(entry)
    assert largest_difference(weights(mine), weights(run(tmp_path, **settings))) < TIGHT


def test_callbacks_and_other_columns_work_as_in_the_base_trainer(tmp_path):
    ends = []

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(state.global_step)

    trainer = make_trainer(tmp_path, rows=ROWS.add_column("source", ["x"] * len(ROWS)), method="random")
    trainer.add_callback(Callback())
    trainer.train()
    assert ends == [1, 2, 3, 4]


# Settings that cannot be


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"method": "random", "history": "emma"},
            "history must be one of none, recorded, last_seen, .*reference; got 'emma'",
        ),
        ({"method": "sstoken"}, "method 'sstoken' needs a history: history 'recorded' with history_store"),
        ({"method": "history_excess"}, "method 'history_excess' needs a history"),
        ({"method": "rel", "history": "recorded"}, "history='recorded' and history_store go together"),
        ({"method": "random", "history_store": "h.parquet"}, "history='recorded' and history_store go together"),
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
