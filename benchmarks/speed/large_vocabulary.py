"""One training step of Gemma 3 270M, whose vocabulary is 262,144: peak memory beside the published way.

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

from benchmarks.machine import machine
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
    for parameter in model.parameters():  # of a file that is mapped, not read: it would be read in the step
        parameter.data = parameter.data.clone()
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


def backbone_alone(shape: tuple[int, int], cache: Path) -> Iterator[None]:
    """Forward and backward up to the hidden states, without head, loss and history: what no way can spare."""
    model, batch = model_and_batch(shape, cache, "sdpa")
    batch.pop("labels")
    yield
    model.get_base_model().model(**batch, use_cache=False).last_hidden_state.sum().backward()
    yield


WAYS = {
    "the backbone alone": backbone_alone,
    "tokensel, adapters off": adapters_off,
    "tokensel, a frozen copy": frozen_copy,
    "as published": published,
}


def peaks_of(way: str, shape: tuple[int, int], cache: Path) -> dict[str, float]:
    """MiB: before a step (model, adapters, history), what one step needs above that, and the process at its peak."""
    steps = WAYS[way](shape, cache)
    next(steps)
    extra = peak_extra_mib(lambda: next(steps), CPU)[0]
    return {"extra": round(extra), "process": round(peak_memory_mib("cpu"))}


def table(results: dict) -> str:
    """A row for each way, and the size of one model's logits; below it where it was measured."""
    head = [f"{rows} × {tokens} tokens: {what}" for rows, tokens in SHAPES for what in ("step, MiB", "process, MiB")]
    lines = ["| | " + " | ".join(head) + " |", "| --- |" + " --: |" * len(head)]
    for way, peaks in results["peaks"].items():
        cells = [f"{peaks[f'{rows}x{tokens}'][key]:,}" for rows, tokens in SHAPES for key in ("extra", "process")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    logits = [cell for rows, tokens in SHAPES for cell in (f"{rows * tokens * VOCABULARY * 4 >> 20:,}", "")]
    lines.append(f"| logits of one model, float32 | {' | '.join(logits)} |")
    m = results["machine"]
    where = f"{m['cpu']}, PyTorch {m['torch']}, transformers {m['transformers']}, commit {m['commit'][:10]}"
    return "\n".join([*lines, "", f"`python -m benchmarks.speed.large_vocabulary` on {where}."])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for large_vocabulary.json")
    parser.add_argument("--cache", type=Path, default=Path("demo/models"), help="folder of pretrained models")
    options = parser.parse_args(argv)
    path = options.output / "large_vocabulary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = resume(path, {}) or {"machine": machine(CPU), "peaks": {way: {} for way in WAYS}}
    missing = [(way, shape) for way in WAYS for shape in SHAPES if "{}x{}".format(*shape) not in results["peaks"][way]]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for way, shape in tqdm(missing, unit="step"):
            results["peaks"][way]["{}x{}".format(*shape)] = fresh.apply(peaks_of, (way, shape, options.cache))
            write(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
