"""Several methods beside each other, on rows whose noise is known: a table, a verdict, a page of what was kept and why.

What the quickstart and the demo have in common.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq

from tokensel.arguments import SelectiveTrainingArguments
from tokensel.data import SelectionCollator
from tokensel.metrics import peak_memory_mib
from tokensel.report import format_table, plot_rel, write_selection_page
from tokensel.report.watch import selected_samples
from tokensel.select.methods import builder
from tokensel.testing import PlantedNoiseTrainer, held_out_nll

BESIDE = ("random", "full")  # what a method has to beat
SHOWN = 5  # noisy rows on the page, and a clean one
COLUMN = "held-out clean NLL"


def compare(
    methods: Sequence[str],
    make_model: Callable[[], Any],
    tokenizer: Any,
    rows: Any,
    held_out: Any,
    output: Path,
    *,
    rho: float,
    history_store: Path,
    **settings: Any,
) -> tuple[list[dict], list[dict]]:
    """Fine-tunes a model by one method after the other, on a CPU.

    Args:
        methods: names.
        make_model: gives the model, new each time.
        rows, held_out: datasets of `input_ids` and `labels`; those trained on with `noise`, 1 on planted tokens.
        output: a folder; a run's own is in it, named by the method.
        rho: the share kept, of methods that keep a share.
        history_store: the losses of the model as `make_model` gives it, recorded on `rows`.
        settings: of `SelectiveTrainingArguments`.
    Returns:
        (a row for the table, what a page shows) for each method.
    """
    table, runs = [], []
    for name in methods:
        print(f"-- {name}", flush=True)
        arguments = SelectiveTrainingArguments(
            output_dir=str(output / name),
            method=name,
            method_args=f"rho={rho}" if "rho" in inspect.signature(builder(name)).parameters else None,
            history="recorded",
            history_store=str(history_store),
            remove_unused_columns=False,
            use_cpu=True,
            **settings,
        )
        trainer = PlantedNoiseTrainer(
            make_model(),
            arguments,
            data_collator=SelectionCollator(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"), columns=("noise",)),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        totals = trainer.selection_totals()
        table.append(
            {
                "method": name,
                COLUMN: round(held_out_nll(trainer, held_out), 4),
                "noise kept": f"{trainer.noise_kept / trainer.planted:.1%}",
                "tokens kept": f"{totals['kept_share']:.1%}",
                "tokens/s": round(totals["tokens_per_second"]),
                "peak memory MiB": round(peak_memory_mib("cpu")),
            }
        )
        history = [entry for entry in trainer.state.log_history if "rel_mean" in entry]
        curves = {key: [[e["step"], e[key]] for e in history] for key in ("rel_mean", "rel_std", "kept_share")}
        samples = selected_samples(trainer, _shown_rows(rows))
        runs.append({"name": name, "scope": trainer.method.scope, "samples": samples, "curves": curves})
    return table, runs


def _shown_rows(rows) -> dict[int, dict]:
    """Some noisy rows, and a clean one, by their number."""
    noisy = [i for i in range(len(rows)) if any(rows[i]["noise"])][:SHOWN]
    clean = [i for i in range(len(rows)) if not any(rows[i]["noise"])][:1]
    return {i: rows[i] for i in noisy + clean}


def verdict(table: list[dict]) -> list[str]:
    """Says of each method whether it did better than `random` and `full`; one seed, so only a hint."""
    nll = {row["method"]: row[COLUMN] for row in table}
    lines = []
    for name in [name for name in nll if name not in BESIDE]:
        beaten = " and ".join(other for other in BESIDE if nll[name] < nll[other])
        unbeaten = " or ".join(other for other in BESIDE if nll[name] >= nll[other])
        said = [f"better than {beaten}"] * bool(beaten) + [f"NOT better than {unbeaten}"] * bool(unbeaten)
        lines.append(f"{name}: held-out clean NLL {nll[name]:.3f}, {', '.join(said)} (one seed, one small model)")
    return lines


def write_comparison(output: Path, table: list[dict], runs: list[dict], *, base_nll: float, rho: float) -> None:
    """Prints the table and the verdict, and writes `selection.html`, `rel.png` and `results.json`."""
    notes = [
        f"Base before fine-tuning: {base_nll:.4f}. Lower is better. rho = {rho} for methods that keep a share.",
        *verdict(table),
        "Which method helps on which data, by pretrained models and three seeds: docs/quality.md",
        "Peak memory is of the process so far, so it only grows from row to row.",
    ]
    print(format_table(table))
    print("\n".join(notes))
    named = {run["name"]: run for run in runs}
    ordered = [run for name, run in named.items() if name not in BESIDE] + [named[name] for name in BESIDE]
    page = output / "selection.html"
    write_selection_page(page, ordered, title="Which tokens were kept, and why", table=table, notes=notes)
    plot_rel(output / "rel.png", runs)
    results = {"base_nll": round(base_nll, 4), "table": table}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
