"""One training step on one long row: peak memory against its length, beside the published way until that does not fit.

    python -m benchmarks.long_rows

A Llama of two layers, 256 wide, with a vocabulary of 32,000, in float32; ssToken with a recorded history. The published
way holds full logits of both models (of one here, as the history is recorded) and the last layer's full attention.
Writes benchmarks/results/long_rows.json, docs/long_rows.png and the README's table of it.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.measure import limited_memory, machine, peak_extra_mib
from benchmarks.quality import README, RESULTS, into_readme

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
CPU = torch.device("cpu")


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


def published(length: int) -> None:
    """Full logits, full attention of every layer as transformers gives it, float32 cross-entropy, masked mean."""
    model, batch = model_and_row(length, "eager")
    history = batch.pop("history_nll")
    yield
    out = model(input_ids=batch["input_ids"], output_attentions=True, use_cache=False)
    logits, labels = out.logits[0, :-1].float(), batch["labels"][0, 1:]
    nll = torch.nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    response = labels != -100
    rel = (history[0, 1:] - nll.detach())[response]
    mass = out.attentions[-1][0].mean(0)[1:, : int((labels == -100).sum()) + 1].sum(-1).detach()[response]
    score = (rel - rel.min()) / (rel.max() - rel.min()) / 2 + mass / 2
    keep = score.topk(int(0.6 * len(score))).indices
    nll[response][keep].mean().backward()
    yield


WAYS = {"tokensel": ours, "as published": published}


def peak_of(way: str, length: int) -> float | None:
    """Peak of one step above model and row, MiB; None where the memory of the machine ran out."""
    steps = WAYS[way](length)
    next(steps)
    try:
        with limited_memory(CPU):
            return peak_extra_mib(lambda: next(steps), CPU)[0]
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            return None
        raise


def measure() -> dict:
    """Peaks by way and length, each in a process of its own."""
    peaks: dict = {way: {} for way in WAYS}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for way in WAYS:
            for length in tqdm(LENGTHS, desc=way, unit="length"):
                peaks[way][str(length)] = fresh.apply(peak_of, (way, length))
    return {"peak_mib": peaks, "machine": machine(CPU)}


def table(found: dict) -> str:
    lines = ["| tokens of the row | " + " | ".join(map(str, LENGTHS)) + " |", "| --- |" + " --: |" * len(LENGTHS)]
    for way, peaks in found["peak_mib"].items():
        cells = ("out of memory" if peaks[str(n)] is None else f"{peaks[str(n)]:,.0f}" for n in LENGTHS)
        lines.append(f"| {way}, MiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for way, peaks in found["peak_mib"].items():
        known = {n: peaks[str(n)] for n in LENGTHS if peaks[str(n)] is not None}
        axes.loglog(list(known), list(known.values()), "o-", label=way, base=2)
        if len(known) < len(LENGTHS):
            last = max(known)
            axes.annotate("out of memory beyond", (last, known[last]), (6, 2), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens of the row")
    axes.set_ylabel("peak memory of a step (MiB)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    result = measure()
    (RESULTS / "long_rows.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, README.parent / "docs/long_rows.png")
    into_readme("long rows", table(result))
    print(table(result))
