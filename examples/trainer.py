"""transformers.Trainer with token selection: a LoRA adapter, against the base model without it.

    python examples/trainer.py

A tiny random Llama learns made-up sums here, so that the file runs anywhere; put your model and rows in.
"""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq

import tokensel
from tokensel.data import encode_rows
from tokensel.testing import make_model, make_rows, make_tokenizer

text = make_rows(64, seed=0)  # {"prompt", "completion"}
tokenizer = make_tokenizer(text)
rows, _ = encode_rows(text, tokenizer, max_length=256)
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(make_model(tokenizer, seed=0), lora)

args = tokensel.SelectiveTrainingArguments(
    output_dir="run",
    method="sstoken",
    method_args={"gamma": 0.5, "rho": 0.6},
    history="adapter_off",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    logging_steps=2,
    save_strategy="no",
    report_to="none",
    num_train_epochs=2,
)
trainer = tokensel.SelectiveTrainer(
    model,
    args,
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"),
    processing_class=tokenizer,
)
trainer.train()
print(trainer.selection_totals())
