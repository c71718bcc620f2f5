"""A history is what it says: the base without adapters is the base, and a reference knows the tokens that are used."""

from __future__ import annotations

import inspect

import peft
import pytest
import torch
from architectures import tiny_model
from tiny import causal_lm, lora, padded, samples
from training import ROWS, TOKENIZER, make_trainer

from tokensel import AdapterOff, ModelCopy, OtherModel, Selection, apply_to, methods
from tokensel.adapters import _shares_of_base
from tokensel.choose_history import load_reference
from tokensel.recording import record_losses
from tokensel.testing import make_model


def adapted(model, targets=("q_proj", "v_proj"), **settings):
    kind = settings.pop("config", peft.LoraConfig)
    return peft.get_peft_model(model, kind(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **settings))


def nll_of(model, batch):
    """Of the model itself, [B, S]."""
    patched = apply_to(model, layer=None)
    return patched.token_nll({name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"])


def history_nll(model, batch, history):
    apply_to(model)
    return model(**batch, selection=Selection(methods.get("rel"), history=history)).history_nll


# Adapters off


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_rewrites_the_base_is_refused(batch, how):
    base = nll_of(causal_lm(dtype=torch.float32), batch)
    model = adapted(causal_lm(dtype=torch.float32), init_lora_weights=how)
    with model.disable_adapter():
        assert (nll_of(model, batch) - base).abs().max() > 1  # nats
    with pytest.raises(ValueError, match=f"initialised by '{how}', which rewrites .* 'recorded'.* or 'frozen'"):
        AdapterOff(model)
    # what the error advises is the base
    torch.testing.assert_close(history_nll(model, batch, ModelCopy(model)), base, rtol=0, atol=1e-4)


def test_an_initialisation_that_nobody_knows_is_refused():
    model = adapted(causal_lm())
    for how in ("corda", "loftq", "lora_ga", "of next year"):
        model.peft_config["default"].init_lora_weights = how
        with pytest.raises(ValueError, match=f"initialised by '{how}'"):
            AdapterOff(model)


@pytest.mark.skipif(not hasattr(peft, "KasaConfig"), reason="not in this PEFT")
def test_singular_values_that_are_cut_off_are_refused():
    with pytest.raises(ValueError, match="initialised by 'kasa'"):
        AdapterOff(adapted(causal_lm(), kasa_config=peft.KasaConfig()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_base_that_was_saved_without_them_is_noticed(tmp_path, how, dtype):
    model = adapted(causal_lm(dtype=dtype), init_lora_weights=how)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's page of PiSSA says
    model.save_pretrained(tmp_path / "adapter")
    residual = model.unload()
    again = peft.PeftModel.from_pretrained(residual, tmp_path / "adapter", is_trainable=True)
    assert again.peft_config["default"].init_lora_weights is True
    with pytest.raises(ValueError, match="nothing in the directions of adapter 'default' .* 'recorded'.* or 'frozen'"):
        AdapterOff(again)


_LEAVE = {
    "zero": {},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dora": {"use_dora": True},
    "adalora": {"config": peft.AdaLoraConfig, "total_step": 10},
    "embeddings": {"targets": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("how", _LEAVE)
def test_adapters_that_leave_the_base_are_taken_trained_or_not(tmp_path, batch, how):
    base = nll_of(causal_lm(dtype=torch.float32), batch)
    try:
        model = adapted(causal_lm(dtype=torch.float32), **_LEAVE[how])
    except (ValueError, TypeError) as error:
        pytest.skip(f"not in this PEFT: {error}")
    assert torch.equal(history_nll(model, batch, AdapterOff(model)), base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    assert torch.equal(history_nll(model, batch, AdapterOff(model)), base)
    assert (nll_of(model, batch) - base).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(causal_lm(dtype=torch.float32), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(history_nll(again, batch, AdapterOff(again)), base)


def test_adapters_in_directions_that_the_base_lacks_are_taken_where_they_were_looked_for(batch):
    model = causal_lm(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:4] = 0
    base = nll_of(model, batch)
    try:
        model = adapted(model, ["q_proj"], init_lora_weights="mica")
    except ValueError as error:
        pytest.skip(f"not in this PEFT: {error}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    layer = next(m for m in model.modules() if hasattr(m, "lora_B"))
    assert _shares_of_base(layer)["default"] < 1e-5
    torch.testing.assert_close(history_nll(model, batch, AdapterOff(model)), base)


def test_a_random_adapter_has_its_share_of_the_base():
    model = adapted(causal_lm(hidden_size=64), ("q_proj", "v_proj", "gate_proj", "down_proj"), init_lora_weights=False)
    shares = [s for layer in model.modules() if hasattr(layer, "lora_B") for s in _shares_of_base(layer).values()]
    assert len(shares) == 12 and all(0.8 < share < 1.25 for share in shares)


@pytest.mark.skipif("target_parameters" not in inspect.signature(peft.LoraConfig).parameters, reason="not in this PEFT")
def test_adapters_on_two_parameters_of_the_experts_are_taken(batch):
    model = tiny_model("mixtral")
    experts = [n for n, _ in model.named_parameters() if n.endswith((".gate_up_proj", ".down_proj"))]
    if not experts:
        pytest.skip("experts are modules in this transformers")
    base = nll_of(model, batch)
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(model, (), target_parameters=both, init_lora_weights=False)
    assert any(".base_layer." in n for n, p in model.named_parameters() if p.requires_grad)
    history = AdapterOff(model)
    assert torch.equal(history_nll(model, batch, history), base)
    assert (nll_of(model, batch) - base).abs().max() > 0.01
    name = next(n for n, p in model.named_parameters() if n.endswith("base_layer.base_layer.gate_up_proj"))
    model.get_parameter(name).requires_grad_(True)
    with pytest.raises(ValueError, match=f"needs the base model frozen, but {name} is trained"):
        AdapterOff(model)


def test_adapters_that_were_off_stay_off(batch):
    model = lora(causal_lm())
    layers = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    history = AdapterOff(model)
    layers[0].enable_adapters(False)  # one of them
    history_nll(model, batch, history)
    assert [m.disable_adapters for m in layers] == [True] + [False] * (len(layers) - 1)
    model.base_model.disable_adapter_layers()
    base = nll_of(causal_lm(), batch)
    for _ in range(2):
        assert torch.equal(history_nll(model, batch, history), base)
        assert torch.equal(nll_of(model, batch), base) and all(m.disable_adapters for m in layers)
    model.base_model.enable_adapter_layers()
    assert not torch.equal(nll_of(model, batch), base)


def test_merged_adapters_are_refused(batch):
    model = lora(causal_lm())
    earlier = AdapterOff(model)
    model.merge_adapter()
    for make in (lambda: AdapterOff(model), lambda: history_nll(model, batch, earlier)):
        with pytest.raises(ValueError, match=r"adapters are merged into it; call model.unmerge_adapter\(\) first"):
            make()
    model.unmerge_adapter()
    for history in (AdapterOff(model), earlier):
        torch.testing.assert_close(history_nll(model, batch, history), nll_of(causal_lm(), batch))


# What changes after the history was made


def test_adapters_that_are_added_later_are_off_too(batch):
    base = nll_of(causal_lm(dtype=torch.float32), batch)
    model = lora(causal_lm(dtype=torch.float32), ["q_proj"])
    history = AdapterOff(model)
    model.add_adapter("later", peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("later")
    assert torch.equal(history_nll(model, batch, history), base)
    assert (nll_of(model, batch) - base).abs().max() > 0.1
    model.add_adapter("worse", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="adapter 'worse' was initialised by 'pissa'"):
        history_nll(model, batch, history)


def unfrozen_layer(model):
    """Of which the last layer is trained alone."""
    model.requires_grad_(False).model.layers[-1].requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "make, history, message",
    [
        (lora, AdapterOff, "needs the base model frozen, but .*embed_tokens.weight is trained"),
        (lora, ModelCopy, "'frozen' has no copy of .*embed_tokens.weight, .* make the history after"),
        (unfrozen_layer, ModelCopy, "'frozen' has no copy of model.embed_tokens.weight, .* make the history after"),
        (unfrozen_layer, lambda model: ModelCopy(model, 0.5, device="cpu"), "'ema' has no copy of model.embed_tokens"),
    ],
)
def test_weights_that_are_trained_later_are_refused(batch, make, history, message):
    model = make(causal_lm())
    made = history(model)
    before = history_nll(model, batch, made)
    embeddings = model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        history_nll(model, batch, made)
    embeddings.requires_grad_(False)
    assert torch.equal(history_nll(model, batch, made), before)


def test_a_frozen_copy_of_everything_stays_what_it_was(batch):
    model = causal_lm()
    made, base = ModelCopy(model), nll_of(causal_lm(), batch)
    assert torch.equal(history_nll(lora(model), batch, made), base)
    made = ModelCopy(unfrozen_layer(model := causal_lm()), device="cpu")
    model.requires_grad_(True)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert torch.equal(history_nll(model, batch, made), base)


# A reference of another size


@pytest.fixture(scope="module")
def short_head(tmp_path_factory):
    """(directory, model, rows of its head): the tokenizer has two entries more."""
    rows = len(TOKENIZER) - 2
    path = tmp_path_factory.mktemp("short")
    model = make_model(TOKENIZER, hidden_size=32, layers=1, heads=4, kv_heads=2, seed=5).double()
    model.resize_token_embeddings(rows)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path), model, rows


def test_a_reference_is_judged_by_the_tokens_that_are_used(tmp_path, short_head):
    path, model, rows = short_head
    settings = {"method": "rel", "history": "reference", "history_model_name_or_path": path}
    data = ROWS.filter(lambda row: max(row["input_ids"]) < rows)
    trainer = make_trainer(tmp_path, model, data, max_steps=1, **settings)  # against itself
    trainer.train()
    _, out = trainer.seen[0]
    assert rows < len(TOKENIZER) and out.response.any()
    torch.testing.assert_close(out.history_nll, out.nll, rtol=1e-6, atol=1e-6)


def test_a_token_that_a_reference_has_no_row_for_is_named(short_head):
    reference = OtherModel(load_reference(short_head[0], TOKENIZER), "history_nll")
    rows = short_head[2]
    model = make_model(TOKENIZER, hidden_size=32, layers=2, heads=4, kv_heads=2, seed=1)
    apply_to(model)
    selection = Selection(methods.get("rel"), history=reference)
    batch = padded(samples(((3, 4), (2, 6))))
    expected = model(**batch, selection=selection).history_nll
    batch["input_ids"][batch["attention_mask"] == 0] = rows  # a padding token of the current model's alone
    assert torch.equal(model(**batch, selection=selection).history_nll, expected)
    for place in ((0, 0), (1, 5)):  # in the prompt, in the response
        wrong = {name: value.clone() for name, value in batch.items()}
        wrong["input_ids"][place] = rows
        with pytest.raises(ValueError, match=f"token {rows}, but the history's .* has rows for {rows} tokens"):
            model(**wrong, selection=selection)


def test_the_model_that_is_trained_is_no_reference():
    model = causal_lm()
    apply_to(model)
    with pytest.raises(ValueError, match="patched already"):
        OtherModel(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_token_that_a_negative_model_has_no_row_for_is_named(tmp_path, short_head):
    _, negative, rows = short_head
    model = make_model(TOKENIZER, hidden_size=32, layers=1, heads=4, kv_heads=2, seed=1)
    data = [{"input_ids": [4, rows], "labels": [-100, rows]}]
    with pytest.raises(ValueError, match=f"token {rows} has no embedding: .* has {rows}"):
        record_losses(model, data, tmp_path / "store.parquet", negative=negative)
