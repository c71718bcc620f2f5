"""Weights that the data gives, from rows to loss and gradient, against float64 formulas."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from oracles import next_token_nll
from tiny import VOCABULARY, causal_lm

from tokensel import Selection, apply_to, methods
from tokensel.arguments import SelectiveTrainingArguments
from tokensel.cli import main
from tokensel.data import SelectionCollator, encode_rows
from tokensel.testing import make_model, make_rows, make_tokenizer
from tokensel.trainer import SelectiveTrainer

TOKENIZER = make_tokenizer(make_rows(60, seed=5), vocab_size=VOCABULARY)
TOKENIZER.chat_template = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}A"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ROWS = [{"prompt": f"{row['prompt'][:9]} ", "completion": row["completion"][:17]} for row in make_rows(4, seed=2)]
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Ada "},
        {"role": "assistant", "content": "buys two", "weight": -0.5},
        {"role": "user", "content": "And "},
        {"role": "assistant", "content": "pays"},
        {"role": "user", "content": "So "},
        {"role": "assistant", "content": "three", "weight": 2},
    ]
}


@pytest.fixture(scope="module")
def model():
    model = causal_lm(vocab_size=len(TOKENIZER))
    apply_to(model)
    return model


def collate(rows, packing=False, side="right", **weights):
    encoded = [dict(row) for row in encode_rows(rows, TOKENIZER, 64, **weights)[0]]
    if packing:
        return dict(SelectionCollator(transformers.DataCollatorWithFlattening(return_tensors="pt"))(encoded))
    TOKENIZER.padding_side = side
    return dict(SelectionCollator(transformers.DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt"))(encoded))


def run(model, batch, method="weighted", **parameters):
    """(loss, gradients by name, output)."""
    model.zero_grad()
    output = model(**batch, selection=Selection(methods.get(method, **parameters)))
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, output


def formula(model, batch, denominator):
    """(Σ weight · nll / denominator, gradients) from the model's own float64 logits."""
    model.zero_grad()
    w = batch["token_weights"][:, 1:].double()
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "token_weights")}
    # with a cache, packed documents would see each other
    total = (w * next_token_nll(model(**inputs, use_cache=False).logits, batch["input_ids"])).sum()
    loss = total / (w.abs().sum() if denominator == "weight" else (w != 0).sum())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_equal(found, expected, sign=1):
    torch.testing.assert_close(found[0].double(), sign * expected[0].double(), rtol=1e-10, atol=0)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, sign * expected[1][name], rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_weights_of_one_are_ordinary_fine_tuning(model, packing):
    ones = [row | {"weight": 1} for row in ROWS]
    assert_equal(run(model, collate(ones, packing)), run(model, collate(ROWS, packing), "full"))


def test_weights_of_minus_one_turn_the_gradient_around(model):
    negative = [row | {"weight": -1} for row in ROWS]
    assert_equal(run(model, collate(negative)), run(model, collate(ROWS), "full"), sign=-1)


