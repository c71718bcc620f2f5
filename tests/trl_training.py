"""A tiny training by TRL's trainer with selection."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
from training import PLAIN, TOKENIZER, build

from tokensel.sft import SelectiveSFTConfig
from tokensel.testing import make_rows
from tokensel.trainer import TokenSelectionMixin

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'tokensel[trl]'")
# Assistant text in generation markers, each turn closed by </s>
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:\n{% endif %}"
)
CHAT_TOKENIZER = copy.deepcopy(TOKENIZER)
CHAT_TOKENIZER.chat_template = TEMPLATE
SOME = make_rows(12, seed=5)
COMPLETIONS = datasets.Dataset.from_list(SOME)
TEXTS = datasets.Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in SOME])
CHATS = datasets.Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": a["prompt"]},
                {"role": "assistant", "content": a["completion"]},
                {"role": "user", "content": b["prompt"]},
                {"role": "assistant", "content": b["completion"]},
            ]
        }
        for a, b in zip(SOME[::2], SOME[1::2], strict=True)
    ]
)


class Mine(TokenSelectionMixin, trl.SFTTrainer):
    """What a user writes; keeps every micro-batch's inputs and selection."""

    def record_selection(self, inputs, output):
        super().record_selection(inputs, output)
        self.__dict__.setdefault("seen", []).append((dict(inputs), output))


def settings(tmp_path, **changes):
    ours = {"output_dir": str(tmp_path / "out"), "max_length": 256, "bf16": False, "learning_rate": 0.1}
    return PLAIN | ours | changes


def make(tmp_path, rows=COMPLETIONS, model=None, cls=Mine, tokenizer=CHAT_TOKENIZER, **changes):
    names = ("eval_dataset", "peft_config", "compute_loss_func", "compute_metrics", "data_collator")
    extra = {name: changes.pop(name) for name in names if name in changes}
    args = SelectiveSFTConfig(**settings(tmp_path, **{"method": "random"} | changes))
    model = build() if model is None else model
    return cls(model, args, train_dataset=rows, processing_class=copy.deepcopy(tokenizer), **extra)


def of_trl(tmp_path, rows=COMPLETIONS, model=None, **changes):
    names = ("eval_dataset", "peft_config")
    extra = {name: changes.pop(name) for name in names if name in changes}
    args = trl.SFTConfig(**settings(tmp_path, **changes))
    model = build() if model is None else model
    return trl.SFTTrainer(model, args, train_dataset=rows, processing_class=copy.deepcopy(CHAT_TOKENIZER), **extra)


def run(*args, **changes):
    trainer = make(*args, **changes)
    trainer.train()
    return trainer


def documents(inputs, output):
    """[(token ids, kept)] of a batch's documents, whatever the layout."""
    sample = output.sample.flatten()
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(sample, dtype=torch.bool) if mask is None else mask.flatten().bool()
    ids, kept = inputs["input_ids"].flatten(), output.weights.flatten() > 0
    return [(ids[w].tolist(), kept[w].tolist()) for w in ((sample == s) & valid for s in sample[valid].unique())]
