"""One training step of Gemma 3 270M, whose vocabulary is 262,144: the process at its peak, beside the published way.

    make .venv/.study
    .venv/bin/python -m benchmarks.speed.large_vocabulary

ssToken with LoRA adapters (r 16) on all linear layers, in float32; the history is the model without its adapters, or a
frozen copy. The published way holds the logits of both models, and all attention. Writes
benchmarks/results/large_vocabulary.json after every step; `python -m tools.write_docs` shows it in the docs. Started
again it measures what is missing there.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.machine import machine, short_commit
from benchmarks.resume import RESULTS, resume, write
from benchmarks.speed.measure import peak_extra_mib
from tokensel.metrics import peak_memory_mib

SHAPES = ((2, 128), (1, 512))  # rows, tokens of each
VOCABULARY = 262144
CPU = torch.device("cpu")


def model_and_batch(shape: tuple[int, int], cache: Path, attention: str):
    import peft

    from tokensel.testing import pretrained

    model, tokenizer = pretrained("gemma3", cache)
    assert len(tokenizer) == VOCABULARY
    model.set_attn_implementation(attention)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, shape)
    labels = ids.clone()
    labels[:, : shape[1] // 4] = -100
    return model.train(), {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def adapters_off(shape: tuple[int, int], cache: Path) -> Iterator[None]:
    from tokensel.history import AdapterOff

    yield from _ours(shape, cache, AdapterOff)


def frozen_copy(shape: tuple[int, int], cache: Path) -> Iterator[None]:
    from tokensel.history import ModelCopy

    yield from _ours(shape, cache, ModelCopy)


def _ours(shape: tuple[int, int], cache: Path, make_history) -> Iterator[None]:
    import tokensel

    model, batch = model_and_batch(shape, cache, "sdpa")
    tokensel.apply_to(model)
    selection = tokensel.Selection(tokensel.methods.get("sstoken"), history=make_history(model))
    yield
    model(**batch, selection=selection).loss.backward()
    yield


def published(shape: tuple[int, int], cache: Path) -> Iterator[None]:
    """Full logits of both models, full attention of every layer, float32 cross-entropy, masked mean."""
    model, batch = model_and_batch(shape, cache, "eager")
    labels = batch.pop("labels")[:, 1:]
    response = labels != -100

    def losses(logits: torch.Tensor) -> torch.Tensor:
        flat = logits[:, :-1].float().reshape(-1, VOCABULARY)
        nll = torch.nn.functional.cross_entropy(flat, labels.reshape(-1).clamp(min=0), reduction="none")
        return nll.view(labels.shape)

    yield
    with torch.no_grad(), model.disable_adapter():
        history = losses(model(**batch, use_cache=False).logits)
    out = model(**batch, use_cache=False, output_attentions=True)
    nll = losses(out.logits)
    prompt = labels.shape[1] + 1 - int(response[0].sum())
    mass = out.attentions[-1].mean(1)[:, 1:, :prompt].sum(-1).detach()
    kept = []
    for rel, attended, trained, row in zip((history - nll).detach(), mass, response, nll, strict=True):
        rel, attended = rel[trained], attended[trained]
        score = (rel - rel.min()) / (rel.max() - rel.min()).clamp(min=1e-9) / 2 + attended / 2
        kept.append(row[trained][score.topk(-(-len(score) * 6 // 10)).indices])
    torch.cat(kept).mean().backward()
    yield


WAYS = {
    "tokensel, adapters off": adapters_off,
    "tokensel, a frozen copy": frozen_copy,
    "as published": published,
}


def peak_of(way: str, shape: tuple[int, int], cache: Path) -> int:
    """Of the process in one step, MiB: model, adapters and history, too."""
    steps = WAYS[way](shape, cache)
    next(steps)
    # not what the step adds: weights are mapped from their file, and a part of them is first read in the step
    peak_extra_mib(lambda: next(steps), CPU)
    return round(peak_memory_mib("cpu"))


def table(results: dict) -> str:
    """A row for each way, and the size of one model's logits; below it where it was measured."""
    shapes = [(rows, tokens, f"{rows}x{tokens}") for rows, tokens in SHAPES]
    lines = ["| | " + " | ".join(f"{rows} × {tokens} tokens, MiB" for rows, tokens, _ in shapes) + " |"]
    lines.append("| --- |" + " --: |" * len(shapes))
    for way, peaks in results["peak_mib"].items():
        lines.append(f"| {way} | {' | '.join(f'{peaks[shape]:,}' for *_, shape in shapes)} |")
    logits = [f"{rows * tokens * VOCABULARY * 4 >> 20:,}" for rows, tokens, _ in shapes]
    lines.append(f"| (logits of one model, float32) | {' | '.join(logits)} |")
    m = results["machine"]
    where = f"{m['cpu']}, PyTorch {m['torch']}, transformers {m['transformers']}, commit {short_commit(m['commit'])}"
    return "\n".join([*lines, "", f"`python -m benchmarks.speed.large_vocabulary` on {where}."])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for large_vocabulary.json")
    parser.add_argument("--cache", type=Path, default=Path("demo/models"), help="folder of pretrained models")
    options = parser.parse_args(argv)
    path = options.output / "large_vocabulary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = resume(path, {}) or {"machine": machine(CPU), "peak_mib": {way: {} for way in WAYS}}
    missing = [
        (way, shape) for way in WAYS for shape in SHAPES if "{}x{}".format(*shape) not in results["peak_mib"][way]
    ]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for way, shape in tqdm(missing, unit="step"):
            results["peak_mib"][way]["{}x{}".format(*shape)] = fresh.apply(peak_of, (way, shape, options.cache))
            write(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
