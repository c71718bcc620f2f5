"""One training step on one long row: peak memory against its length, beside the published way until that does not fit.

    python -m benchmarks.speed.long_rows

A Llama of two layers, 256 wide, with a vocabulary of 32,000, in float32; ssToken with a recorded history. The published
way holds full logits of both models (of one here, as the history is recorded) and the last layer's full attention.
Writes benchmarks/results/long_rows.json after every length; `python -m tools.write_docs` shows it in the docs. Started
again after an interruption it goes on (`--fresh` does not); a length that fails is recorded with its reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from benchmarks.machine import machine
from benchmarks.resume import RESULTS, attempt, digest, in_new_process, resume, write
from benchmarks.speed.measure import limited_memory, peak_extra_mib

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
CPU = torch.device("cpu")
R = TypeVar("R")


def model_and_row(length: int, attention: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max(LENGTHS),
            attn_implementation=attention,
        )
    )
    ids = torch.randint(0, 32000, (1, length))
    labels = ids.clone()
    labels[:, : length // 4] = -100
    return model.train(), {"input_ids": ids, "labels": labels, "history_nll": torch.rand(1, length) * 20}


def ours(length: int) -> None:
    from tokensel import Selection, apply_to, methods

    model, batch = model_and_row(length, "sdpa")
    apply_to(model)
    yield
    model(**batch, selection=Selection(methods.get("sstoken"))).loss.backward()
    yield


def published_loss(model, batch: dict) -> torch.Tensor:
    """Full logits, full attention of every layer as transformers gives it, float32 cross-entropy, masked mean."""
    out = model(input_ids=batch["input_ids"], output_attentions=True, use_cache=False)
    logits, labels = out.logits[0, :-1].float(), batch["labels"][0, 1:]
    nll = torch.nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    response = labels != -100
    rel = (batch["history_nll"][0, 1:] - nll.detach())[response]
    mass = out.attentions[-1][0].mean(0)[1:, : int((labels == -100).sum()) + 1].sum(-1).detach()[response]
    score = (rel - rel.min()) / (rel.max() - rel.min()) / 2 + mass / 2
    keep = score.topk(int(0.6 * len(score))).indices
    return nll[response][keep].mean()


def published(length: int) -> None:
    model, batch = model_and_row(length, "eager")
    yield
    published_loss(model, batch).backward()
    yield


WAYS = {"tokensel": ours, "as published": published}


def peak_of(way: str, length: int) -> float | None:
    """Peak of one step above model and row, MiB; None where the memory of the machine ran out."""
    steps = WAYS[way](length)
    next(steps)
    return unless_out_of_memory(lambda: peak_extra_mib(lambda: next(steps), CPU)[0])


def unless_out_of_memory(run: Callable[[], R]) -> R | None:
    """What `run()` returns; None where the memory of the machine ran out."""
    try:
        with limited_memory(CPU):
            return run()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            return None
        raise


def measure(results: dict, save: Callable[[], None]) -> None:
    """Fills results["peak_mib"] with the peaks by way and length that it lacks, each in a process of its own."""
    peaks = results.setdefault("peak_mib", {})
    for way in WAYS:
        there = peaks.setdefault(way, {})
        for length in tqdm(LENGTHS, desc=way, unit="length"):
            if isinstance(there.get(str(length), {}), dict):  # not there, or failed
                there[str(length)] = in_new_process(attempt, peak_of, way, length)
                save()


def table(results: dict) -> str:
    """MiB by length; below it how many are not there yet, and why others failed."""
    lines = ["| tokens of the row | " + " | ".join(map(str, LENGTHS)) + " |", "| --- |" + " --: |" * len(LENGTHS)]
    notes, done = [], 0
    for way in WAYS:
        peaks, cells = results["peak_mib"].get(way, {}), []
        for length in map(str, LENGTHS):
            peak = peaks.get(length)
            done += length in peaks
            if isinstance(peak, dict):
                notes.append(f"- failed: {way}, {length}: {peak['failed']}")
                cells.append("failed")
            elif peak is None:
                cells.append("out of memory" if length in peaks else "not measured")
            else:
                cells.append(f"{peak:,.0f}")
        lines.append(f"| {way}, MiB | {' | '.join(cells)} |")
    if done < (total := len(WAYS) * len(LENGTHS)):
        notes.insert(0, f"- unfinished: {done} of {total} lengths")
    return "\n".join([*lines, "", *notes] if notes else lines)


def plot(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for way, peaks in results["peak_mib"].items():
        points = {n: peaks[str(n)] for n in LENGTHS if isinstance(peaks[str(n)], float)}
        axes.loglog(list(points), list(points.values()), "o-", label=way, base=2)
        if points and None in peaks.values():
            last = max(points)
            axes.annotate("out of memory beyond", (last, points[last]), (6, 2), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens of the row")
    axes.set_ylabel("peak memory of a step (MiB)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Description": digest(results["peak_mib"])})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for long_rows.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what long_rows.json already has")
    options = parser.parse_args(argv)
    path, settings = options.output / "long_rows.json", {"machine": machine(CPU)}
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        results = settings if options.fresh else resume(path, settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        measure(results, lambda: write(path, results))
    except KeyboardInterrupt:
        parser.exit(130, f"\ninterrupted; the same command goes on with what is in {path}\n")
    print(table(results))
    if options.output == RESULTS:
        print("`python -m tools.write_docs` puts the table into the docs")


if __name__ == "__main__":
    main()
