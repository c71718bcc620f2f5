"""One training step of Gemma 3 270M, whose vocabulary is 262,144: the process at its peak, beside the published way.

    make .venv/.study
    .venv/bin/python -m benchmarks.speed.large_vocabulary

ssToken with LoRA adapters (r 16) on all linear layers, in float32; the history is the model without its adapters, or a
frozen copy. The published way holds the logits of both models, and all attention. Writes
benchmarks/results/large_vocabulary.json after every step; `python -m tools.write_docs` shows it in the docs. Started
again on the same machine and commit it measures what is missing there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.machine import machine, short_commit
from benchmarks.resume import RESULTS, attempt, filled, in_new_process, measured
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


def unpack(cache: Path) -> None:
    """Makes the model's folder, which takes more memory than a step."""
    from tokensel.testing import pretrained

    pretrained("gemma3", cache)


def lacking(results: dict) -> list[tuple[str, tuple[int, int]]]:
    peaks = results["peak_mib"]
    return [(way, shape) for way in WAYS for shape in SHAPES if not measured(peaks.get(way, {}).get(_name(shape)))]


def measure(results: dict, cache: Path, save: Callable[[], None]) -> None:
    """Fills in the peaks that the results lack, each of a process of its own.

    Raises:
        ValueError, OSError, ModuleNotFoundError: there is no model.
    """
    if not (missing := lacking(results)):
        return
    if not measured(made := in_new_process(unpack, cache) or ()):
        raise ValueError(f"the model could not be unpacked: {made['failed']}")
    for way, shape in tqdm(missing, unit="step"):
        peak = in_new_process(attempt, peak_of, way, shape, cache)
        results["peak_mib"].setdefault(way, {})[_name(shape)] = peak
        save()


def table(results: dict) -> str:
    """A row for each way, and the size of one model's logits; below it where it was measured, and what failed."""
    lines = ["| | " + " | ".join(f"{rows} × {tokens} tokens, MiB" for rows, tokens in SHAPES) + " |"]
    lines.append("| --- |" + " --: |" * len(SHAPES))
    notes = []
    for way in WAYS:
        cells = []
        for shape in map(_name, SHAPES):
            peak = results["peak_mib"].get(way, {}).get(shape)
            if isinstance(peak, dict):
                notes.append(f"- failed: {way}, {shape}: {peak['failed']}")
            cells.append(f"{peak:,}" if isinstance(peak, int) else "failed" if peak else "not measured")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    logits = [f"{rows * tokens * VOCABULARY * 4 >> 20:,}" for rows, tokens in SHAPES]
    lines.append(f"| (logits of one model, float32) | {' | '.join(logits)} |")
    m = results["machine"]
    where = f"{m['cpu']}, PyTorch {m['torch']}, transformers {m['transformers']}, commit {short_commit(m['commit'])}"
    notes += [""] * bool(notes)
    return "\n".join([*lines, "", *notes, f"`python -m benchmarks.speed.large_vocabulary` on {where}."])


def _name(shape: tuple[int, int]) -> str:
    return "{}x{}".format(*shape)


def _has_form(results: dict) -> bool:
    """Whether there are peaks by way and shape."""
    peaks = results.get("peak_mib")
    if not isinstance(peaks, dict) or not all(isinstance(of_way, dict) for of_way in peaks.values()):
        return False
    values = [peak for of_way in peaks.values() for peak in of_way.values()]
    return all(isinstance(peak, int) or isinstance(peak, dict) and "failed" in peak for peak in values)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for large_vocabulary.json")
    parser.add_argument("--cache", type=Path, default=Path("demo/models"), help="folder of pretrained models")
    parser.add_argument("--fresh", action="store_true", help="measure again what large_vocabulary.json already has")
    options = parser.parse_args(argv)
    results = filled(
        parser,
        options.output / "large_vocabulary.json",
        {"peak_mib": {}},
        {"machine": machine(CPU)},
        _has_form,
        lambda results, save: measure(results, options.cache, save),
        options.fresh,
    )
    print(table(results))


if __name__ == "__main__":
    main()
