"""TRL's SFTTrainer with token selection: chats, loss on the assistant's turns, packing, LoRA.

    python examples/trl_sft.py

TRL prepares, packs and masks; attention never crosses packed documents, and each keeps its own share of tokens. Over a
trainer class of your own: `class Mine(tokensel.TokenSelectionMixin, SFTTrainer)`. The model here is tiny and random.
"""

from __future__ import annotations

from datasets import Dataset
from peft import LoraConfig

import tokensel
from tokensel.testing import make_model, make_rows, make_tokenizer

text = make_rows(64, seed=0)
tokenizer = make_tokenizer(text)
tokenizer.chat_template = (  # what the assistant says stands in generation markers
    "{% for m in messages %}<s>{{ m.role }}:\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
chats = [
    {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
    for r in text
]

args = tokensel.SelectiveSFTConfig(
    output_dir="run",
    method="sstoken",
    method_args={"gamma": 0.5, "rho": 0.6},
    history="adapter_off",
    assistant_only_loss=True,
    packing=True,  # packing_strategy="bfd", the default; "wrapped" is refused
    max_length=256,
    bf16=False,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    logging_steps=2,
    save_strategy="no",
    report_to="none",
)
trainer = tokensel.SelectiveSFTTrainer(
    make_model(tokenizer, seed=0),
    args,
    train_dataset=Dataset.from_list(chats),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
print(trainer.selection_totals())
