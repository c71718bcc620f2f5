"""TRL's SFTTrainer under the mixin. Float64 and SGD, so that equal updates are equal to rounding (see test_trainer)."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from peft import LoraConfig
from training import PLAIN, TIGHT, TOKENIZER, build, largest_difference, losses, record, weights
from transformers import DataCollatorForSeq2Seq
from trl_training import CHAT_TOKENIZER, CHATS, COMPLETIONS, TEXTS, documents, make, of_trl, run

from tokensel.arguments import SelectiveTrainingArguments
from tokensel.testing import make_rows
from tokensel.trainer import SelectiveTrainer

# The step

LAYOUTS = {
    "completions": (COMPLETIONS, {}),
    "packed": (COMPLETIONS, {"packing": True, "per_device_train_batch_size": 1}),
    "padding-free": (COMPLETIONS, {"padding_free": True, "max_length": None}),
    "accumulated": (COMPLETIONS, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "chats": (CHATS, {"assistant_only_loss": True}),
    # padded, older transformers count the first token of a row in the denominator, though nothing predicts it
    "text": (TEXTS, {"padding_free": True, "max_length": None}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_takes_the_steps_of_trl(tmp_path, layout):
    rows, changes = LAYOUTS[layout]
    ours = run(tmp_path, rows, method="full", **changes)
    theirs = of_trl(tmp_path, rows, **changes)
    theirs.train()
    # TRL's log-probabilities are float32; ours are of the model's type
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4)
    assert largest_difference(weights(ours), weights(theirs)) < 1e-6
    assert largest_difference(weights(ours), {n: p for n, p in build().named_parameters()}) > 1e-2
    wanted = ["num_tokens"]
    if layout != "accumulated":  # TRL means over micro-batches there, of whatever length
        wanted += ["entropy", "mean_token_accuracy"]
    entries = [[e for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    for mine, trls in zip(*entries, strict=True):
        assert {n: mine[n] for n in wanted} == pytest.approx({n: trls[n] for n in wanted}, abs=1e-5)


def test_a_step_is_that_of_the_selective_trainer(tmp_path):
    history = record(tmp_path / "h.parquet", build(seed=2), rows=make(tmp_path).train_dataset)
    chosen = {"method": "sstoken", "history": "recorded", "history_store": history}
    sft = run(tmp_path, **chosen)
    plain = SelectiveTrainer(
        build(),
        SelectiveTrainingArguments(output_dir=str(tmp_path / "plain"), **PLAIN | {"learning_rate": 0.1}, **chosen),
        data_collator=DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt"),
        train_dataset=make(tmp_path).train_dataset.select_columns(["input_ids", "labels"]),
        processing_class=TOKENIZER,
    )
    plain.train()
    assert losses(sft) == pytest.approx(losses(plain), abs=TIGHT)
    assert largest_difference(weights(sft), weights(plain)) < TIGHT


@pytest.mark.parametrize("packing", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packed_documents_are_selected_as_if_alone(tmp_path, packing):
    """Scores hang on attention and on recorded losses found by the document's hash, so neither leaks nor shifts."""
    rows = make(tmp_path, CHATS, assistant_only_loss=True).train_dataset
    history = record(tmp_path / "h.parquet", build(seed=2), rows=rows, tokenizer=CHAT_TOKENIZER)
    chosen = {"method": "sstoken", "history": "recorded", "history_store": history, "learning_rate": 0.0}
    chosen |= {"assistant_only_loss": True}
    together = run(tmp_path, CHATS, **chosen | packing, per_device_train_batch_size=2)
    alone = run(tmp_path, CHATS, **chosen, per_device_train_batch_size=1)
    found = [sorted(d for seen in t.seen for d in documents(*seen)) for t in (together, alone)]
    assert max(len(documents(*seen)) for seen in together.seen) > 1
    assert "attention_mask" not in together.seen[0][0]
    assert found[0] == found[1] and len(found[0]) == len(CHATS)
    masses = [sum(float((o.mass * o.response).sum()) for _, o in t.seen) for t in (together, alone)]
    assert masses[0] == pytest.approx(masses[1], rel=1e-5)


