from __future__ import annotations

import functools
import inspect
import types

import peft
import pytest
import torch
import transformers
from architectures import tiny_model
from tiny import FAMILIES, VOCABULARY, causal_lm, lora, packed, padded, samples

import tokensel
from tokensel import AdapterOff, prompt_attention_mass
from tokensel.model import apply_to, remove, unwrap


@pytest.fixture
def batch():
    return padded(samples())


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
    log_p = logits.double().log_softmax(-1)
    patched = apply_to(model)
    nll = patched.token_nll({name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"])
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        assert float(nll[b, t]) == pytest.approx(-float(log_p[b, t - 1, batch["labels"][b, t]]), abs=1e-6)
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


# Refusals


def test_patching_twice_or_removing_nothing_is_an_error():
    model = causal_lm()
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        remove(model)
    apply_to(model)
    with pytest.raises(ValueError, match=r"patched already; call tokensel.remove\(model\) first"):
        apply_to(model)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(ValueError, match=rf"layer {layer} does not exist.*attention in layers \[0, 1, 2\]"):
        apply_to(causal_lm(), layer)


def test_layers_are_ints_named_once():
    with pytest.raises(ValueError, match=r"layer \[-1, 2\] names layer 2 of LlamaForCausalLM twice"):
        apply_to(causal_lm(), [-1, 2])
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        apply_to(causal_lm(), [0, 7])
    for wrong in ([], "last", [0.5], True):
        with pytest.raises(TypeError, match="layer must be an int or a sequence of ints"):
            apply_to(causal_lm(), wrong)


@pytest.mark.parametrize("how", ["target", "modules_to_save"])
def test_an_adapter_on_the_head_is_refused(how):
    if how == "target":
        model = lora(causal_lm(), ["q_proj", "lm_head"])
    else:
        model = lora(causal_lm(), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="An adapter on the head .* is not supported"):
        apply_to(model)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        apply_to(transformers.T5ForConditionalGeneration(config))


def test_a_layer_whose_attention_is_not_known_is_named():
    model = tiny_model("llama4_text")
    with pytest.raises(ValueError, match=r"layer 0 .*it is of type chunked_attention.* in layers \[1\]"):
        apply_to(model, 0)


@pytest.mark.skipif(transformers.__version__ < "5", reason="Phimoe does not use the attention interface there")
def test_a_window_that_the_attention_does_not_tell_is_refused():
    model = tiny_model("phimoe")
    model.config.sliding_window = 32  # of 64 positions: longer than the self-test's rows
    with pytest.raises(ValueError, match="config.sliding_window is 32, but PhimoeAttention does not say"):
        apply_to(model)


class DoubledRouterLoss(transformers.MixtralForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if out.aux_loss is not None:
            out.aux_loss = 2 * out.aux_loss
        return out


def test_a_router_loss_that_is_not_known_is_refused():
    model = tiny_model("mixtral")
    model.__class__ = DoubledRouterLoss
    with pytest.raises(ValueError, match="the router loss of DoubledRouterLoss is not known here; set config.output_r"):
        apply_to(model)
    model.config.output_router_logits = False
    apply_to(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_whose_masks_follow_position_ids_may_pack(family):
    assert apply_to(causal_lm(family)).keeps_documents_apart


@pytest.mark.parametrize("family, sizes", [("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}), ("GptOss", {})])
def test_packing_is_refused_where_packed_documents_see_each_other(family, sizes):
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **common, **heads | sizes
        )
    )
    rows = samples()
    patched = apply_to(model.eval())
    selection = tokensel.Selection(tokensel.methods.get("attention"))
    assert model(**padded(rows), selection=selection).loss.isfinite()
    if patched.keeps_documents_apart:  # a transformers that has mended it
        first = len(rows[0][0])
        nll, alone = (model(**packed(r), selection=selection).nll for r in (rows[:2], rows[1:2]))
        torch.testing.assert_close(nll[:, first + 1 :], alone[:, 1:])
        return
    with pytest.raises(ValueError, match=f"{family}ForCausalLM lets packed documents see each other"):
        model(**packed(rows), selection=selection)


class DoubledLogits(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_a_model_that_changes_its_logits_is_refused_and_left_as_it_was():
    model = causal_lm()
    model.__class__ = DoubledLogits
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match="DoubledLogits's own logits differ .*token_stats_from_logits"):
        apply_to(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_attention_that_cannot_be_reproduced_is_refused(monkeypatch):
    module = transformers.models.llama.modeling_llama
    eager = module.eager_attention_forward

    def with_a_secret(m, q, k, v, mask, **kwargs):
        return eager(m, q * 1.5, k, v, mask, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", with_a_secret)
    with pytest.raises(ValueError, match="attention of layer 2 of LlamaForCausalLM cannot be reproduced"):
        apply_to(causal_lm())


def test_a_head_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(causal_lm().config)
    with pytest.raises(ValueError, match="lm_head.weight is torch.float32 on meta"):
        apply_to(model)


def test_only_transformers_models_are_taken():
    with pytest.raises(TypeError, match="got Linear"):
        apply_to(torch.nn.Linear(2, 2))


def test_inputs_by_position_are_refused_with_selection(batch):
    model = causal_lm()
    apply_to(model)
    with pytest.raises(TypeError, match="pass the model's inputs by keyword"):
        model(batch["input_ids"], selection=tokensel.Selection(tokensel.methods.get("full")))


def library_forward(self, *args, **kwargs):
    """Stands for a forward that a library puts in the place of the model's, and makes the loss without logits."""
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=self.model(*args, **kwargs)[0].sum())


@pytest.mark.parametrize("library", ["liger_kernel.transformers.model.llama", "cut_cross_entropy.transformers.llama"])
@pytest.mark.parametrize("where", ["instance", "class", "below another"])
def test_a_loss_of_another_library_is_named(library, where):
    model = causal_lm()
    theirs = types.FunctionType(library_forward.__code__, {"__name__": library})
    if where == "class":
        model.__class__ = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {"forward": theirs})
    else:
        model.forward = types.MethodType(theirs, model)
    if where == "below another":
        model.forward = functools.wraps(model.forward)(lambda *args, **kwargs: None)  # as accelerate's, for autocast
    with pytest.raises(ValueError, match=f"replaced by {library.partition('.')[0]}'s.*'fused_linear_cross_entropy': F"):
        apply_to(model)


def test_a_forward_without_logits_is_refused():
    model = causal_lm()
    model.forward = types.MethodType(library_forward, model)
    with pytest.raises(ValueError, match="the forward of LlamaForCausalLM returns no logits"):
        apply_to(model)
    assert not hasattr(model, "_tokensel_patched")


@pytest.mark.parametrize("missing", ["input_ids", "labels"])
def test_a_selection_without_ids_or_labels_is_named(batch, missing):
    model = causal_lm()
    apply_to(model)
    del batch[missing]
    with pytest.raises(ValueError, match=f"with selection=, the model needs {missing}"):
        model(**batch, selection=tokensel.Selection(tokensel.methods.get("full")))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(kind):
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(causal_lm(dtype=torch.float32), config)
    with pytest.raises(ValueError, match=f"{kind} puts virtual tokens before the batch's.*use LoRA"):
        apply_to(model)


def test_embeddings_in_place_of_token_ids_are_refused(batch):
    model = causal_lm()
    apply_to(model)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="the model needs input_ids; adapters that hand over embeddings"):
        model(**batch, selection=tokensel.Selection(tokensel.methods.get("full")))


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
