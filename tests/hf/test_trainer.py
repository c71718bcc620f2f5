"""Models here are float64 and optimizers SGD, so that equal updates are equal to rounding, far below real changes."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel
from training import (
    PLAIN,
    ROWS,
    TIGHT,
    TOKENIZER,
    build,
    build_lora,
    eager_nll,
    largest_difference,
    losses,
    make_trainer,
    record,
    run,
    weights,
)
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tokensel.trainer import (
    TokenSelectionMixin,
)

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