def test_the_prompt_of_a_second_turn_is_every_earlier_token_that_is_no_answer(tmp_path):
    """Design: prompt keys of a response token = visible non-response tokens before it; only responses compete."""
    model = build()
    model.set_attn_implementation("eager")
    trainer = run(tmp_path, CHATS, model, method="attention", assistant_only_loss=True, packing=True, learning_rate=0.0)
    turns = {}
    for inputs, output in trainer.seen:
        with torch.no_grad():
            seen = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], output_attentions=True)
        attention = seen.attentions[-1].double().mean(1)[0]  # (T, T), of the last layer
        sample, labels = output.sample[0], inputs["labels"][0]
        for t in range(len(labels)):
            mine = labels[t] != -100
            assert bool(output.response[0, t]) == bool(mine)
            assert mine or output.weights[0, t] == 0
            if mine:
                prompt = [s for s in range(t) if sample[s] == sample[t] and labels[s] == -100]
                assert float(output.mass[0, t]) == pytest.approx(float(attention[t, prompt].sum()), abs=1e-6)
        for s in sample.unique():
            inside = sample == s
            n = int((labels[inside] != -100).sum())
            assert int((output.weights[0, inside] > 0).sum()) == math.ceil(0.6 * n - 1e-9)
            text = CHAT_TOKENIZER.decode(inputs["input_ids"][0, inside & (labels != -100)])
            turns[text] = text.count("</s>")
    assert set(turns.values()) == {2} and len(turns) == len(CHATS)  # both answers of each chat, and nothing else
    for chat in CHATS["messages"]:
        assert "".join(m["content"] + "</s>" for m in chat if m["role"] == "assistant") in turns


def test_chats_have_the_ids_and_labels_of_the_score_command(tmp_path):
    """So that a store made by `tokensel score` answers for chats that TRL tokenises."""
    from tokensel.data import encode_rows

    ours, _ = encode_rows(CHATS, CHAT_TOKENIZER, max_length=256)
    theirs = make(tmp_path, CHATS, assistant_only_loss=True).train_dataset
    assert [list(r) for r in ours["input_ids"]] == [list(r) for r in theirs["input_ids"]]
    assert [list(r) for r in ours["labels"]] == [list(r) for r in theirs["labels"]]


