"""SmolLM2-135M on a CPU, in float32: what `tokensel score` takes beside a bare forward, and a step on one long row.

    make .venv/.smollm2
    .venv/bin/python -m benchmarks.speed.smollm2

Scoring: chats of Python's docstrings, in batches by length and in the order of the data. All ways take turns over an
even sample of the batches. Long rows: one training step with all weights trained, ssToken with a recorded history,
beside the published way. Writes benchmarks/results/smollm2.json after every measurement, each of a process of its own;
`python -m tools.write_docs` shows it in the docs. Started again on the same machine and commit it measures what is
missing there.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from benchmarks.machine import machine
from benchmarks.resume import RESULTS, attempt, filled, in_new_process, measured
from benchmarks.speed.long_rows import published_loss, unless_out_of_memory
from benchmarks.speed.measure import peak_extra_mib
from benchmarks.speed.results import Results, machine_line
from benchmarks.speed.tables import markdown
from tokensel.recording import TOKENS_PER_BATCH, batches_of

SAMPLED = 3 * TOKENS_PER_BATCH  # tokens of the batches that are run, padding included
ENOUGH = 20.0  # seconds of steps on one row
LENGTHS = (1024, 2048, 4096, 8192)  # the last is all positions that the model has
WANTED = 0.9  # of the bare forward's tokens a second
CPU = torch.device("cpu")

# Name -> numbers of the documents of each batch.
BATCHES: dict[str, Callable[[numpy.ndarray], list[numpy.ndarray]]] = {
    f"by length, {TOKENS_PER_BATCH:,} tokens": lambda lengths: batches_of(lengths, TOKENS_PER_BATCH),
    "by length, 16 rows": lambda lengths: batches_of(lengths, TOKENS_PER_BATCH, 16),
    "in the order of the data, 16 rows": lambda lengths: numpy.split(
        numpy.arange(len(lengths)), range(16, len(lengths), 16)
    ),
}
SCORE, BARE, BACKBONE = "tokensel", "bare forward", "backbone alone"


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# Scoring.


def documents_of(tokenizer) -> list[numpy.ndarray]:
    """(length, 2) int32 of each chat, id and label of every token."""
    from tokensel.data import encode_rows
    from tokensel.testing import docstring_rows

    encoded, _ = encode_rows(docstring_rows(), tokenizer, max_length=LENGTHS[-1])
    return [numpy.array([row["input_ids"], row["labels"]], numpy.int32).T for row in encoded]


def sample_of(batches: list[numpy.ndarray], lengths: numpy.ndarray) -> tuple[list[numpy.ndarray], float]:
    """(every n-th batch, some `SAMPLED` tokens of them, share of all batches that is padding).

    Few rows alone would be padded by more than the same batches of all rows.
    """
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    n = max(round(padded / SAMPLED), 1)
    return batches[n // 2 :: n], 1 - int(lengths.sum()) / padded


def ways_of(patched, documents: list[numpy.ndarray]) -> dict[str, Callable[[], object]]:
    """Each way over one batch. Ours pads by itself; the others are given their tensors."""
    from tokensel.recording import response_losses

    model, losses = patched.model, response_losses(patched)  # without `selection` the patch passes everything through
    ids = [torch.from_numpy(document[:, 0].astype(numpy.int64)) for document in documents]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }  # (B, S)
    return {
        SCORE: lambda: losses(documents),
        BARE: lambda: model(**batch, use_cache=False).logits,
        BACKBONE: lambda: model.model(**batch, use_cache=False).last_hidden_state,
    }


@torch.no_grad()
def scoring(name: str, cache: Path) -> dict:
    """Seconds of every way over each batch of the sample, in turn, and its peak memory above the model, MiB."""
    from tokensel import apply_to
    from tokensel.testing import pretrained

    model, tokenizer = pretrained("smollm2", cache)
    patched, documents = apply_to(model, layer=None), documents_of(tokenizer)
    lengths = numpy.array([len(document) for document in documents])
    batches = BATCHES[name](lengths)
    sample, padding = sample_of(batches, lengths)
    runs = ways_of(patched, documents[:2])
    for run in runs.values():
        run()  # or the first way would pay for what is read and allocated once
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    peaks = dict.fromkeys(runs, 0.0)
    for turn, batch in enumerate(sample):
        runs = ways_of(patched, [documents[n] for n in batch])
        first = turn % len(runs)
        for way in [*runs, *runs][first : first + len(runs)]:  # none always comes first
            extra, took = peak_extra_mib(functools.partial(timed, runs[way]), CPU)
            seconds[way].append(took)
            peaks[way] = max(peaks[way], extra)
    responses = sum(int((document[:, 1] != -100).sum()) for document in documents)
    data = {"chats": len(documents), "tokens": int(lengths.sum()), "responses": responses}
    ran = {"batches": len(batches), "padding": padding, "tokens": int(lengths[numpy.concatenate(sample)].sum())}
    return {"data": data, **ran, "seconds": seconds, "peak_mib": peaks}


# One long row.


def row_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row [1, S] whose first quarter is prompt, with a recorded history."""
    labels = ids.clone()
    labels[:, : ids.shape[1] // 4] = -100
    return {"input_ids": ids, "labels": labels, "history_nll": torch.rand(ids.shape) * 20}


def ours(model) -> Callable[[dict], torch.Tensor]:
    from tokensel import Selection, apply_to, methods

    apply_to(model)
    return lambda row: model(**row, selection=Selection(methods.get("sstoken"))).loss


def published(model) -> Callable[[dict], torch.Tensor]:
    model.set_attn_implementation("eager")
    return lambda row: published_loss(model, row)


STEPS = {"tokensel": ours, "as published": published}


def step_of(way: str, length: int, cache: Path) -> dict | None:
    """Median seconds of a step, and its peak memory above model and row, MiB; None where the memory ran out."""
    from tokensel.testing import docstring_rows, pretrained

    model, tokenizer = pretrained("smollm2", cache)
    loss = STEPS[way](model.train())
    text = "\n".join(row["messages"][-1]["content"] for row in docstring_rows())
    ids = torch.tensor([tokenizer(text, truncation=True, max_length=length)["input_ids"]])
    assert ids.shape == (1, length)
    torch.manual_seed(0)
    row = row_of(ids)
    seconds: list[float] = []
    peaks: list[float] = []

    def step() -> float:
        return timed(lambda: loss(row).backward())

    # weights are mapped from their file, and would be read in the step that is measured
    loss(row_of(ids[:, :64])).backward()
    while sum(seconds) < ENOUGH:
        model.zero_grad()
        done = unless_out_of_memory(lambda: peak_extra_mib(step, CPU))
        if done is None:
            return None
        peaks.append(done[0])
        seconds.append(done[1])
    return {"seconds": statistics.median(seconds), "peak_mib": max(peaks)}


# All of it.


def unpack(cache: Path) -> None:
    """Makes the model's folder, which takes more memory than a step."""
    from tokensel.testing import pretrained

    pretrained("smollm2", cache)


def lacking(results: dict) -> Iterator[tuple[dict, str, Callable, tuple]]:
    """(where it goes, under which name, function, arguments) of every measurement that is not there, or failed."""
    for name in BATCHES:
        if not measured(results["scoring"].get(name)):
            yield results["scoring"], name, scoring, (name,)
    for way in STEPS:
        there = results["steps"].setdefault(way, {})
        for length in LENGTHS:
            # None is a result: the memory ran out
            if str(length) not in there or "failed" in (there[str(length)] or {}):
                yield there, str(length), step_of, (way, length)


def measure(results: dict, cache: Path, save: Callable[[], None]) -> None:
    """Fills in what the results lack, each measurement of a process of its own.

    Raises:
        ValueError, OSError, ModuleNotFoundError: there is no model.
    """
    if not (missing := list(lacking(results))):
        return
    results["load"] = max(results.get("load", 0.0), os.getloadavg()[0])  # before there is any of our own
    if isinstance(made := in_new_process(unpack, cache), dict):
        raise ValueError(f"the model could not be unpacked: {made['failed']}")
    for there, name, function, arguments in tqdm(missing, unit="measurement"):
        there[name] = in_new_process(attempt, function, *arguments, cache)
        save()


def share(run: dict) -> float:
    """Of the bare forward's tokens a second: the median over the batches."""
    pairs = zip(run["seconds"][BARE], run["seconds"][SCORE], strict=True)
    return statistics.median(bare / score for bare, score in pairs)


def scoring_row(name: str, run: dict | None) -> dict:
    lacks = "not measured" if run is None else "failed"
    cells = {"run": lacks, "padding": lacks} | {f"{way}, tokens/s": lacks for way in (SCORE, BARE, BACKBONE)}
    cells |= {"of the bare forward": lacks, "in total": lacks, f"wanted ≥ {WANTED:g}": ""}
    cells |= {f"{way}, MiB": lacks for way in (SCORE, BARE, BACKBONE)}
    if run is not None and "failed" not in run:
        total = {way: sum(seconds) for way, seconds in run["seconds"].items()}
        cells["run"] = f"{len(run['seconds'][SCORE])} of {run['batches']}"
        cells["padding"] = f"{run['padding']:.1%}".replace("%", " %")
        cells |= {f"{way}, tokens/s": f"{run['tokens'] / seconds:,.0f}" for way, seconds in total.items()}
        cells |= {"of the bare forward": f"{share(run):.2f}", "in total": f"{total[BARE] / total[SCORE]:.2f}"}
        cells[f"wanted ≥ {WANTED:g}"] = "met" if share(run) >= WANTED else "**not met**"
        cells |= {f"{way}, MiB": f"{peak:,.0f}" for way, peak in run["peak_mib"].items()}
    return {"batches": name} | cells


def step_row(way: str, what: str, form: str, steps: dict) -> dict:
    """Of a way, seconds or MiB by length."""
    cells: dict[str, str] = {}
    for length in LENGTHS:
        if (name := str(length)) not in steps:
            cells[f"{length:,}"] = "not measured"
        elif steps[name] is None:
            cells[f"{length:,}"] = "out of memory"
        else:
            cells[f"{length:,}"] = "failed" if "failed" in steps[name] else format(steps[name][what], form)
    return {"tokens of the row": f"{way}, {'s' if what == 'seconds' else 'MiB'}"} | cells


def failures(results: dict) -> list[str]:
    """What failed, and why."""
    runs = dict(results["scoring"])
    for way, steps in results["steps"].items():
        runs |= {f"{way}, {length} tokens": run for length, run in steps.items()}
    return [f"- failed: {name}: {run['failed']}" for name, run in runs.items() if run and "failed" in run]


def tables(results: dict) -> str:
    """Scoring, long rows, what failed, and where it was measured."""
    scored, steps = results["scoring"], results["steps"]
    parts = ["Scoring:"]
    if data := next((run["data"] for run in scored.values() if measured(run)), None):
        share_of_responses = f"{data['responses'] / data['tokens']:.0%}".replace("%", " %")
        chats = f"{data['chats']:,} chats, {data['tokens']:,} tokens"
        parts = [f"Scoring {chats}, {share_of_responses} of them response tokens:"]
    parts.append(markdown([scoring_row(name, scored.get(name)) for name in BATCHES]))
    measures = (("seconds", ".1f"), ("peak_mib", ",.0f"))
    rows = [step_row(way, what, form, steps.get(way, {})) for what, form in measures for way in STEPS]
    parts += ["A training step on one row:", markdown(rows)]
    if failed := failures(results):
        parts.append("\n".join(failed))
    where = machine_line(Results(results["machine"], [], results["load"], RESULTS))
    parts.append(f"`python -m benchmarks.speed.smollm2` on {where}.")
    return "\n\n".join(parts)


def _has_form(results: dict) -> bool:
    """Whether there is a measurement, or None, under every name."""
    groups = [results.get("scoring"), *(of.values() if isinstance(of := results.get("steps"), dict) else [None])]
    if "load" not in results or not all(isinstance(group, dict) for group in groups):
        return False
    runs = [run for group in groups for run in group.values() if run is not None]
    return all(isinstance(run, dict) and bool({"failed", "seconds"} & run.keys()) for run in runs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for smollm2.json")
    parser.add_argument("--cache", type=Path, default=Path("demo/models"), help="folder of pretrained models")
    parser.add_argument("--fresh", action="store_true", help="measure again what smollm2.json already has")
    options = parser.parse_args(argv)
    results = filled(
        parser,
        options.output / "smollm2.json",
        {"scoring": {}, "steps": {}},
        {"machine": machine(CPU), "sampled": SAMPLED},
        _has_form,
        lambda results, save: measure(results, options.cache, save),
        options.fresh,
    )
    print(tables(results))


if __name__ == "__main__":
    main()
