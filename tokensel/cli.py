"""The commands: each parses its settings and calls the function that does the work."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import tokensel

DESCRIPTION = f"""tokensel {tokensel.__version__}: token-level data selection for LLM fine-tuning

  tokensel score CONFIG.yaml [--flag value ...]   record each response token's loss under a model, once
  tokensel select CONFIG.yaml [--flag value ...]  rank all tokens of a dataset by recorded losses, without a model
  tokensel train CONFIG.yaml [--flag value ...]   fine-tune on the tokens that a method keeps
  tokensel score --help | select --help | ...     every setting, in YAML and as a flag
  tokensel methods [NAME]                         list the methods, or explain one and its parameters
  tokensel report RUN [RUN ...]                   draw which tokens a run kept, and why, as a page
  tokensel kernels --arch CHIP [--shape MODEL]    compile all kernels for a chip, present or not, and estimate
  tokensel tune --output FILE                     time other tiles on this GPU; TOKENSEL_TILES=FILE takes the fastest
  tokensel --version

A first run on your own data, files (JSON, CSV, Parquet) of {{"prompt": ..., "completion": ...}},
{{"question": ..., "answer": ...}}, chats {{"messages": [...]}}, {{"text": ...}}, or rows of Alpaca, ShareGPT or TRL:

  tokensel score --model_name_or_path MODEL --dataset_name data.jsonl --output history.parquet
  tokensel train --model_name_or_path MODEL --dataset_name data.jsonl --use_peft true \\
      --method sstoken --method_args gamma=0.5,rho=0.6 --history recorded --history_store history.parquet \\
      --output_dir run

`score` and `select` go on where they were killed when the same command is run again: what is done stays in
OUTPUT.partial until the output is complete. To select over the whole dataset, once, before training:

  tokensel score --model_name_or_path BASE --dataset_name data.jsonl --output base.parquet
  tokensel score --model_name_or_path REFERENCE --dataset_name data.jsonl --output reference.parquet
  tokensel select --method token_cleaning --method_args rho=0.6 \\
      --recorded base=base.parquet,reference=reference.parquet --output selected.parquet
  tokensel train --model_name_or_path BASE --dataset_name data.jsonl --method weighted \\
      --weights_store selected.parquet --output_dir run

