"""Histories: equal where they must be, the averages against hand-made ones, what a checkpoint brings back.

Models are float64 and optimizers SGD, as in test_trainer.
"""

from __future__ import annotations

import pytest
import torch
from tiny import causal_lm, padded, samples
from training import (
    ROWS,
    TOKENIZER,
    Recording,
    build,
    build_lora,
    eager_nll,
    largest_difference,
    make_trainer,
    record,
    run,
    weights,
)

from tokensel import LastSeen, OtherModel, Selection, apply_to, methods
from tokensel.choose_history import load_reference
from tokensel.documents import BatchLayout
from tokensel.testing import make_model


def history_losses(trainer):
    return [out.history_nll for _, out in trainer.seen]


def documents(trainer, field):
    """(document, its losses as a list) in the order in which they were visited; padded batches."""
    found = []
    for inputs, out in trainer.seen:
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            values = getattr(out, field)[row][mask] * out.response[row][mask]
            found.append((tuple(inputs["input_ids"][row][mask].tolist()), values.tolist()))
    return found


def documents_seen(history):
    return len(history.state_dict()["key"])


# Last seen


def test_last_seen_is_the_loss_of_the_visit_before(tmp_path):
    trainer = run(tmp_path, build_lora(dropout=0.3), method="sstoken", history="last_seen", num_train_epochs=3)
    before = {}
    for (key, nll), (_, history) in zip(documents(trainer, "nll"), documents(trainer, "history_nll"), strict=True):
        assert history == before.get(key, nll)  # the first visit has REL 0
        before[key] = nll
    assert len(before) == len(ROWS) == documents_seen(trainer.live_history)
    relative = [float((out.history_nll - out.nll).abs().max()) for _, out in trainer.seen]
    assert max(relative[:4]) == 0 and min(relative[4:]) > 1e-2
    for _, out in trainer.seen[:4]:  # attention alone
        assert torch.allclose(out.score[out.response], 0.5 * out.mass[out.response])


def test_last_seen_after_one_epoch_is_what_would_have_been_recorded(tmp_path):
    settings = {"method": "history_excess", "learning_rate": 0.0, "num_train_epochs": 2}
    seen = run(tmp_path, history="last_seen", **settings)
    recorded = run(tmp_path, history="recorded", history_store=record(tmp_path / "h.parquet", build()), **settings)
    for (_, a), (_, b) in list(zip(seen.seen, recorded.seen, strict=True))[4:]:
        assert ((a.history_nll - b.history_nll).abs() <= a.history_nll * 2.0**-23).all()
    assert float(seen.seen[-1][1].history_nll.max()) > 1