@pytest.mark.parametrize("denominator", ["weight", "count"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_prompt_and_response_weights_are_weighted_instruction_tuning(model, denominator, layout):
    weights = {"prompt_weight": 0.25, "response_weight": 0.75}  # what float32 holds
    batch = collate(ROWS, layout == "packed", "left" if layout == "left" else "right", **weights)
    found = run(model, batch, denominator=denominator)
    assert_equal(found, formula(model, batch, denominator))
    prompt, responses = batch["labels"] == -100, (batch["labels"] != -100).sum()
    assert (found[2].weights[prompt] != 0).sum() > 4 and found[2].response.sum() == responses


def test_messages_weights_and_weights_for_each_token(model):
    given = {"input_ids": [1, 7, 8, 9, 10], "labels": [-100, -100, 8, 9, 10], "token_weights": [5, 0.5, -1, 0, 3]}
    rows = [CONVERSATION, given, ROWS[0] | {"weight": 1.5}]
    batch = collate(rows)
    for denominator in ("weight", "count"):
        assert_equal(run(model, batch, denominator=denominator), formula(model, batch, denominator))
    (encoded, *_) = encode_rows([CONVERSATION], TOKENIZER, 64)[0]
    text = {
        weight: TOKENIZER.decode(
            [i for i, w in zip(encoded["input_ids"], encoded["token_weights"], strict=True) if w == weight]
        )
        for weight in (-0.5, 1, 2)
    }
    assert text == {-0.5: " buys two</s>", 1: " pays</s>", 2: " three</s>"}


def test_weights_compose_with_a_selection(model):
    rows = [ROWS[0] | {"weight": 0}, ROWS[1] | {"weight": -2}, ROWS[2], CONVERSATION]
    batch = collate(rows)
    history = torch.rand(batch["labels"].shape)
    loss, _, output = run(model, batch | {"history_nll": history}, "sstoken", gamma=0.5, rho=0.6)
    unweighted = {k: v for k, v in batch.items() if k != "token_weights"} | {"history_nll": history}
    alone = run(model, unweighted, "sstoken", gamma=0.5, rho=0.6)[2]
    for row in (1, 2, 3):  # nothing there has weight 0
        torch.testing.assert_close(output.weights[row], alone.weights[row] * batch["token_weights"][row])
    assert not output.weights[0].any() and alone.weights[0].any()
    # kept tokens are counted, as of a selection without weights
    kept = (output.weights != 0).sum()
    torch.testing.assert_close(loss.double(), (output.weights * output.nll).double().sum() / kept, rtol=1e-6, atol=0)


def test_held_out_rows_are_not_weighed(tmp_path, capsys):
    """`tokensel train` with weights of every kind; its held-out loss is the one without."""
    tokenizer = make_tokenizer(make_rows(60, seed=5), vocab_size=320)
    make_model(tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=1, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = make_rows(8, seed=1)
    for name, more in (("plain", {}), ("weighted", {"weight": -3})):
        for file in (name, f"held {name}"):
            (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    losses = []
    for name, more in (("plain", []), ("weighted", ["--prompt_weight", "0.5"]), ("weighted", ["--packing", "true"])):
        settings = {
            "model_name_or_path": tmp_path / "model",
            "dataset_name": tmp_path / f"{name}.jsonl",
            "eval_dataset_name": tmp_path / f"held {name}.jsonl",
            "output_dir": tmp_path / f"run{len(losses)}",
            "max_length": 64,
            "learning_rate": 0,
            "max_steps": 1,
            "method": "weighted",
            "use_cpu": "true",
            "report_to": "none",
            "save_strategy": "no",
        }
        argv = [part for setting, value in settings.items() for part in (f"--{setting}", str(value))]
        assert main(["train", *argv, *more]) == 0, capsys.readouterr().err
        metrics = json.loads((settings["output_dir"] / "all_results.json").read_text())
        losses.append(metrics["eval_loss"])
    assert losses[1] == losses[0] and losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("loss_only", [True, False])
def test_evaluation_does_not_look_at_weights(tmp_path, loss_only):
    rows = encode_rows([row | {"weight": -3} for row in ROWS], TOKENIZER, 64, prompt_weight=0.5)[0]
    settings = {"output_dir": tmp_path, "use_cpu": True, "report_to": "none", "prediction_loss_only": loss_only}
    TOKENIZER.padding_side = "right"
    trainer = SelectiveTrainer(
        causal_lm(vocab_size=len(TOKENIZER)),
        SelectiveTrainingArguments(**settings, method="weighted"),
        data_collator=SelectionCollator(transformers.DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")),
        train_dataset=rows,
        processing_class=TOKENIZER,
    )
    weighted = trainer.evaluate(rows)["eval_loss"]
    assert weighted == trainer.evaluate(rows.remove_columns("token_weights"))["eval_loss"] > 0
