"""A patched model lives on: copied, saved whole, patched again, with another head."""

from __future__ import annotations

import copy
import inspect
import io
import types

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from oracles import next_token_nll
from tiny import VOCABULARY, causal_lm, lora
from training import PLAIN, ROWS, TOKENIZER, build

import tokensel
from tokensel import AdapterOff, ModelCopy, Selection, SelectiveTrainer, apply_to, methods, remove
from tokensel.arguments import SelectiveTrainingArguments


def loss_of(model, batch, method="full"):
    return model(**batch, selection=Selection(methods.get(method))).loss


def own_loss(model, batch):
    """Mean loss of the model's own logits, float64."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = next_token_nll(logits.double(), batch["labels"])
    return nll[batch["labels"][:, 1:] != -100].mean()


def grow(model, factor=1.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def reload(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # a whole model is a pickle; these bytes were written just above


def with_adapters(model):
    return lora(model)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


def prepared(model):
    """A copy, after its forward was wrapped for mixed precision, as accelerate's `prepare_model` does."""
    model._original_forward = model.forward
    unbound = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = types.MethodType(convert_outputs_to_fp32(unbound), model)
    return copy.deepcopy(model)


# A copy is a patched model of its own


@pytest.mark.parametrize("wrap", [None, with_adapters])
@pytest.mark.parametrize("copied", [copy.deepcopy, averaged, reload])
def test_a_copy_of_a_patched_model_computes_and_trains_itself(batch, copied, wrap):
    model = causal_lm() if wrap is None else wrap(causal_lm())
    keys = list(model.state_dict())
    apply_to(model)
    before, mass = loss_of(model, batch), loss_of(model, batch, "attention")
    other = copied(model)
    assert [n for n in other.state_dict() if n != "n_averaged"] == (
        [f"module.{n}" for n in keys] if copied is averaged else keys
    )
    torch.testing.assert_close(loss_of(other, batch, "attention"), mass, rtol=1e-12, atol=0)
    grow(other)
    loss = loss_of(other, batch)
    assert abs(float(loss - before)) > 0.01 and torch.equal(loss_of(model, batch), before)
    torch.testing.assert_close(loss, own_loss(other, batch), rtol=1e-6, atol=0, check_dtype=False)
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in other.parameters() if p.requires_grad)
    remove(other)
    assert torch.equal(loss_of(model, batch), before)
    with pytest.raises(ValueError, match="is not patched"):
        remove(other)


def reference_of_trl(model):
    return pytest.importorskip("trl.models.utils").create_reference_model(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, reference_of_trl])
def test_a_copy_runs_on_after_the_original_is_gone(batch, copied):
    model = causal_lm()
    apply_to(model)
    expected = loss_of(model, batch, "attention")
    other = copied(model)
    remove(model)
    grow(model, 0)
    assert torch.equal(loss_of(other, batch, "attention"), expected)


def test_a_copy_under_mixed_precision_computes_itself(batch):
    model = causal_lm(dtype=torch.float32)
    signature = inspect.signature(model.forward)
    apply_to(model)
    assert inspect.signature(model.forward) == signature
    other = prepared(model)
    assert inspect.signature(other.forward) == signature
    before = loss_of(other, batch)
    grow(model)
    assert torch.equal(loss_of(other, batch), before)
    grow(other, 0)
    assert float(loss_of(other, batch)) == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), rel=1e-6)