def test_last_seen_works_packed_as_padded_and_over_accumulation(tmp_path):
    settings = {"method": "sstoken", "history": "last_seen", "num_train_epochs": 2}
    padded_run = run(tmp_path, **settings)
    packed_run = run(tmp_path, packing=True, **settings)
    split = run(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    for other in (packed_run, split):
        assert largest_difference(weights(padded_run), weights(other)) < 1e-12
    attention = run(tmp_path, method="attention", num_train_epochs=2)
    assert largest_difference(weights(padded_run), weights(attention)) > 1e-4


def test_a_batch_may_mix_documents_seen_and_new():
    rows, history, select = samples(), LastSeen(), methods.get("rel")
    model = causal_lm()
    apply_to(model)
    model.train()
    first = model(**padded(rows[2:]), selection=Selection(select, history=history))
    history.after_step()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    both = model(**padded(rows), selection=Selection(select, history=history))
    assert torch.equal(both.history_nll[:2], both.nll[:2])
    width = first.nll.shape[1]
    assert torch.equal(both.history_nll[2:, :width], first.nll) and not torch.equal(both.nll[2:, :width], first.nll)


def test_neither_scoring_nor_evaluation_is_a_visit():
    batch, history = padded(samples()), LastSeen()
    model = causal_lm()
    apply_to(model)
    model.train()
    model(**batch, selection=Selection(methods.get("rel"), history=history, score_only=True))
    with torch.no_grad():
        model(**batch, selection=Selection(methods.get("rel"), history=history))
    history.after_step()
    assert documents_seen(history) == 0
    model.eval()(**batch, selection=Selection(methods.get("rel"), history=history))
    assert documents_seen(history) == 0  # not before the optimizer step
    history.after_step()
    assert documents_seen(history) == 4


# Reference


@pytest.mark.parametrize(
    "settings",
    [{"history_device": None}, {"history_device": "cpu"}, {"packing": True}],
    ids=["resident", "offloaded", "packed"],
)
def test_a_reference_gives_its_own_losses(tmp_path, reference, settings):
    path, model = reference
    trainer = run(
        tmp_path,
        method="sstoken",
        history="reference",
        history_model_name_or_path=path,
        per_device_train_batch_size=1,
        **settings,
    )
    assert trainer.live_history.signal == "history_nll"
    for inputs, out in trainer.seen[:4]:
        expected = eager_nll(model, {"input_ids": inputs["input_ids"][0].tolist()})
        expected = torch.where(out.response[0], expected, 0)
        assert torch.allclose(out.history_nll[0][1:].double(), expected[1:], rtol=1e-6)
        assert float((out.history_nll - out.nll).abs().max()) > 0.1


def test_rho1_takes_a_reference_as_its_reference(tmp_path, reference):
    path, model = reference
    live = run(
        tmp_path, method="rho1", history="reference", history_model_name_or_path=path, per_device_train_batch_size=8
    )
    store = record(tmp_path / "r.parquet", model)
    recorded = run(tmp_path, method="rho1", recorded={"reference": store}, per_device_train_batch_size=8)
    assert live.live_history.signal == "reference_nll"
    for (_, a), (_, b) in zip(live.seen, recorded.seen, strict=True):
        assert torch.equal(a.weights, b.weights)
    assert largest_difference(weights(live), weights(recorded)) < 1e-12


def test_eight_bits_are_near_the_reference(reference, tmp_path):
    pytest.importorskip("torchao")
    path, _ = reference
    single = tmp_path / "float32"
    make_model(TOKENIZER, hidden_size=64, layers=2, heads=4, kv_heads=2, seed=5).save_pretrained(single)
    TOKENIZER.save_pretrained(single)
    batch = padded(samples())
    losses = []
    for eight_bit in (False, True):
        model = load_reference(str(single), TOKENIZER, eight_bit=eight_bit)
        kinds = {type(p.data).__name__ for n, p in model.named_parameters() if "proj" in n}
        assert ("Int8Tensor" in str(kinds)) == eight_bit, kinds
        losses.append(
            OtherModel(model).token_nll(
                BatchLayout.from_batch(batch), {k: batch[k] for k in ("input_ids", "attention_mask")}
            )
        )
    assert 0 < float((losses[0] - losses[1]).abs().max()) < 0.1


# Resume


def resumed_and_whole(tmp_path, build_model, dropped_at=6, **settings):
    """Trainers of a run of 8 steps and of one that began anew from its checkpoint in the middle of an epoch."""
    settings = {"save_strategy": "steps", "save_steps": dropped_at, "num_train_epochs": 2, "optim": "adamw_torch"} | {
        "learning_rate": 0.02,
        "full_determinism": False,
        **settings,
    }
    whole = run(tmp_path, build_model(), **settings)
    resumed = make_trainer(tmp_path, build_model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{dropped_at}"))
    return whole, resumed


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sstoken", "history": "recorded"},
        {"method": "sstoken", "history": "last_seen"},
        {"method": "sstoken", "history": "adapter_off"},
        {"method": "sstoken", "history": "adapter_ema", "history_decay": 0.8},
        {"method": "sstoken", "history": "frozen"},
        {"method": "sstoken", "history": "ema", "history_decay": 0.8},
        {"method": "sstoken", "history": "ema", "history_decay": 0.8, "history_device": "cpu"},
        {"method": "rho1", "history": "reference"},
        {"method": "ada_eslm", "method_args": "alpha=0.3,speed=2.0"},
    ],
    ids=lambda s: "-".join(str(s[n]) for n in ("method", "history", "history_device") if n in s),
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, reference, settings):
    settings = dict(settings)
    full = settings.get("history_device") or settings["history" if "history" in settings else "method"] in ("ada_eslm",)
    if settings.get("history") == "recorded":
        settings["history_store"] = record(tmp_path / "h.parquet", build(seed=2))
    if settings.get("history") == "reference":
        settings["history_model_name_or_path"] = reference[0]
    model = build if full else (lambda: build_lora(dropout=0.2))
    whole, resumed = resumed_and_whole(tmp_path, model, **settings)
    assert len(whole.seen) == 8 and len(resumed.seen) == 2
    for (_, a), (_, b) in zip(whole.seen[6:], resumed.seen, strict=True):
        assert torch.equal(a.weights, b.weights) and torch.equal(a.score, b.score)
        assert a.history_nll is None or torch.equal(a.history_nll, b.history_nll)
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_a_frozen_history_comes_from_the_checkpoint_not_from_the_model_at_hand(tmp_path):
    seeds = iter((1, 2))
    whole, resumed = resumed_and_whole(tmp_path, lambda: build(seed=next(seeds)), method="rel", history="frozen")
    assert torch.equal(history_losses(whole)[-1], history_losses(resumed)[-1])