def test_lora_trains_the_adapter_against_the_base_as_history(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = run(tmp_path, peft_config=lora, method="rel", history="adapter_off", save_strategy="steps", save_steps=2)
    before = dict(build().named_parameters())
    for name, p in trainer.model.named_parameters():
        if "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p.double(), before[name])
    assert any("lora_B" in n and p.abs().max() > 1e-4 for n, p in trainer.model.named_parameters())
    steps = [e for e in trainer.state.log_history if "loss" in e]
    assert steps[0]["rel_mean"] == pytest.approx(0, abs=1e-6) and abs(steps[-1]["rel_mean"]) > 1e-4
    assert (tmp_path / "out/checkpoint-2/adapter_model.safetensors").exists()


def test_a_second_trainer_of_a_model_trains_as_if_it_were_the_first(tmp_path):
    """As where the cell of a notebook that makes the trainer runs again; the first one's evaluation works, too."""
    model = build()
    first = make(tmp_path, model=model, method="attention", eval_dataset=COMPLETIONS)
    second = make(tmp_path, model=model, method="full")
    assert first.evaluate()["eval_loss"] == make(tmp_path, eval_dataset=COMPLETIONS).evaluate()["eval_loss"]
    second.train()
    assert losses(second) == losses(run(tmp_path, method="full"))


# Evaluation and metrics


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_is_that_of_trl(tmp_path, packing):
    held_out = datasets.Dataset.from_list(make_rows(6, seed=9))
    changes = {"per_device_eval_batch_size": 2, "eval_dataset": held_out, "packing": packing}
    ours = run(tmp_path, **changes, eval_strategy="steps", eval_steps=2, max_steps=2, learning_rate=0.0)
    theirs = of_trl(tmp_path, **changes)
    expected = theirs.evaluate()
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    # TRL averages over batches, which differ in length; so its entropy is that of its batches' means
    tolerance = {"eval_loss": 1e-4, "eval_entropy": 0.02, "eval_mean_token_accuracy": 0.02}
    (entry,) = [e for e in ours.state.log_history if "eval_loss" in e]
    for name in names:
        assert entry[name] == pytest.approx(expected[name], abs=tolerance[name])
    tokens = sum(s[0].get("attention_mask", torch.ones_like(s[0]["input_ids"])).sum().item() for s in ours.seen)
    assert entry["eval_num_tokens"] == tokens
    few = datasets.Dataset.from_list(make_rows(2, seed=10))  # not mixed with the earlier evaluation's
    assert ours.evaluate(few)["eval_entropy"] == make(tmp_path, packing=packing).evaluate(few)["eval_entropy"]


def test_compute_metrics_sees_trls_logits(tmp_path):
    held_out = datasets.Dataset.from_list(make_rows(4, seed=9))
    shapes = []

    def compute(prediction):
        found = prediction.predictions
        shapes.append((found[0] if isinstance(found, tuple) else found).shape)
        return {"rows": len(prediction.label_ids)}

    found = make(tmp_path, eval_dataset=held_out, compute_metrics=compute, loss_type="nll").evaluate()
    assert found["eval_rows"] == 4 and shapes[0][0] == 4 and shapes[0][-1] == build().config.vocab_size
    assert found["eval_mean_token_accuracy"] >= 0


def test_metrics_are_means_over_all_response_tokens_of_a_log_entry(tmp_path):
    trainer = run(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=0.0, method="random"
    )
    (first, second) = [e for e in trainer.state.log_history if "loss" in e]
    model, tokens = build(), 0
    for entry, seen in ((first, trainer.seen[:3]), (second, trainer.seen[3:])):
        entropy, right, n = 0.0, 0, 0
        for inputs, _ in seen:
            with torch.no_grad():
                p = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
            labels = inputs["labels"][:, 1:]
            entropy += float(-(p.exp() * p).sum(-1)[:, :-1][labels != -100].sum())
            right += int((p.argmax(-1)[:, :-1] == labels).sum())
            n += int((labels != -100).sum())
            tokens += int(inputs["attention_mask"].sum())
        assert entry["entropy"] == pytest.approx(entropy / n, abs=2e-6)
        assert entry["mean_token_accuracy"] == pytest.approx(right / n, abs=2e-6)
        assert entry["num_tokens"] == tokens
        assert entry["kept_share"] == pytest.approx(0.6, abs=0.02)


def tokens_of(seen):
    return sum(int(inputs["attention_mask"].sum()) for inputs, _ in seen)


def test_a_run_shorter_than_logging_steps_logs_its_metrics_at_the_end(tmp_path):
    changes = {"logging_steps": 2, "max_steps": 3, "learning_rate": 0.0, "per_device_train_batch_size": 2}
    ours = run(tmp_path, method="full", **changes)
    theirs = of_trl(tmp_path, **changes)
    theirs.train()
    ends = [t.state.log_history[-1] for t in (ours, theirs)]
    assert all("train_loss" in entry for entry in ends)
    assert ends[0]["num_tokens"] == ends[1]["num_tokens"] == tokens_of(ours.seen)
    for name in ("entropy", "mean_token_accuracy"):  # of the third step alone, one batch
        assert ends[0][name] == pytest.approx(ends[1][name], abs=1e-5)
    assert ends[0]["kept_share"] == 1 and ends[0]["tokens_per_second"] > 0
    short = run(tmp_path, logging_steps=10, max_steps=2).state.log_history
    assert len(short) == 1 and {"train_loss", "kept_share", "entropy", "num_tokens"} <= set(short[0])
    whole = run(tmp_path, logging_steps=1, max_steps=2).state.log_history
    assert "train_loss" in whole[-1] and "kept_share" not in whole[-1]  # nothing since the last entry


@pytest.mark.parametrize("with_logits", [False, True])
def test_an_evaluation_counts_the_tokens_trained_so_far(tmp_path, with_logits):
    held_out = datasets.Dataset.from_list(make_rows(3, seed=9))
    changes = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "max_steps": 3, "eval_dataset": held_out}
    if with_logits:
        changes["compute_metrics"] = lambda prediction: {"rows": len(prediction.label_ids)}
    trainer = run(tmp_path, **changes)
    counted = [e["eval_num_tokens"] for e in trainer.state.log_history if "eval_loss" in e]
    assert counted == [tokens_of(trainer.seen[:n]) for n in (1, 2, 3)]
    assert trainer.evaluate()["eval_num_tokens"] == tokens_of(trainer.seen)