def test_the_selection_stays_where_accelerate_takes_off_mixed_precision(batch, monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one for a process, of other tests
    model = causal_lm(dtype=torch.float32)
    expected, own = loss_of(apply_to(model).model, batch, "random"), own_loss(model, batch)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    assert "_original_forward" not in vars(model)
    assert torch.equal(loss_of(model, batch, "random"), expected) and torch.equal(own_loss(model, batch), own)
    assert abs(float(expected.detach() - own)) > 0.05
    remove(model)
    assert torch.equal(own_loss(model, batch), own) and "forward" not in vars(model)


def test_a_model_whose_forward_was_wrapped_says_why_it_is_not_saved_whole(batch):
    model = prepared(apply_to(causal_lm(dtype=torch.float32)).model)
    with pytest.raises(ValueError, match="its forward has been wrapped since apply_to .*save_pretrained"):
        torch.save(model, io.BytesIO())
    remove(model)
    plain = reload(model)
    assert torch.equal(own_loss(plain, batch), own_loss(model, batch))


def test_a_copy_of_the_head_alone_is_a_head_of_its_own():
    model = causal_lm()
    apply_to(model)
    head = copy.deepcopy(model.lm_head)
    with torch.no_grad():
        head.weight.zero_()
    assert not head(torch.ones(1, 32, dtype=torch.float64)).any()
    assert head.forward.__self__ is head and len(copy.deepcopy(vars(head))) == len(vars(head))


def average(model):
    return ModelCopy(model, 0.5)


@pytest.mark.parametrize("wrap, history", [(lora, AdapterOff), (lora, ModelCopy), (lambda model: model, average)])
def test_a_history_of_another_copy_is_refused(batch, wrap, history):
    model = wrap(causal_lm())
    apply_to(model)
    selection = Selection(methods.get("rel"), history=history(model))
    other = copy.deepcopy(model)
    assert model(**batch, selection=selection).loss.isfinite()
    with pytest.raises(ValueError, match="history is of another model .* make one of this model"):
        other(**batch, selection=selection)
    with pytest.raises(ValueError, match="history is of another model .* make one of this model"):
        model(**batch, selection=copy.deepcopy(selection))
    own = Selection(methods.get("rel"), history=history(other))
    a, b = (m(**batch, selection=s).history_nll for m, s in ((model, selection), (other, own)))
    assert torch.equal(a, b)


# Patched again


def test_a_second_patch_takes_the_place_of_the_first(batch):
    model = causal_lm()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    apply_to(model, layer=None)
    expected = loss_of(model, batch)
    with pytest.raises(ValueError, match="apply_to was told to capture none"):
        loss_of(model, batch, "attention")
    patched = apply_to(model, layer=0)
    assert patched.layers == (0,) and model._tokensel_patched is patched
    assert torch.equal(loss_of(model, batch), expected) and loss_of(model, batch, "attention").isfinite()
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        apply_to(model, layer=7)  # and the one before stays
    assert model._tokensel_patched is patched and loss_of(model, batch, "attention").isfinite()
    remove(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_a_trainer_that_would_make_its_model_anew_is_refused(tmp_path):
    arguments = SelectiveTrainingArguments(output_dir=str(tmp_path), method="full", **PLAIN)
    with pytest.raises(ValueError, match=r"model_init is not supported: .* give the trainer model=model_init\(\)"):
        SelectiveTrainer(model_init=lambda: build(), args=arguments, train_dataset=ROWS, processing_class=TOKENIZER)


# Another head


def resize(model):
    model.resize_token_embeddings(VOCABULARY + 3)
    return model


def new_head(model):
    head = torch.nn.Linear(32, VOCABULARY, bias=False, dtype=torch.float64)
    model.lm_head = head
    return model


def adapter_on_head(model):
    return lora(model, ["q_proj", "lm_head"])


def saved_head(model):
    return lora(model, modules_to_save=["lm_head"])


@pytest.mark.parametrize("change", [resize, new_head, adapter_on_head, saved_head])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "adapters"])
def test_a_head_that_is_replaced_is_noticed_at_the_next_call(batch, change, wrap):
    model = causal_lm()
    patched = apply_to(lora(model) if wrap and change in (resize, new_head) else model)
    changed = change(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for call in (lambda: loss_of(changed, batch), lambda: patched.token_nll(inputs, batch["labels"])):
        with pytest.raises(ValueError, match="the head of LlamaForCausalLM has been replaced .*tokensel.apply_to"):
            call()
    assert changed(**batch).loss.isfinite()  # without selection, the model is what it is
    if change in (adapter_on_head, saved_head):
        with pytest.raises(ValueError, match="An adapter on the head .* is not supported"):
            apply_to(changed)
        if change is adapter_on_head:
            changed = changed.unload()
            assert torch.equal(loss_of(changed, batch), loss_of(apply_to(causal_lm()).model, batch))
        else:
            changed = changed.merge_and_unload()  # with a copy of the head in its place
            with pytest.raises(ValueError, match="has been replaced"):
                loss_of(changed, batch)
    apply_to(changed)
    torch.testing.assert_close(loss_of(changed, batch), own_loss(changed, batch), rtol=1e-6, atol=0, check_dtype=False)
    remove(changed)
    assert not any({"forward", "_tokensel_patched", "_tokensel_capture"} & vars(m).keys() for m in changed.modules())


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_on_the_head_are_exact_once_they_are_merged(batch, order):
    model = causal_lm()
    if order == "after":
        apply_to(model)
    adapted = adapter_on_head(model)
    expected = own_loss(adapted, batch)
    assert abs(float(expected - own_loss(causal_lm(), batch))) > 0.1
    adapted.merge_adapter()  # but still there
    with pytest.raises(ValueError, match="head"):
        apply_to(adapted) if order == "before" else loss_of(adapted, batch)
    model = adapted.merge_and_unload()
    if order == "before":
        apply_to(model)
    torch.testing.assert_close(loss_of(model, batch), expected, rtol=1e-6, atol=0, check_dtype=False)


def test_a_tied_head_follows_a_resize_of_the_embeddings(batch):
    model = causal_lm(tie_word_embeddings=True)
    apply_to(model)
    model.resize_token_embeddings(VOCABULARY + 5)
    try:
        loss = loss_of(model, batch)
    except ValueError as error:  # where transformers makes a new head
        assert "has been replaced" in str(error)
        apply_to(model)
        loss = loss_of(model, batch)
    torch.testing.assert_close(loss, own_loss(model, batch), rtol=1e-6, atol=0, check_dtype=False)


def test_a_base_model_that_is_replaced_is_noticed(batch):
    model = causal_lm()
    apply_to(model)
    model.model = causal_lm("Llama", hidden_act="relu").model
    with pytest.raises(ValueError, match="the base model of LlamaForCausalLM has been replaced"):
        loss_of(model, batch)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused_after_apply_to(batch, kind):
    model = causal_lm(dtype=torch.float32)
    tokensel.apply_to(model)
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt and prefix tuning"):
        loss_of(wrapped, batch, "attention")
