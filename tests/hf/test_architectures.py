"""Every architecture of tests/architectures.py: captured attention, statistics and a training step are its own."""

from __future__ import annotations

import sys

import pytest
import torch
from architectures import NO_ATTENTION, REFUSED, supported, tiny_model
from oracles import next_token_nll
from tiny import VOCABULARY
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import tokensel
from tokensel import methods, prompt_attention_mass


def make_batch():
    """Rows of up to 13 tokens, longer than the self-test's 8."""
    valid = torch.ones(3, 13, dtype=torch.int64)
    valid[1, 10:] = valid[2, 12:] = 0
    response = torch.zeros(3, 13, dtype=torch.bool)
    response[0, 5:8] = response[0, 10:] = response[1, 3:10] = response[2, 7:12] = True
    ids = torch.randint(3, VOCABULARY, (3, 13)) * valid
    return {"input_ids": ids, "labels": torch.where(response, ids, -100), "attention_mask": valid}


def own_mass(model, inputs, prompt, monkeypatch):
    """What each layer's eager attention puts on prompt keys, [B, S] float64: its output for a value of 1 for these."""
    found = {}
    for module in {sys.modules[type(m).__module__] for m in model.modules()}:
        eager = getattr(module, "eager_attention_forward", None)

        def watched(m, query, key, value, attention_mask, eager=eager, **kwargs):
            ones = prompt[:, None, :, None].to(value.dtype).expand(value.shape)
            found[m.layer_idx] = eager(m, query, key, ones, attention_mask, **kwargs)[0].double().mean((2, 3))
            return eager(m, query, key, value, attention_mask, **kwargs)

        if eager is not None:
            monkeypatch.setattr(module, "eager_attention_forward", watched)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    monkeypatch.undo()
    return found, logits


def cross_entropy(model, batch, weights):
    """Σ weight · nll / Σ weight of the model's own logits, plus what the model adds for its experts."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    nll = next_token_nll(out.logits.double(), batch["labels"])
    loss = (nll * weights[:, 1:]).sum() / weights.sum()
    if getattr(out, "aux_loss", None) is not None:
        places = (model, model.config.get_text_config())
        names = ("router_aux_loss_coef", "aux_loss_coef")
        weight = next(getattr(place, name) for place in places for name in names if hasattr(place, name))
        loss = loss + weight * out.aux_loss
    return loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def tiny(model_type):
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip("not in this transformers")
    return tiny_model(model_type)


@pytest.mark.parametrize("model_type", supported())
def test_an_architecture_is_supported(model_type, monkeypatch):
    model, batch = tiny(model_type), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    valid, response = batch["attention_mask"].bool(), batch["labels"] != -100
    prompt = ~response & valid
    masses, logits = own_mass(model, inputs, prompt, monkeypatch)
    log_p = logits.double().log_softmax(-1)

    # statistics are those of the model's own logits
    patched = tokensel.apply_to(model)
    nll = patched.token_nll(inputs, batch["labels"])
    expected = next_token_nll(logits.double(), batch["labels"])
    assert (nll[:, 1:] - expected)[response[:, 1:]].abs().max() <= 1e-6 * log_p.abs().max()

    # captured attention, of every layer that can be named
    tokensel.remove(model)
    for layer in masses:
        try:
            other = tokensel.apply_to(model, layer)
        except ValueError as error:
            assert layer not in patched.layers and "it is of type" in str(error)
            continue
        with torch.no_grad(), other.attention.armed() as take:
            other.backbone(inputs)
            (captured,) = take()
        tokensel.remove(model)
        mass = prompt_attention_mass(captured.q, captured.k, prompt, key_mask=valid, **captured.options)
        # eager attention's softmax is float32
        assert (mass - masses[layer])[response].abs().max() <= 2e-6
        assert masses[layer][response].std() > 0.01

    tokensel.apply_to(model)
    a_step_is_masked_cross_entropy(model, batch, ("full", "attention"))


def a_step_is_masked_cross_entropy(model, batch, chosen):
    """Loss and every gradient on all response tokens, and on those that a method selects."""
    for method in chosen:
        out = model(**batch, selection=tokensel.Selection(methods.get(method)))
        ours = gradients(model, out.loss)
        assert out.weights.sum() == (18 if method == "full" else 4 + 5 + 3)
        loss = cross_entropy(model, batch, out.weights)
        torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0, check_dtype=False)
        theirs = gradients(model, loss)
        assert ours.keys() == theirs.keys()
        largest = max(g.abs().max() for g in theirs.values())
        for name, gradient in theirs.items():  # the statistics are float32
            difference = (ours[name] - gradient).abs().max()
            assert difference <= 1e-5 * gradient.abs().max() + 1e-7 * largest, name


@pytest.mark.parametrize("why, model_type", [(why, name) for why, (_, rows) in NO_ATTENTION.items() for name in rows])
def test_an_architecture_is_supported_without_its_attention(why, model_type):
    model, batch = tiny(model_type), make_batch()
    with pytest.raises(ValueError, match=NO_ATTENTION[why][0]) as refusal:
        tokensel.apply_to(model)
    assert "layer=None" in str(refusal.value)
    tokensel.apply_to(model, layer=None)
    a_step_is_masked_cross_entropy(model, batch, ("full", "random"))
    with pytest.raises(ValueError, match="the method measures attention, but apply_to was told to capture none"):
        model(**batch, selection=tokensel.Selection(methods.get("attention")))


@pytest.mark.parametrize("why, model_type", [(why, name) for why, (_, rows) in REFUSED.items() for name in rows])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # of Llama 4's vision tower
def test_an_architecture_is_refused_with_the_reason(why, model_type):
    error, _ = REFUSED[why]
    model = tiny(model_type)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    for layer in (-1, None):
        with pytest.raises(ValueError, match=error):
            tokensel.apply_to(model, layer)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
