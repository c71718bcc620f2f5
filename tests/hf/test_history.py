"""Histories: equal where they must be, the averages against hand-made ones, what a checkpoint brings back.

Models are float64 and optimizers SGD, as in test_trainer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import causal_lm, lora, padded, samples
from training import (
    ROWS,
    TOKENIZER,
    build,
    build_lora,
    eager_nll,
    largest_difference,
    make_trainer,
    record,
    run,
    weights,
)
from transformers import TrainerCallback

from tokensel import AdapterEMA, AdapterOff, LastSeen, ModelCopy, Selection, apply_to, methods
from tokensel.choose_history import load_reference
from tokensel.documents import BatchLayout
from tokensel.testing import make_model, make_rows, make_tokenizer

# Equal where they must be


def test_all_histories_of_the_base_are_the_same(tmp_path):
    def history(name, **settings):
        model = build_lora(random_adapter=False, dropout=0.3)  # B = 0: the run begins at the base
        # a floor, or the first step, at which REL is 0, would stretch a store's rounding to [0, 1]
        return run(tmp_path, model, method="sstoken", method_args="rel_floor=0.01", history=name, **settings)

    off = history("adapter_off")
    base = record(tmp_path / "base.parquet", build())
    same = [
        history("frozen"),
        history("frozen", history_device="cpu"),
        history("adapter_ema", history_decay=1.0),
        history("ema", history_decay=1.0),
    ]
    assert (
        largest_difference(
            weights(off), {n: p.detach() for n, p in build_lora(random_adapter=False).named_parameters()}
        )
        > 1e-3
    )
    for other in same:
        for (_, a), (_, b) in zip(off.seen, other.seen, strict=True):
            assert torch.equal(a.history_nll, b.history_nll) and torch.equal(a.weights, b.weights)
        assert largest_difference(weights(off), weights(other)) == 0
    recorded = history("recorded", history_store=base)
    for (_, a), (_, b) in zip(off.seen, recorded.seen, strict=True):
        assert ((a.history_nll - b.history_nll).abs() <= a.history_nll * 2.0**-24).all()  # a store keeps float32
        assert torch.equal(a.weights, b.weights)
    assert max(float((out.history_nll - out.nll).abs().max()) for _, out in off.seen) > 1e-3


def test_frozen_is_the_model_of_the_start_not_the_base(tmp_path):
    start = build_lora()
    trainer = run(tmp_path, copy.deepcopy(start), method="rel", history="frozen", per_device_train_batch_size=1)
    inputs, out = trainer.seen[-1]
    for model, same in ((start, True), (build(), False)):
        expected = eager_nll(model, {"input_ids": inputs["input_ids"][0].tolist()})
        expected = torch.where(out.response[0], expected, 0)[1:]
        assert torch.allclose(out.history_nll[0][1:], expected, rtol=1e-10) == same


def test_histories_in_a_loop_of_ones_own():
    batch, model = padded(samples()), lora(causal_lm())
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    saved = [p.detach().clone() for p in adapters]
    with torch.no_grad():
        for p in adapters:
            p.zero_()
    apply_to(model)
    histories = [AdapterOff(model), ModelCopy(model), AdapterEMA(model, 1.0), LastSeen()]
    method = methods.get("rel")
    model.train()  # evaluation is not a visit
    model(**batch, selection=Selection(method, history=histories[3]))
    for history in histories:
        history.after_step()
    with torch.no_grad():
        for p, value in zip(adapters, saved, strict=True):
            p.copy_(value)
    found = [model(**batch, selection=Selection(method, history=history)) for history in histories]
    for other in found[1:]:
        assert torch.equal(other.history_nll, found[0].history_nll) and torch.equal(other.weights, found[0].weights)
    assert float((found[0].history_nll - found[0].nll).abs().max()) > 0.1


# Averages


class Weights(TrainerCallback):
    """The trained weights before the first and after each optimizer step."""

    def __init__(self):
        self.steps = []

    def keep(self, args, state, control, model, **kwargs):
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    on_train_begin = on_step_end = keep


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.97])
@pytest.mark.parametrize("name", ["adapter_ema", "ema"])
def test_an_average_is_the_one_computed_by_hand(tmp_path, name, decay):
    model = build_lora(dropout=0.3) if name == "adapter_ema" else build()
    callback = Weights()
    trainer = make_trainer(
        tmp_path, model, method="rel", history=name, history_decay=decay, per_device_train_batch_size=2
    )
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.live_history.shares_head == (name == "adapter_ema")
    expected, before = callback.steps[0], None
    for now in callback.steps[1:]:
        before = expected
        expected = {n: decay * w + (1 - decay) * now[n] for n, w in expected.items()}
    assert len(callback.steps) == 9
    found = {n.removeprefix("base_model.model."): w for n, w in expected.items()}
    assert largest_difference(trainer.live_history.state_dict(), found) < 1e-14
    # the last step's history is the average of the step before
    by_hand = build_lora() if name == "adapter_ema" else build()
    by_hand.load_state_dict(before, strict=False)
    inputs, out = trainer.seen[-1]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        expected = eager_nll(by_hand, {"input_ids": inputs["input_ids"][row][mask].tolist()})
        expected = torch.where(out.response[row][mask], expected, 0)
        assert torch.allclose(out.history_nll[row][mask][1:], expected[1:], rtol=1e-9, atol=1e-12)


def test_a_bfloat16_model_has_a_float32_average():
    model = causal_lm(dtype=torch.bfloat16)
    history = ModelCopy(model, 0.999)
    name, parameter = next(iter(model.named_parameters()))
    expected = parameter.detach().double().clone()
    with torch.no_grad():
        parameter.mul_(1.5)
    for _ in range(200):
        history.after_step()
        expected = 0.999 * expected + 0.001 * parameter.detach().double()
    assert torch.allclose(history.values[name].double(), expected, rtol=1e-4)
    twin = dict(history.model.named_parameters())[name]
    assert twin.dtype == torch.bfloat16 and torch.equal(twin, history.values[name].bfloat16())
    assert not torch.equal(twin, causal_lm(dtype=torch.bfloat16).get_parameter(name))
    fresh = ModelCopy(causal_lm(dtype=torch.bfloat16), 0.999)
    fresh.load_state_dict(history.state_dict())
    for a, b in zip(fresh.model.parameters(), history.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_an_offloaded_average_moves_as_one_beside_the_model(dtype, tied):
    batch = padded(samples())
    inputs, layout = {name: batch[name] for name in ("input_ids", "attention_mask")}, BatchLayout.from_batch(batch)
    model = causal_lm(dtype=dtype, tie_word_embeddings=tied)
    beside, offloaded = ModelCopy(model, 0.5), ModelCopy(model, 0.5, offload=True)
    assert all(p.device.type == "meta" for p in offloaded.model.parameters())
    start = beside.token_nll(layout, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for history in (beside, offloaded):
        history.after_step()
    moved = beside.token_nll(layout, inputs)
    assert torch.equal(offloaded.token_nll(layout, inputs), moved)
    assert float((moved - start).abs().max()) > 0.1


def test_only_trained_weights_are_copied_and_nobody_sees_them(tmp_path):
    model = build_lora()
    names = set(model.state_dict())
    trainer = make_trainer(tmp_path, model, method="rel", history="adapter_ema")
    twin = trainer.live_history.model
    shared = {p.data_ptr() for p in model.parameters()}
    copied = [p for p in twin.parameters() if p.data_ptr() not in shared]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in copied) == sum(p.numel() for p in trained)
    assert sum(p.numel() for p in copied) < 0.5 * sum(p.numel() for p in model.parameters())
    assert set(model.state_dict()) == names and set(model.peft_config) == {"default"}
    assert not any(p.requires_grad for p in twin.parameters()) and all(p.requires_grad for p in trained)
    trainer.train()
    seen = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert seen == {id(p) for p in trained}


def test_a_saved_adapter_has_no_history_in_it(tmp_path):
    trainer = run(tmp_path, build_lora(), method="sstoken", history="adapter_ema", save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "adapter"))
    for folder in (tmp_path / "adapter", tmp_path / "out" / "checkpoint-4"):
        assert not any(path.is_dir() for path in folder.iterdir())
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == sum(p.requires_grad for p in trainer.model.parameters())
        assert not any("history" in name for name in saved)
        fresh = PeftModel.from_pretrained(build(), folder).double().eval()
        ids = torch.tensor([ROWS[0]["input_ids"]])
        assert torch.equal(fresh(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_a_copy_of_a_patched_model_is_a_copy_of_the_model():
    batch = padded(samples())
    model = lora(causal_lm())
    patched = copy.deepcopy(model)
    before = ModelCopy(model)
    apply_to(model)
    apply_to(patched)
    after = ModelCopy(patched)
    with torch.no_grad():
        for one in (model, patched):
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
    select = [Selection(methods.get("rel"), history=h) for h in (before, after)]
    a, b = (m(**batch, selection=s) for m, s in zip((model, patched), select, strict=True))
    assert torch.equal(a.history_nll, b.history_nll) and torch.equal(a.nll, b.nll)
    assert float((a.history_nll - a.nll).abs().max()) > 1e-2
    b.loss.backward()  # the model's own forward still is what it was


def test_a_sharded_weight_is_refused():
    model = causal_lm()
    model.model.norm.weight.full_tensor = None  # what tells a DTensor
    with pytest.raises(ValueError, match="model.norm.weight is sharded"):
        ModelCopy(model)


# Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"history": "adapter_ema"}, "history='adapter_ema' needs a PEFT model"),
        ({"history": "ema", "history_decay": 1.5}, r"history_decay must be in \[0, 1\].*got 1.5"),
        ({"history": "ema", "history_decay": -0.1}, r"history_decay must be in \[0, 1\].*got -0.1"),
        ({"history": "ema", "history_decay": float("nan")}, "history_decay must be"),
        ({"history": "frozen", "history_decay": 0.9}, "history_decay is for history adapter_ema or ema, .*'frozen'"),
        ({"history": "last_seen", "history_device": "cpu"}, "history_device is for history frozen or ema or reference"),
        ({"history": "ema", "history_8bit": True}, "history_8bit is for history reference, but history is 'ema'"),
        ({"history": "last_seen", "num_train_epochs": 1}, "knows nothing of a document before its second visit"),
        ({"history": "reference"}, "history='reference' and history_model_name_or_path go together"),
        ({"history": "ema", "history_model_name_or_path": "x"}, "history_model_name_or_path go together"),
        (
            {"history": "reference", "history_model_name_or_path": "/nowhere/at/all"},
            "history_model_name_or_path '/nowhere/at/all' cannot be loaded",
        ),
    ],
)
def test_contradictory_histories_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, method="rel", **settings)


def test_adapters_beside_trained_weights_have_no_average_of_their_own(tmp_path):
    model = build_lora()
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    with pytest.raises(ValueError, match="history='adapter_ema' needs the base model frozen.*norm.weight is trained"):
        AdapterEMA(model, 0.9)
    history = ModelCopy(model, 0.9)  # which any trained weight has
    assert "model.norm.weight" in history.values


def test_a_model_without_trained_weights_has_no_copy():
    with pytest.raises(ValueError, match="no trained parameter"):
        ModelCopy(causal_lm().requires_grad_(False))


def test_references_that_cannot_be_compared_are_refused(tmp_path, reference):
    other = make_tokenizer(make_rows(80, seed=8), vocab_size=400)
    model = make_model(TOKENIZER, hidden_size=32, layers=1, heads=4, kv_heads=2, seed=5)
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has another tokenizer than this run"):
        load_reference(str(tmp_path / "other"), TOKENIZER)
    with pytest.raises(ValueError, match="processing_class"):
        load_reference(reference[0], None)


def test_a_reference_twice_is_refused(tmp_path, reference):
    path, model = reference
    store = record(tmp_path / "r.parquet", model)
    settings = {"history": "reference", "history_model_name_or_path": path}
    with pytest.raises(ValueError, match="recorded and history='reference' both give reference_nll"):
        make_trainer(tmp_path, method="rho1", recorded={"reference": store}, **settings)


def test_eight_bits_without_the_library_say_what_to_install(tmp_path, reference, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(ValueError, match="pip install torchao"):
        load_reference(reference[0], TOKENIZER, eight_bit=True)
