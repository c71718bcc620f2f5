"""`tokensel select` over a hundred million tokens: its time and its memory, against the number of tokens.

    python -m benchmarks.speed.selection

Made losses of documents of 16 to 500 tokens, three quarters of them response tokens, in a store for a base model and
one for a reference, one file or a directory of files; method token_cleaning over the whole dataset, rho 0.6. Each run
is a process of its own. Writes benchmarks/results/selection.json after each; `python -m tools.write_docs` shows it in
the docs. Started again on the same machine and commit it measures what is missing there. Needs 2 GB of disk.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from tqdm.auto import tqdm

from benchmarks.machine import machine, short_commit
from benchmarks.resume import RESULTS, attempt, filled, in_new_process, measured

TOKENS = (1_000_000, 10_000_000, 100_000_000)
FORMS = {"a file": ".parquet", "a directory": ""}  # what the stores' names end in


def make_stores(folder: Path, tokens: int, suffix: str) -> dict[str, Path]:
    """The stores of both models, of the same documents."""
    from tokensel.store import HistoryWriter

    files = {name: folder / f"{name}{suffix}" for name in ("base", "reference")}
    for seed, (name, path) in enumerate(files.items()):
        lengths_of, losses = numpy.random.default_rng(0), numpy.random.default_rng(seed + 1)
        left, key = tokens, 0
        with HistoryWriter(path, model=name) as writer:
            while left > 0:
                length = min(int(lengths_of.integers(16, 501)), left)
                values = losses.standard_exponential(length, numpy.float32)
                values[: length // 4] = numpy.nan
                writer.append(key, values)
                left, key = left - length, key + 1
    return files


def run(tokens: int, form: str, folder: Path) -> dict[str, float]:
    """Seconds and peak MiB of one selection in this process, whose memory before it counts as well."""
    from tokensel.cli import main
    from tokensel.metrics import peak_memory_mib

    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        files = in_new_process(make_stores, place, tokens, FORMS[form])
        assert isinstance(files, dict) and "failed" not in files, files
        recorded = ",".join(f"{name}={path}" for name, path in files.items())
        arguments = ["select", "--method", "token_cleaning", "--method_args", "rho=0.6", "--recorded", recorded]
        before, started = peak_memory_mib("cpu"), time.perf_counter()
        assert main([*arguments, "--output", str(place / f"weights{FORMS[form]}")]) == 0
        return {"seconds": time.perf_counter() - started, "mib": peak_memory_mib("cpu"), "mib_before": before}
    finally:
        shutil.rmtree(place)


def measure(results: dict, folder: Path, save: Callable[[], None]) -> None:
    """Fills in the runs that the results lack."""
    for form in FORMS:
        there = results["runs"].setdefault(form, {})
        for tokens in tqdm([n for n in TOKENS if not measured(there.get(str(n)))], desc=form, unit="run"):
            there[str(tokens)] = in_new_process(attempt, run, tokens, form, folder)
            save()


def table(results: dict) -> str:
    """Seconds and peak memory by the number of tokens; below it where it was measured, and what failed."""
    lines = ["| | " + " | ".join(f"{n:,} tokens" for n in TOKENS) + " |", "| --- |" + " --: |" * len(TOKENS)]
    notes = []
    for form in FORMS:
        cells = []
        for tokens in map(str, TOKENS):
            found = results["runs"].get(form, {}).get(tokens)
            if measured(found):
                cells.append(f"{found['seconds']:.1f} s, {found['mib']:,.0f} MiB")
            else:
                cells.append("not measured" if found is None else "failed")
                notes += [] if found is None else [f"- failed: {form}, {tokens}: {found['failed']}"]
        lines.append(f"| stores are {form} | {' | '.join(cells)} |")
    m = results["machine"]
    where = f"{m['cpu']}, {m['cores']} cores, PyTorch {m['torch']}, commit {short_commit(m['commit'])}"
    return "\n".join([*lines, "", *notes, *[""] * bool(notes), f"`python -m benchmarks.speed.selection` on {where}."])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for selection.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where stores are made")
    parser.add_argument("--fresh", action="store_true", help="measure again what selection.json already has")
    options = parser.parse_args(argv)
    results = filled(
        parser,
        options.output / "selection.json",
        {"runs": {}},
        {"machine": machine(torch.device("cpu"))},
        lambda found: isinstance(found.get("runs"), dict),
        lambda results, save: measure(results, options.folder, save),
        options.fresh,
    )
    print(table(results))


if __name__ == "__main__":
    main()
