"""TRL's trainers of preferences and policies on `token_logprobs`: their own losses, metrics and weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from training import build
from trl_policies import assert_same_run, logged, maker, trl

from tokensel import apply_to, remove, use_token_logprobs
from tokensel.model import Forward


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


RUNS = {
    "DPO": {},
    "DPO, weighted": {"use_weighting": True},
    "DPO, two losses": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.3]},
    "KTO": {},
    "GRPO": {},
    "GRPO, entropy mask": {"top_entropy_quantile": 0.5},
    "RLOO": {},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_trls_own(make, run):
    kind = run.partition(",")[0]
    theirs = make(kind, **RUNS[run])
    theirs.train()
    ours = use_token_logprobs(make(kind, **RUNS[run]))
    ours.train()
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_with_adapters_the_reference_is_the_model_without_them(make, kind):
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["lm_head"])
    theirs = make(kind, peft_config=adapters)
    theirs.train()
    ours = use_token_logprobs(make(kind, peft_config=adapters))
    assert ours.ref_model is None
    ours.train()
    assert_same_run(ours, theirs)


def test_a_reference_that_trl_recorded_is_the_same_run(make):
    live, recorded = (use_token_logprobs(make("DPO", precompute_ref_log_probs=given)) for given in (False, True))
    assert recorded.ref_model is None or recorded.precompute_ref_logps
    live.train(), recorded.train()
    assert_same_run(recorded, live, ties=["rewards/accuracies"])  # of the first step, where both models are one


def test_in_mixed_precision_policy_and_reference_are_one_at_first(make):
    """Both in bfloat16 autocast, TRL's default: the log-ratios of the first step are 0."""
    theirs, ours = (make("DPO", bf16=True, max_steps=1) for _ in range(2))
    use_token_logprobs(use_token_logprobs(ours))  # a second time changes nothing
    theirs.train(), ours.train()
    for trainer in (theirs, ours):
        (entry,) = logged(trainer)
        assert abs(entry["rewards/chosen"]) < 1e-5 and abs(entry["rewards/rejected"]) < 1e-5
        assert entry["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert logged(ours)[0]["entropy"] == pytest.approx(logged(theirs)[0]["entropy"], rel=1e-2)


def test_what_cannot_be_answered_is_refused_and_nothing_is_changed(make):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 is not supported here"):
        use_token_logprobs(make("GRPO", cast_lm_head_to_fp32=True))
    trainer = make("DPO")
    trainer.ref_model.lm_head = torch.nn.Sequential(trainer.ref_model.lm_head)
    with pytest.raises(ValueError, match="must be a plain torch.nn.Linear"):
        use_token_logprobs(trainer)
    assert not hasattr(trainer.model, "_tokensel_patched")
    earlier = build()
    apply_to(earlier)
    trainer = make("DPO")
    earlier.forward = trainer.model.forward  # as where TRL's stands above
    trainer.model = earlier
    with pytest.raises(ValueError, match="was patched by tokensel before DPOTrainer was made"):
        use_token_logprobs(trainer)


def test_a_patch_that_is_renewed_still_answers(make):
    trainer = use_token_logprobs(make("DPO"))
    answer = trainer.model._tokensel_patched.answer
    assert apply_to(trainer.model).answer is answer is not None


def test_the_models_own_forward_and_generation_stay(make):
    model, ids = build(), torch.arange(3, 11)[None]
    before = model(input_ids=ids).logits
    written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    trainer = use_token_logprobs(make("DPO"))
    assert torch.equal(trainer.model(input_ids=ids).logits, before)
    assert torch.equal(trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), written)
    remove(trainer.model)
    assert not isinstance(trainer.model.forward, Forward)
    assert torch.equal(trainer.model(input_ids=ids).logits, before)


def test_no_logits_are_made(make, monkeypatch):
    trainer = use_token_logprobs(make("DPO", max_steps=1))
    vocabulary = trainer.model.config.vocab_size
    for module in ("chunked", "chunked_grad"):
        monkeypatch.setattr(f"tokensel.ops.{module}.vocabulary_blocks", lambda rows, V, *rest, **more: (64, 64))
    seen = []
    matmul = torch.mm

    def recorded(a, b, **options):
        out = matmul(a, b, **options)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(torch, "mm", recorded)
    trainer.train()
    assert seen and not any(vocabulary in shape for shape in seen)


def test_a_trainer_that_does_not_ask_is_named(tmp_path):
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(build(), TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match="Trainer .*does not ask its model for log-probabilities; supported are DPO"):
        use_token_logprobs(trainer)


def test_a_trainer_of_trl_that_has_moved_is_named_with_the_version_and_those_that_are_supported(make, monkeypatch):
    """As in TRL 1.9, whose trainers call their models for logits."""
    monkeypatch.setattr(trl.trainer.dpo_trainer, "add_fused_lm_head", lambda *_, **__: None)
    message = rf"DPOTrainer \(TRL {trl.__version__}\) does not ask .* supported are DPOTrainer, .* of TRL 1\.16"
    with pytest.raises(ValueError, match=message):
        use_token_logprobs(trainer := make("DPO"))
    assert not hasattr(trainer.model, "_tokensel_patched")
