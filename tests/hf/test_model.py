from __future__ import annotations

import inspect

import peft
import pytest
import torch
import transformers
from oracles import next_token_nll
from tiny import FAMILIES, causal_lm, lora

import tokensel
from tokensel import AdapterOff, prompt_attention_mass
from tokensel.model import apply_to, remove, unwrap


def logits_of(model, batch):
    """[tokens, V] of the tokens that are no padding."""
    mask = batch["attention_mask"]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=mask).logits[mask.bool()]


# Nothing changes without `selection=`


@pytest.mark.parametrize(
    "family, attention", [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if (f, a) != ("Gemma2", "sdpa")]
)
def test_a_patched_model_computes_the_same_bits(family, attention, batch):
    model = causal_lm(family, torch.float32, attention)
    before = logits_of(model, batch)
    apply_to(model)
    assert torch.equal(logits_of(model, batch), before)
    assert model.config._attn_implementation == attention
    remove(model)
    assert torch.equal(logits_of(model, batch), before)


def test_remove_leaves_nothing_behind():
    model = causal_lm()
    configs = {id(m): id(m.config) for m in model.modules() if hasattr(m, "config")}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    patched = apply_to(model)
    assert any(id(m.config) != configs[id(m)] for m in model.modules() if hasattr(m, "config"))
    remove(model)
    assert {id(m): id(m.config) for m in model.modules() if hasattr(m, "config")} == configs
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert model.model.layers[patched.layers[0]].self_attn.config is model.config


def test_a_forward_that_was_replaced_before_is_put_back():
    model = causal_lm()
    own = model.forward = model.forward  # as accelerate does
    apply_to(model)
    assert model.forward is not own
    remove(model)
    assert model.__dict__["forward"] is own


def test_training_modes_are_left_as_they_were():
    model = causal_lm().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    apply_to(model)
    assert [m.training for m in model.modules()] == modes


def test_a_patched_model_saves_and_loads(tmp_path, batch):
    model = causal_lm(dtype=torch.float32)
    apply_to(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


# What is captured


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_queries_and_keys_give_the_attention_of_the_model(family, layer, batch):
    model = causal_lm(family)
    mask = batch["attention_mask"].bool()
    prompt = (batch["labels"] == -100) & mask
    with torch.no_grad():
        weights = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True
        ).attentions
    patched = apply_to(model, layer)
    with torch.no_grad(), patched.attention.armed() as take:
        patched.backbone({name: batch[name] for name in ("input_ids", "attention_mask")})
        (captured,) = take()
    assert captured.q.shape[1] == 4 and captured.k.shape[1] == 2
    mass = prompt_attention_mass(captured.q, captured.k, prompt, key_mask=mask, **captured.options)
    expected = (weights[patched.layers[0]].double() * prompt[:, None, None, :]).sum(-1).mean(1)
    response = mask & ~prompt
    torch.testing.assert_close(mass[response], expected[response].to(mass.dtype), rtol=0, atol=1e-6)
    assert expected[response].std() > 0.01


def test_the_last_layer_is_the_last_one_with_full_attention():
    assert apply_to(causal_lm("Llama")).layers == (2,)
    assert apply_to(causal_lm("Gemma2")).layers == (1,)  # layers 0 and 2 slide
    assert apply_to(causal_lm("Gemma2"), layer=2).layers == (2,)
    assert apply_to(causal_lm("Llama"), layer=-3).layers == (0,)
    assert apply_to(causal_lm("Llama"), layer=[-1, 0]).layers == (2, 0)