def test_a_checkpoint_without_the_state_or_of_another_history_is_refused(tmp_path):
    settings = {"method": "rel", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run(tmp_path, build(), **settings, history="ema")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert {"selection_state.safetensors", "trainer_state.json"} <= {path.name for path in checkpoint.iterdir()}
    resume = {"resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(ValueError, match="made with history='ema', this run has 'frozen'"):
        make_trainer(tmp_path, build(), **settings, history="frozen").train(**resume)
    partly = build()
    partly.model.norm.weight.requires_grad_(False)
    (checkpoint / "optimizer.pt").unlink()  # it would complain first
    with pytest.raises(ValueError, match="saved history is of another model: model.norm.weight"):
        make_trainer(tmp_path, partly, **settings, history="ema").train(**resume)
    (checkpoint / "selection_state.safetensors").unlink()
    with pytest.raises(ValueError, match="selection_state.safetensors is missing"):
        make_trainer(tmp_path, build(), **settings, history="ema").train(**resume)


def test_the_threshold_of_ada_eslm_moves_once_a_step(tmp_path):
    class Watching(Recording):
        def log(self, logs, *args, **kwargs):
            self.__dict__.setdefault("alphas", []).append(float(self.method.rule.alpha))
            super().log(logs, *args, **kwargs)

    trainer = run(
        tmp_path, cls=Watching, method="ada_eslm", method_args="alpha=0.3,speed=2.0", gradient_accumulation_steps=2
    )
    kept = [out.nll[out.weights > 0].double() for _, out in trainer.seen]
    risk = [torch.cat(kept[:2]).mean(), torch.cat(kept[2:]).mean()]
    expected = 0.3 * torch.exp(-2 * (risk[1] - risk[0]) / risk[0])
    assert trainer.alphas[:2] == pytest.approx([0.3, float(expected)], rel=1e-9) and len(trainer.seen) == 4


def test_watched_rows_move_neither_a_threshold_nor_what_was_last_seen(tmp_path):
    for settings in (
        {"method": "ada_eslm", "method_args": "alpha=0.3,speed=2.0"},
        {"method": "rel", "history": "last_seen", "num_train_epochs": 2},
    ):
        plain = run(tmp_path, **settings)
        watched = run(tmp_path, record_samples=3, **settings)
        assert largest_difference(*(t._selection.state_dict()["tensors"] for t in (plain, watched))) == 0
        assert largest_difference(weights(plain), weights(watched)) == 0
