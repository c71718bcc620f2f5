"""A tiny training by a selective trainer, and what the tests look at in it."""

from __future__ import annotations

import math

import datasets
import torch
from oracles import next_token_nll
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from tokensel.arguments import SelectiveTrainingArguments
from tokensel.store import HistoryWriter
from tokensel.testing import make_model, make_rows, make_tokenizer, plant_noise
from tokensel.trainer import SelectiveTrainer

TOKENIZER = make_tokenizer(make_rows(80, seed=7), vocab_size=384)
PLAIN = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.5,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 3,
    "per_device_train_batch_size": 4,
}


def make_rows_of_ids(n=16, seed=0):
    rows = plant_noise(make_rows(n, seed=seed), TOKENIZER, kind="none", share=0, seed=0)
    return datasets.Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])


ROWS = make_rows_of_ids()


def build(seed=1, dtype=torch.float64):
    return make_model(TOKENIZER, hidden_size=32, layers=2, heads=4, kv_heads=2, seed=seed).to(dtype)


def build_lora(dropout=0.0, random_adapter=True, **lora):
    torch.manual_seed(11)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=not random_adapter,
        **lora,
    )
    return get_peft_model(build(), config).double()


def eager_nll(model, row):
    """-log p of each token under the model, in float64 from its own logits; NaN for the first. (S,)"""
    ids = torch.tensor([row["input_ids"]])
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    model.train(training)
    return torch.cat([torch.full((1,), math.nan, dtype=torch.float64), next_token_nll(logits, ids[0])])


def record(path, model, rows=None, tokenizer=TOKENIZER):
    with HistoryWriter(path, tokenizer=tokenizer, model="base", max_length=64, dataset="rows") as writer:
        for row in rows if rows is not None else ROWS:
            labels = torch.tensor([row["labels"]])
            writer.add(torch.tensor([row["input_ids"]]), labels, eager_nll(model, row)[None])
    return str(path)


class Recording(SelectiveTrainer):
    """Keeps every micro-batch's inputs and selection."""

    def record_selection(self, inputs, output):
        super().record_selection(inputs, output)
        self.__dict__.setdefault("seen", []).append((dict(inputs), output))


def make_trainer(tmp_path, model=None, rows=ROWS, cls=Recording, packing=False, collator=None, **settings):
    packed = DataCollatorWithFlattening(return_tensors="pt")
    extra = {
        name: settings.pop(name)
        for name in ("eval_dataset", "compute_metrics", "compute_loss_func")
        if name in settings
    }
    arguments = SelectiveTrainingArguments(output_dir=str(tmp_path / "out"), **PLAIN | settings)
    return cls(
        build() if model is None else model,
        arguments,
        data_collator=collator or (packed if packing else DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")),
        train_dataset=rows,
        processing_class=TOKENIZER,
        **extra,
    )


def run(*args, **settings):
    trainer = make_trainer(*args, **settings)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# 2 steps of float64 rounding on weights of order 1; an update moves them by more than 1e-2
TIGHT = 1e-12