def test_nothing_is_captured_outside_the_arms_of_a_training_forward(batch):
    model = causal_lm()
    patched = apply_to(model)
    logits_of(model, batch)
    with patched.attention.armed() as take, pytest.raises(ValueError, match="layer 2 of LlamaForCausalLM made no call"):
        take()


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_models_own_logits(family, batch):
    model = causal_lm(family)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = next_token_nll(logits.double(), batch["labels"])
    patched = apply_to(model)
    nll = patched.token_nll({name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"])
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        assert float(nll[b, t]) == pytest.approx(float(expected[b, t - 1]), abs=1e-6)
    assert (nll[batch["labels"] == -100] == 0).all()


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_several_layers_are_the_mean_of_their_masses(family, batch):
    model = causal_lm(family)  # of Gemma2's, layers 0 and 2 slide and layer 1 does not
    mask = batch["attention_mask"].bool()
    prompt = (batch["labels"] == -100) & mask
    with torch.no_grad():
        weights = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True
        ).attentions
    expected = torch.stack(
        [(weights[i].double() * prompt[:, None, None, :]).sum(-1).mean(1) for i in (2, 0, 1)]
    )  # (3, B, S)
    apply_to(model, [2, 0, 1])
    out = model(**batch, selection=tokensel.Selection(tokensel.methods.get("attention")))
    difference = out.mass[out.response] - expected.mean(0)[out.response]
    assert difference.abs().max() <= 1e-6 < (expected[0] - expected.mean(0))[out.response].abs().max()


# Wrappers and adapters


def test_wrappers_are_seen_through(batch):
    base = causal_lm()
    wrapped = lora(base)
    assert unwrap(wrapped) is base
    assert unwrap(torch.nn.DataParallel(base)) is base
    before = logits_of(wrapped, batch)
    apply_to(wrapped)
    assert torch.equal(logits_of(wrapped, batch), before)


_ON_EMBEDDINGS = [{"modules_to_save": ["embed_tokens"]}, {"targets": ["q_proj", "embed_tokens"]}]


@pytest.mark.parametrize("settings", [{}, *_ON_EMBEDDINGS])
def test_a_step_with_adapters_and_tied_embeddings_is_that_of_the_models_own_logits(batch, settings):
    model = lora(causal_lm(tie_word_embeddings=True), **settings)
    apply_to(model)
    out = model(**batch, selection=tokensel.Selection(tokensel.methods.get("full")))
    out.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0, check_dtype=False)
    assert any(gradient.abs().sum() > 0 for gradient in ours.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # the statistics are float32
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(
    "ensure_weight_tying" not in inspect.signature(peft.LoraConfig).parameters, reason="this PEFT ties no adapter"
)
@pytest.mark.parametrize("settings", _ON_EMBEDDINGS)
def test_a_head_that_is_tied_to_an_adapter_is_refused(settings):
    model = lora(causal_lm(tie_word_embeddings=True), ensure_weight_tying=True, **settings)
    with pytest.raises(ValueError, match="An adapter on the head .* is not supported"):
        apply_to(model)


def test_adapter_off_is_the_base_model_without_dropout(batch):
    base = causal_lm()
    expected = logits_of(base, batch)
    model = lora(base, lora_dropout=0.5).train()
    with model.disable_adapter():
        model.eval()
        assert torch.equal(logits_of(model, batch), expected)
        model.train()
    trained = [(n, p.requires_grad) for n, p in model.named_parameters()]
    modes = [m.training for m in model.modules()]
    history = AdapterOff(model)
    with history():
        assert torch.equal(logits_of(model, batch), expected)
        assert not torch.is_grad_enabled()
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == trained
    assert [m.training for m in model.modules()] == modes
    assert not torch.equal(logits_of(model.eval(), batch), expected)


def test_adapters_come_back_after_an_error(batch):
    model = lora(causal_lm())
    before = logits_of(model, batch)
    with pytest.raises(KeyError), AdapterOff(model)():
        raise KeyError
    assert torch.equal(logits_of(model, batch), before)


def test_adapter_off_needs_adapters_and_a_frozen_base():
    with pytest.raises(ValueError, match="needs a PEFT model"):
        AdapterOff(causal_lm())
    trained = lora(causal_lm())
    trained.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="needs the base model frozen, but .*norm.weight is trained"):
        AdapterOff(trained)
    with pytest.raises(ValueError, match="needs the base model frozen, but .*bias is trained"):
        AdapterOff(lora(causal_lm("Qwen2"), bias="all"))


def test_under_autocast_the_head_multiplies_in_the_type_its_own_product_would(batch):
    model = causal_lm(dtype=torch.float32, attention="sdpa")
    patched = apply_to(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    exact = patched.token_nll(inputs, batch["labels"])
    with torch.autocast("cpu", torch.bfloat16):
        types = patched.with_whole_head(lambda h, w, b: (h.dtype, w.dtype), torch.randn(1, 2, 32))
        rounded = patched.token_nll(inputs, batch["labels"])
        selection = tokensel.Selection(tokensel.methods.get("full"))
        model(**batch, selection=selection).loss.backward()
    assert types == (torch.bfloat16, torch.bfloat16) and rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.2)
    assert model.lm_head.weight.grad.dtype == torch.float32 and model.lm_head.weight.grad.abs().sum() > 0
