"""DPO with a recorded reference, and on the tokens that a method weighs: TRL's own loss, of what it is given."""

from __future__ import annotations

import gc
import runpy
import weakref
from pathlib import Path

import pytest
import torch
from oracles import next_token_nll
from peft import LoraConfig
from training import TOKENIZER, build, largest_difference, weights
from trl_policies import PAIRS, assert_same_run, logged, maker

from tokensel import methods, record_losses, use_token_logprobs
from tokensel.data import encode_rows
from tokensel.preferences import RecordedReference
from tokensel.store import HistoryMissError
from tokensel.testing import make_rows, make_tokenizer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["lm_head"])
ANSWERS, _ = encode_rows(PAIRS, TOKENIZER, 1024, both_answers=True)  # chosen, rejected, chosen, ...
BETA = 0.1  # TRL's default


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


def stored(path, model, rows=ANSWERS, tokenizer=TOKENIZER, **settings):
    record_losses(model, rows, path, tokenizer=tokenizer, **settings)
    return path


SLOW = ("DPO, length desensitised", "dft")
RUNS = {"DPO": {}, "DPO, length desensitised": {"ld_alpha": 0.5}, "DPO, adapters": {"peft_config": LORA}, "KTO": {}}


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] * (run in SLOW)) for run in RUNS])
def test_a_recorded_reference_is_the_live_one(make, tmp_path, run):
    kind = run.partition(",")[0]
    theirs = make(kind, **RUNS[run])
    rows = ANSWERS if kind == "DPO" else theirs.train_dataset  # KTO pairs prompts and answers anew, for its KL
    store = stored(tmp_path / "reference.parquet", build(), rows)
    theirs.train()
    ours = make(kind, **RUNS[run])
    loaded = None if ours.ref_model is None else weakref.ref(ours.ref_model)
    use_token_logprobs(use_token_logprobs(ours, reference=store))  # a second call keeps the store
    gc.collect()
    assert loaded is None or loaded() is None  # no reference is in memory
    ours.train()
    # of the first step, where both models are one
    assert_same_run(ours, theirs, ties=["rewards/accuracies"])


# A method


def log_ps(model, row):
    """log p of each response token. (n,)"""
    ids, response = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
    return -next_token_nll(model(ids).logits[0].double(), ids[0])[response]


