"""The quickstart with a real model on real English: SmolLM2 learns to explain Python's standard library.

The rows are docstrings, which come with every Python; half of the answers get 30 % random tokens. Fine-tunes LoRA
adapters by four methods, prints a table, and writes a page in which one sees what was kept and why. No hub, no GPU.

    python examples/demo.py [--output demo] [--cache demo/models] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import datasets
import peft
from transformers import DataCollatorForSeq2Seq, set_seed

from tokensel.arguments import SelectiveTrainingArguments
from tokensel.comparison import compare, write_comparison
from tokensel.data import encode_rows
from tokensel.offline import score
from tokensel.settings import ScoreArguments
from tokensel.testing import docstring_rows, held_out_nll, plant_noise, pretrained
from tokensel.trainer import SelectiveTrainer

METHODS = ("full", "random", "sstoken", "clean_posterior")
RHO = 0.6
STEPS, ROWS_A_STEP, HELD_OUT, MAX_LENGTH = 40, 4, 48, 112
LORA = peft.LoraConfig(  # in the upper half of the layers, which spares half of the backward pass
    r=16,
    lora_alpha=32,
    target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    layers_to_transform=list(range(15, 30)),
)
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS_A_STEP,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "logging_steps": 4,
    "report_to": "none",
    "save_strategy": "no",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder, written anew")
    parser.add_argument("--cache", type=Path, help="folder of pretrained models, OUTPUT/models if not given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, seed, started = options.output, options.seed, time.perf_counter()
    cache = options.cache or out / "models"
    out.mkdir(parents=True, exist_ok=True)
    set_seed(seed)

    print(f"\n[1/4] SmolLM2-135M-Instruct, read from its package once and kept in {cache}", flush=True)
    model, tokenizer = pretrained("smollm2", cache)
    chats = docstring_rows(seed)
    clean = plant_noise(chats, tokenizer, kind="none", share=0, seed=seed)
    chats = [chat for chat, row in zip(chats, clean, strict=True) if len(row["input_ids"]) <= MAX_LENGTH]
    noisy = plant_noise(chats[: STEPS * ROWS_A_STEP], tokenizer, kind="random", share=0.5, seed=seed)
    held_out, _ = encode_rows(chats[-HELD_OUT:], tokenizer, MAX_LENGTH)
    print(f"{chats[0]['messages'][0]['content']}\n    {chats[0]['messages'][1]['content']}")

    print("\n[2/4] its losses before fine-tuning, recorded once: the history", flush=True)
    data, store = out / "noisy.jsonl", out / "history.parquet"
    if data.exists():  # only ever removes what an earlier run of this script made
        store.unlink(missing_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in noisy), encoding="utf-8")
    score(ScoreArguments(model_name_or_path=model.name_or_path, dataset_name=str(data), output=str(store)))
    base = SelectiveTrainer(
        model,
        SelectiveTrainingArguments(output_dir=str(out / "base"), method="full", use_cpu=True, report_to="none"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"),
        processing_class=tokenizer,
    )
    base_nll = held_out_nll(base, held_out)
    print(f"held-out clean NLL: {base_nll:.3f} nats")

    print(f"\n[3/4] fine-tuning on {len(noisy)} rows by {', '.join(METHODS)}", flush=True)
    table, runs = compare(
        METHODS,
        lambda: peft.get_peft_model(pretrained("smollm2", cache)[0], LORA),
        tokenizer,
        datasets.Dataset.from_list(noisy),
        held_out,
        out,
        rho=RHO,
        history_store=store,
        seed=seed,
        **SETTINGS,
    )

    print("\n[4/4] what came out", flush=True)
    write_comparison(out, table, runs, base_nll=base_nll, rho=RHO)
    print(f"\nopen {out / 'selection.html'} and {out / 'rel.png'}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
