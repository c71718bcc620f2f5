"""ssToken fine-tuning end to end on data with planted token noise: no GPU, no hub, a few minutes on two cores.

Makes a tokenizer, a small Llama-style model and instruction data; trains a base on clean rows; records its losses;
fine-tunes on noisy rows by four methods; prints a table and writes a page in which one sees what was kept and why.

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
from tokensel.data import SelectionCollator, encode_rows, load_rows
from tokensel.metrics import peak_memory_mib
from tokensel.offline import score
from tokensel.report import format_table, plot_rel, write_selection_page
from tokensel.report.watch import selected_samples
from tokensel.settings import ScoreArguments
from tokensel.testing import PlantedNoiseTrainer, held_out_nll, make_model, make_rows, make_tokenizer, plant_noise
from tokensel.trainer import SelectiveTrainer

METHODS = ("full", "random", "sstoken", "history_excess")
SHOWN = 5  # noisy rows on the page, and a clean one


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown_rows(rows) -> dict[int, dict]:
    """Some noisy rows, and a clean one, by their number."""
    noisy = [i for i in range(len(rows)) if any(rows[i]["noise"])][:SHOWN]
    clean = [i for i in range(len(rows)) if not any(rows[i]["noise"])][:1]
    return {i: rows[i] for i in noisy + clean}


def verdict(table: list[dict]) -> list[str]:
    """Says of each method whether it did better than `random` and `full`; one seed, so only a hint."""
    nll = {row["method"]: row["held-out clean NLL"] for row in table}
    lines = []
    for name in METHODS[2:]:
        beside = ("random", "full")
        beaten = " and ".join(other for other in beside if nll[name] < nll[other])
        unbeaten = " or ".join(other for other in beside if nll[name] >= nll[other])
        said = [f"better than {beaten}"] * bool(beaten) + [f"NOT better than {unbeaten}"] * bool(unbeaten)
        lines.append(f"{name}: held-out clean NLL {nll[name]:.3f}, {', '.join(said)} (one seed, one small model)")
    return lines


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
            output_dir=str(out / "base"), method="full", seed=seed, **config["common"], **config["base"]
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
    table, runs = [], []
    for name in METHODS:
        print(f"-- {name}", flush=True)
        arguments = SelectiveTrainingArguments(
            output_dir=str(out / name),
            method=name,
            method_args={} if name == "full" else {"rho": config["rho"]},
            history="recorded",
            history_store=str(store),
            remove_unused_columns=False,
            seed=seed,
            **config["common"],
            **config["tune"],
        )
        trainer = PlantedNoiseTrainer(
            AutoModelForCausalLM.from_pretrained(out / "base"),
            arguments,
            data_collator=SelectionCollator(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"), columns=("noise",)),
            train_dataset=noisy,
            processing_class=tokenizer,
        )
        trainer.train()
        totals = trainer.selection_totals()
        table.append(
            {
                "method": name,
                "held-out clean NLL": round(held_out_nll(trainer, held_out), 4),
                "noise kept": f"{trainer.noise_kept / trainer.planted:.1%}",
                "tokens kept": f"{totals['kept_share']:.1%}",
                "tokens/s": round(totals["tokens_per_second"]),
                "peak memory MiB": round(peak_memory_mib("cpu")),
            }
        )
        history = [entry for entry in trainer.state.log_history if "rel_mean" in entry]
        curves = {key: [[e["step"], e[key]] for e in history] for key in ("rel_mean", "rel_std", "kept_share")}
        samples = selected_samples(trainer, shown_rows(noisy))
        runs.append({"name": name, "scope": trainer.method.scope, "samples": samples, "curves": curves})

    print("\n[5/5] what came out", flush=True)
    notes = [
        f"Base before fine-tuning: {base_nll:.4f}. Lower is better. rho = {config['rho']} for all but full.",
        *verdict(table),
        "Peak memory is of the process so far, so it only grows from row to row.",
    ]
    print(format_table(table))
    print("\n".join(notes))
    order = [runs[METHODS.index(name)] for name in ("sstoken", "history_excess", "random", "full")]
    write_selection_page(
        out / "selection.html", order, title="Which tokens were kept, and why", table=table, notes=notes
    )
    plot_rel(out / "rel.png", runs)
    results = {"base_nll": round(base_nll, 4), "table": table}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nopen {out / 'selection.html'} and {out / 'rel.png'}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