def of_highest(scores, share):
    kept = torch.zeros_like(scores)
    kept[scores.argsort(descending=True, stable=True)[: -int(-share * len(scores) // 1)]] = 1
    return kept


METHODS = {
    "history_excess": ({"rho": 0.5}, lambda now, past, contrast, side: of_highest(past - now, 0.5)),
    "dft": ({}, lambda now, past, contrast, side: now.exp()),
    "critical_tokens": ({}, lambda now, past, contrast, side: 1 - contrast.exp() if side else torch.ones_like(now)),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS])
def test_an_answers_log_ratio_is_the_weighted_sum_over_its_tokens(make, tmp_path, name):
    """cDPO (arXiv 2411.19943) is `critical_tokens`: rejected tokens weigh 1 - softmax(2 z_positive - z_negative)."""
    arguments, weigh = METHODS[name]
    trainer = make("DPO", max_steps=1, per_device_train_batch_size=len(PAIRS))
    policy, reference, right, wrong = (build(seed) for seed in (1, 5, 6, 7))  # the policy as the trainer loads it
    stores = {"reference": stored(tmp_path / "reference.parquet", reference)}
    if name == "critical_tokens":
        stores["recorded"] = {"contrast": stored(tmp_path / "contrast.parquet", right, negative=wrong)}
    use_token_logprobs(trainer, method=methods.get(name, **arguments), **stores).train()
    loss = 0
    for number in range(len(PAIRS)):
        ratios = []
        for side in (0, 1):
            row = ANSWERS[2 * number + side]
            now, past = log_ps(policy, row), log_ps(reference, row).detach()
            ids, response = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
            z = 2 * right(ids).logits[0] - wrong(ids).logits[0]
            contrast = -next_token_nll(z, ids[0])[response].detach()
            ratios.append((weigh(now.detach(), past, contrast, side) * (now - past)).sum())
        loss = loss - torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])) / len(PAIRS)
    (entry,) = logged(trainer)
    assert entry["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    loss.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 0.02 * parameter.grad
    moved = dict(policy.named_parameters())
    assert largest_difference(weights(trainer), {n: p.detach() for n, p in moved.items()}) < 1e-6


@pytest.mark.parametrize("adapters", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["a model", "adapters"])
def test_a_live_reference_gets_the_policys_weights(make, adapters):
    trainer = make("DPO", peft_config=adapters, max_steps=3)
    use_token_logprobs(trainer, method=methods.get("random", rho=0.6)).train()
    all_tokens = use_token_logprobs(make("DPO", peft_config=adapters, max_steps=1))
    all_tokens.train()
    first, (whole,) = logged(trainer)[0], logged(all_tokens)
    assert first["loss"] == pytest.approx(whole["loss"], abs=1e-6) == pytest.approx(0.6931, abs=1e-4)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/rejected"]) < 1e-5  # both models are one
    assert 0.5 < first["logps/chosen"] / whole["logps/chosen"] < 0.7
    assert first["entropy"] == whole["entropy"]  # of all tokens
    assert all(0.6 < entry["loss"] < 0.6931 for entry in logged(trainer)[1:])


def test_the_weights_of_every_token_are_trls_own_loss(make):
    theirs, ours = (make("DPO") for _ in range(2))
    use_token_logprobs(theirs).train()
    use_token_logprobs(ours, method=methods.get("full")).train()
    assert logged(ours) == logged(theirs) and largest_difference(weights(ours), weights(theirs)) == 0


# What is refused


def test_a_reference_of_other_rows_or_of_another_tokenizer_is_named(make, tmp_path):
    other = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": "No."} for row in PAIRS]
    rows, _ = encode_rows(other, TOKENIZER, 1024, both_answers=True)
    store = stored(tmp_path / "other.parquet", build(), rows)
    trainer = use_token_logprobs(make("DPO"), reference=store)
    with pytest.raises(
        HistoryMissError, match=r"the document in row \d .* is not in .*score --both_answers true.*record_losses"
    ):
        trainer.train()
    tokenizer = make_tokenizer(make_rows(80, seed=9), vocab_size=384)
    rows, _ = encode_rows(PAIRS, tokenizer, 1024, both_answers=True)
    trainer = make("DPO")
    live = trainer.ref_model
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        use_token_logprobs(trainer, reference=stored(tmp_path / "t.parquet", build(), rows, tokenizer))
    with pytest.raises(FileNotFoundError, match="no history store; make it with `tokensel score`"):
        use_token_logprobs(trainer, reference=tmp_path / "gone.parquet")
    assert trainer.ref_model is live and not hasattr(trainer.model, "_tokensel_patched")


def test_a_method_whose_signals_are_not_there_is_refused(make, tmp_path, monkeypatch):
    trainer = make("DPO")

    def refused(message, method=None, **settings):
        with pytest.raises(ValueError, match=message):
            use_token_logprobs(trainer, method=method and methods.get(**method), **settings)
        assert not hasattr(trainer.model, "_tokensel_patched")

    refused("'history_excess' needs history_nll: a store by reference=STORE", {"name": "history_excess"})
    refused(
        "'critical_tokens' needs contrast_nll: a store by recorded={'contrast': STORE}", {"name": "critical_tokens"}
    )
    refused("'attention' needs mass: attention, which is not measured", {"name": "attention"})
    refused("'random' ranks over scope 'batch'.*give it scope='sample'", {"name": "random", "scope": "batch"})
    refused("'ada_eslm' moves with each optimizer step", {"name": "ada_eslm"})
    refused("recorded losses are for a method", recorded={"base": "base.parquet"})
    for setting in ("precompute_ref_log_probs", "use_weighting"):
        monkeypatch.setattr(trainer.args, setting, True)
        refused(f"{setting}=True takes the log-probabilities of all tokens", {"name": "random"})
        monkeypatch.setattr(trainer.args, setting, False)
    monkeypatch.setattr(trainer.args, "loss_type", ["sigmoid", "sft"])
    refused("loss_type 'sft' is a mean over all tokens", {"name": "random"})
    monkeypatch.setattr(trainer.args, "loss_type", ["sigmoid"])
    two = {"reference": "reference.parquet", "recorded": {"history": "history.parquet"}}
    refused("two stores of one signal", {"name": "history_excess"}, **two)
    monkeypatch.setattr(trainer.args, "truncation_mode", "keep_end")
    refused("truncation_mode='keep_end' cuts answers in front", reference="reference.parquet")
    monkeypatch.setattr(trainer.args, "sync_ref_model", True)
    refused("reference and sync_ref_model=True are two references", reference="reference.parquet")
    with pytest.raises(TypeError, match="method must come from tokensel.methods.get"):
        use_token_logprobs(trainer, method="random")


def test_trainers_without_both_answers_are_refused(make):
    with pytest.raises(ValueError, match="GRPOTrainer samples its answers as it trains, so no losses of a reference"):
        use_token_logprobs(make("GRPO"), reference="reference.parquet")
    with pytest.raises(ValueError, match="method chooses among the tokens of both answers of DPOTrainer; leave it out"):
        use_token_logprobs(make("KTO"), method=methods.get("random"))


def test_the_example_trains_without_a_reference_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trl_dpo.py"))["trainer"]
    assert isinstance(trainer.ref_model, RecordedReference) and trainer.state.global_step == 8
    first, *_, last = (entry["loss"] for entry in logged(trainer))
    assert last < 0.6 < first < 0.75
