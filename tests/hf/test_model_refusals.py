from __future__ import annotations

import functools
import types

import peft
import pytest
import torch
import transformers
from architectures import SUPPORTED, tiny_config, tiny_model
from tiny import FAMILIES, VOCABULARY, causal_lm, lora, packed, padded, samples

import tokensel
from tokensel.model import apply_to, remove

# Refusals


def test_removing_nothing_is_an_error():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        remove(causal_lm())


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


@pytest.mark.skipif(transformers.__version__ < "5", reason="SmolLM3 takes its types from elsewhere there")
@pytest.mark.parametrize("window", [6, 32])  # shorter and longer than the self-test's rows
def test_a_window_that_config_and_attention_do_not_agree_on_is_refused(window):
    config = tiny_config("smollm3", SUPPORTED["smollm3"] | {"use_sliding_window": False, "sliding_window": window})
    model = transformers.SmolLM3ForCausalLM._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=f"gives layer 1 a window of {window}, but .* sliding_window=None; make them"):
        apply_to(model, layer=1)


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


@pytest.mark.parametrize(
    "missing, message",
    [
        ("input_ids", "with selection=, the model needs input_ids"),
        ("labels", "the batch has no labels .*DataCollatorForSeq2Seq"),
    ],
)
def test_a_selection_without_ids_or_labels_is_named(batch, missing, message):
    model = causal_lm()
    apply_to(model)
    del batch[missing]
    with pytest.raises(ValueError, match=message):
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
