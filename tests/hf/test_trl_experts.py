"""A mixture of experts under TRL's trainer and ours: what balances its experts is trained, weighted and logged."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
import transformers
from training import TOKENIZER, largest_difference, losses, weights
from transformers import MixtralConfig, MixtralForCausalLM
from trl_training import of_trl, run

import tokensel
from tokensel.testing import make_rows

HELD_OUT = datasets.Dataset.from_list(make_rows(4, seed=9))


def mixture(**changes):
    config = dict(vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    config |= dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, max_position_embeddings=256)
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**config | changes))  # experts know no float64


@pytest.mark.parametrize("coefficient", [0.001, 1.0])
def test_the_router_loss_has_the_weight_that_trl_is_told(tmp_path, coefficient):
    # as it was made, before TRL has set it; before transformers 5 TRL did not heed what it had set
    model = mixture(router_aux_loss_coef=0.02 if transformers.__version__ >= "5" else coefficient)
    changes = {"router_aux_loss_coef": coefficient, "max_steps": 2, "eval_dataset": HELD_OUT}
    ours = run(tmp_path, model=copy.deepcopy(model), method="full", **changes)
    theirs = of_trl(tmp_path, model=copy.deepcopy(model), **changes)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4)
    assert largest_difference(weights(ours), weights(theirs)) < 1e-5
    logged = [[e["aux_loss"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert logged[0] == pytest.approx(logged[1], abs=1e-5) and logged[0][0] > 0.5
    ours, theirs = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_aux_loss"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)


def test_a_routers_weight_counts_and_can_be_none(tmp_path):
    first = {}
    for weight in (0.0, 0.5, 1.0):
        trainer = run(tmp_path, model=mixture(), method="full", router_aux_loss_coef=weight, max_steps=1)
        first[weight] = trainer.state.log_history[0]
    assert "aux_loss" not in first[0.0]
    for weight in (0.5, 1.0):
        expected = first[0.0]["loss"] + weight * first[weight]["aux_loss"]
        assert first[weight]["loss"] == pytest.approx(expected, abs=1e-4)


def test_the_routers_loss_does_not_grow_with_accumulation(tmp_path):
    share = []
    for size, steps in ((4, 1), (1, 4)):
        first = []
        for weight in (0.5, 0.0):
            batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
            trainer = run(tmp_path, model=mixture(), method="full", router_aux_loss_coef=weight, **batches)
            first.append(losses(trainer)[0])
        share.append(first[0] - first[1])
    assert share[0] > 0.1 and share[1] == pytest.approx(share[0], rel=0.1)  # each is a mean over its micro-batches


@pytest.mark.parametrize("in_config", [False, True])
def test_a_batch_may_switch_the_router_loss_on_or_off(batch, in_config):
    model = mixture(output_router_logits=in_config, router_aux_loss_coef=0.5, vocab_size=97)
    tokensel.apply_to(model, layer=None)
    selection = tokensel.Selection(tokensel.methods.get("full"))
    for asked in (None, False, True):
        own = model(**batch, output_router_logits=asked)
        found = model(**batch, output_router_logits=asked, selection=selection)
        on = in_config if asked is None else asked
        assert (found.aux_loss is not None) == on
        torch.testing.assert_close(found.loss, own.loss, rtol=1e-5, atol=1e-5)
        if on:
            torch.testing.assert_close(found.aux_loss, own.aux_loss, rtol=1e-5, atol=1e-5)
