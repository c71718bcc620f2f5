"""TRL's DPOTrainer without a reference model in memory, on the tokens that a method chooses among both answers.

    python examples/trl_dpo.py

The reference's losses are recorded once; with files instead of rows at hand, `tokensel score --both_answers true` does
it. Loss and metrics stay TRL's. The model here is tiny and random.
"""

from __future__ import annotations

from pathlib import Path

import trl
from datasets import Dataset

import tokensel
from tokensel.data import encode_rows
from tokensel.testing import make_model, make_rows, make_tokenizer

text = make_rows(64, seed=0)
tokenizer = make_tokenizer(text)
pairs = Dataset.from_list(
    [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(text[::2], text[1::2], strict=True)
    ]
)
args = trl.DPOConfig(
    output_dir="run",
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    num_train_epochs=2,
    max_length=256,
    logging_steps=2,
    bf16=False,
    save_strategy="no",
    report_to="none",
)
reference = make_model(tokenizer, seed=0)
Path("reference.parquet").unlink(missing_ok=True)  # of an earlier run
answers, _ = encode_rows(pairs, tokenizer, args.max_length, both_answers=True)
tokensel.record_losses(reference, answers, "reference.parquet", tokenizer=tokenizer)

policy = make_model(tokenizer, seed=0)
trainer = trl.DPOTrainer(policy, reference, args, train_dataset=pairs, processing_class=tokenizer)
del reference  # the trainer lets it go, too
method = tokensel.methods.get("history_excess", rho=0.6)  # compare with random at the same rho
tokensel.use_token_logprobs(trainer, reference="reference.parquet", method=method).train()
