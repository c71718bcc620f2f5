"""ssToken fine-tuning end to end on data with planted token noise: no GPU, no hub, a few minutes on two cores.

Makes a tokenizer, a small Llama-style model and instruction data; trains a base on clean rows; records its losses;
fine-tunes on noisy rows by five methods; prints a table and writes a page in which one sees what was kept and why.

    python examples/quickstart.py [--output quickstart] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, set_seed

from tokensel.arguments import SelectiveTrainingArguments
from tokensel.comparison import compare, write_comparison
from tokensel.data import encode_rows, load_rows
from tokensel.offline import score
from tokensel.settings import ScoreArguments
from tokensel.testing import held_out_nll, make_model, make_rows, make_tokenizer, plant_noise
from tokensel.trainer import SelectiveTrainer

METHODS = ("full", "random", "sstoken", "history_excess", "clean_posterior")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder that is made anew")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = yaml.safe_load((Path(__file__).parent / "quickstart.yaml").read_text(encoding="utf-8"))
    out, seed, started = options.output, options.seed, time.perf_counter()
    if (out / "base").exists():  # only ever removes what an earlier run of this script made
        for made in ("base", "data", *METHODS):
            shutil.rmtree(out / made, ignore_errors=True)
        (out / "history.parquet").unlink(missing_ok=True)
    (out / "data").mkdir(parents=True, exist_ok=True)
    set_seed(seed)

    print("\n[1/5] tokenizer, model and data, all made here", flush=True)
    data = config["data"]
    clean = make_rows(data["base_rows"] + data["noisy_rows"] + data["held_out_rows"], seed=seed)
    base_rows = clean[: data["base_rows"]]
    noisy_rows = clean[data["base_rows"] : -data["held_out_rows"]]
    tokenizer = make_tokenizer(base_rows)
    planted_rows = plant_noise(noisy_rows, tokenizer, kind=data["noise"], share=data["noise_share"], seed=seed)
    write_jsonl(out / "data/base.jsonl", base_rows)
    write_jsonl(out / "data/noisy.jsonl", planted_rows)
    write_jsonl(out / "data/held_out.jsonl", clean[-data["held_out_rows"] :])
    limit = data["max_length"]
    rows, told = encode_rows(load_rows(str(out / "data/base.jsonl")), tokenizer, limit)
    held_out, _ = encode_rows(load_rows(str(out / "data/held_out.jsonl")), tokenizer, limit)
    noisy, _ = encode_rows(load_rows(str(out / "data/noisy.jsonl")), tokenizer, limit, keep_columns=("noise",))
    print(f"base data: {told}")

    print("\n[2/5] a base model, trained on clean rows", flush=True)
    model = make_model(tokenizer, seed=seed)
    print(f"Llama with {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    base = SelectiveTrainer(
        model,
        SelectiveTrainingArguments(
            output_dir=str(out / "base"),
            method="full",
            use_cpu=True,
            seed=seed,
            **config["common"],
            **config["base"],
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    base.train()
    base.save_model()
    base_nll = held_out_nll(base, held_out)
    print(
        f"held-out clean NLL of the base: {base_nll:.3f} nats (uniform over the vocabulary: "
        f"{torch.log(torch.tensor(float(len(tokenizer)))):.3f})"
    )

    print("\n[3/5] its losses on the noisy rows, recorded once: the history", flush=True)
    store = out / "history.parquet"
    score(
        ScoreArguments(
            model_name_or_path=str(out / "base"),
            dataset_name=str(out / "data/noisy.jsonl"),
            max_length=limit,
            output=str(store),
        )
    )

    print(f"\n[4/5] fine-tuning on the noisy rows by {', '.join(METHODS)}", flush=True)
    table, runs = compare(
        METHODS,
        lambda: AutoModelForCausalLM.from_pretrained(out / "base"),
        tokenizer,
        noisy,
        held_out,
        out,
        rho=config["rho"],
        history_store=store,
        seed=seed,
        **config["common"],
        **config["tune"],
    )

    print("\n[5/5] what came out", flush=True)
    write_comparison(out, table, runs, base_nll=base_nll, rho=config["rho"])
    print(f"\nopen {out / 'selection.html'} and {out / 'rel.png'}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