Messages, rows and tokens may carry weights (`"weight"`, `"token_weights"`), negative ones too: --method weighted.
With LoRA no recording is needed: --history adapter_off takes the model without its adapters as the history.
Settings may stand in a YAML file; flags win over it. Compare with --method random at the same rho before you
believe in a gain.
"""

ABOUT = {  # above the lists of settings, which are long
    "tokensel score": "Records the loss of every response token under a model, once: the history of `tokensel train "
    "--history recorded`. Needs --model_name_or_path, --dataset_name and --output. Run again, it goes on where it was "
    "killed.",
    "tokensel select": "Ranks all tokens of a dataset by recorded losses, without a model, and writes weights for "
    "`tokensel train --weights_store`. Needs --method, --recorded and --output. Run again, it goes on where it was "
    "killed.",
    "tokensel train": "Fine-tunes on the response tokens that a method keeps. Needs --model_name_or_path, "
    "--dataset_name, --output_dir and --method. The settings of the selection (--method to --impl) stand last; the "
    "many before them are transformers.TrainingArguments. `tokensel --help` shows a first run.",
}


def score(argv: list[str]) -> None:
    from tokensel.offline import score
    from tokensel.settings import ScoreArguments, parse

    required = ("model_name_or_path", "dataset_name", "output")
    score(*parse([ScoreArguments], argv, "tokensel score", ABOUT["tokensel score"], required))


def select(argv: list[str]) -> None:
    from tokensel.offline import select
    from tokensel.settings import SelectArguments, parse

    required = ("method", "recorded", "output")
    select(*parse([SelectArguments], argv, "tokensel select", ABOUT["tokensel select"], required))


def train(argv: list[str]) -> None:
    from tokensel.arguments import SelectiveTrainingArguments
    from tokensel.finetune import train
    from tokensel.settings import RunArguments, parse

    types = [RunArguments, SelectiveTrainingArguments]
    required = ("model_name_or_path", "dataset_name", "output_dir", "method")
    train(*parse(types, argv, "tokensel train", ABOUT["tokensel train"], required))


def methods(argv: list[str]) -> None:
    """Lists the methods, or explains one: its formula and its parameters."""
    from tokensel.report import format_table

    parser = argparse.ArgumentParser(prog="tokensel methods", description=inspect.getdoc(methods))
    parser.add_argument("name", nargs="?", metavar="NAME", help="a method to explain")
    given, more = parser.parse_known_args(argv)
    if more:
        raise ValueError(f"`tokensel methods` takes one name at most; got {' '.join(argv)}")
    rows = tokensel.methods.describe()
    if given.name is None:
        columns = ("method", "scope", "needs", "score and rule")
        print(format_table([{c: row[c] for c in columns} for row in rows], left=columns))
        print("\n`tokensel methods NAME` explains one; set them with --method NAME --method_args rho=0.6")
        print("Which one? `full`, unless some tokens may be random: then `clean_posterior`. docs/quality.md says why")
        return
    formula = inspect.getdoc(tokensel.methods.builder(given.name))  # refuses an unknown name
    (row,) = (row for row in rows if row["method"] == given.name)
    print(f"{given.name}: {formula}\n")
    print(f"parameters: {row['parameters']}\nscope: {row['scope']}\nneeds: {row['needs']}")


def report(argv: list[str]) -> None:
    """Draws runs that were trained with --record_samples as one self-contained page."""
    from tokensel.report import write_selection_page
    from tokensel.report.watch import load_run

    parser = argparse.ArgumentParser(prog="tokensel report", description=inspect.getdoc(report))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a training")
    parser.add_argument("--output", type=Path, help="HTML file to write; default: selection.html in the first run")
    given = parser.parse_args(argv)
    page = given.output or given.runs[0] / "selection.html"
    write_selection_page(page, [load_run(run) for run in given.runs], title="Which tokens were kept, and why")
    print(f"{_printable(str(page))}: {len(given.runs)} runs")


def kernels(argv: list[str]) -> None:
    """Compiles what the Triton kernels would launch on a chip, present or not, counts the machine code, estimates."""
    from tqdm.auto import tqdm

    from tokensel.ops.checks import AUTO_RULE
    from tokensel.report import format_table
    from tokensel_kernels import compiled, rates, roofline
    from tokensel_kernels.shapes import SHAPES, shape_named

    parser = argparse.ArgumentParser(prog="tokensel kernels", description=inspect.getdoc(kernels))
    parser.add_argument("--arch", required=True, help="sm_80, sm_90, sm_100 or gfx942")
    models = f"the model: {', '.join(SHAPES)} (default: %(default)s)"
    parser.add_argument("--shape", default="Llama-3.1-8B", help=models)
    parser.add_argument("--every", action="store_true", help="every combination of options and head size: minutes")
    parser.add_argument("--json", type=Path, help="also write all that is known of each kernel to this file")
    given = parser.parse_args(argv)
    shape = shape_named(given.shape)
    if given.json and not given.json.parent.is_dir():
        raise ValueError(f"json {given.json} is in a folder that is not there; make it, or choose another")
    found = compiled.compile_all(given.arch, given.shape, every=given.every)
    rows = list(tqdm(found, desc=f"compile for {given.arch}", unit="kernel"))
    if given.json:
        given.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print(format_table([compiled.as_row(row) for row in rows]))
    if estimated := [compiled.as_estimate(row) for row in rows if row.estimate]:
        print(
            f"\nClocks of a tile, estimated from the machine code for {compiled.ROWS:,} rows of {given.shape}, and the "
            "ratio to products at full rate, to bytes (logits) or to FlashAttention-2's forward (mass). Not measured:"
        )
        print(format_table(estimated))
    calls = roofline.estimates(compiled.ROWS, shape.vocabulary, shape.hidden)
    for length in (compiled.ROWS, 131072):
        calls += roofline.attention_estimates(length, shape.heads, shape.key_heads, shape.head_size)
    print("\nWhat the calls compute and move, and the least time that takes:")
    print(format_table([roofline.as_row(call) for call in calls]))
    print(f'\nimpl="auto" is: {AUTO_RULE}.')
    for work in rates.WORKS:
        chosen, why = rates.choose(f"any {given.arch}", given.arch, work)
        print(f"On {given.arch}, {work}: {chosen} ({why})")


def tune(argv: list[str]) -> None:
    """Times tiles around the known-good ones on the GPU at hand, and writes the fastest to a file.

    TOKENSEL_TILES=FILE makes the kernels take them. Some minutes.
    """
    import torch

    parser = argparse.ArgumentParser(prog="tokensel tune", description=inspect.getdoc(tune))
    parser.add_argument("--output", required=True, type=Path, help="file to write; must not exist yet")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size")
    parser.add_argument("--sequence", type=int, default=8192, help="length that attention mass is timed at")
    given = parser.parse_args(argv)
    if given.output.exists():
        raise ValueError(f"output {given.output} exists; move it away or choose another name")
    if not torch.cuda.is_available():
        raise ValueError(
            "tokensel tune times kernels on the GPU at hand, and PyTorch finds none; the tiles that are shipped need "
            "no tuning (tokensel kernels --arch CHIP reports them)"
        )
    from tokensel_kernels import tiles
    from tokensel_kernels import tune as timing

    if tiles.interpreting():
        raise ValueError("kernels are interpreted, not timed, under TRITON_INTERPRET=1; unset it")
    dtype, device = getattr(torch, given.dtype), torch.device("cuda", torch.cuda.current_device())
    calls = timing.calls(given.rows, given.vocabulary, given.hidden, given.sequence, dtype, device)
    fastest = timing.tune(calls, tiles.chip_family(device)[0], dtype.itemsize)
    tiles.write_tiles(given.output, fastest)
    print(f"{given.output}: use it with TOKENSEL_TILES={given.output}")


def _printable(text: str) -> str:
    """What no terminal may be given escaped: controls and lone bytes, as anybody's file names may have them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    function.__name__: function for function in (score, select, train, methods, report, kernels, tune)
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `tokensel` command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(DESCRIPTION)
        return 0
    if argv[0] == "--version":
        print(f"tokensel {tokensel.__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown command {name!r}{hint} There are {', '.join(COMMANDS)} (tokensel --help)")
        COMMANDS[name](rest)
    except KeyboardInterrupt:
        resume = "--resume_from_checkpoint last goes on" if name == "train" else "the same command goes on"
        print(f"\ntokensel: stopped; {resume}, if there is anything to go on from", file=sys.stderr)
        return 130
    except (ValueError, LookupError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("TOKENSEL_TRACEBACK"):
            raise
        if getattr(error, "is_told", False):  # by another rank
            return 2
        print(f"tokensel: error: {_printable(str(error))}\n(set TOKENSEL_TRACEBACK=1 to see where)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
