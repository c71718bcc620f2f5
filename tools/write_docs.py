"""Writes every generated part of README and docs: python -m tools.write_docs [--check]

What stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, and the pictures of results, are made from the code
and from the committed results (benchmarks/results/*.json; quickstart.json is `make quickstart`'s results.json).
`--check` writes nothing, names what differs and exits with 1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import textwrap
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.quality.tables import SHORT_TABLES
from benchmarks.resume import RESULTS, digest
from benchmarks.speed import large_vocabulary, long_rows, selection, smollm2, tables
from benchmarks.speed.cases import Case
from benchmarks.speed.plots import PICTURES
from benchmarks.speed.results import Results, load, machine_line

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def read_if_measured(name: str) -> dict | None:
    """None where there are no results yet."""
    return read(name) if (RESULTS / f"{name}.json").exists() else None


@functools.cache
def speed_results() -> dict[str, Results]:
    """By machine, what is committed: cpu.json and a file of each GPU."""
    return load(sorted(RESULTS.glob("[cg]pu*.json")))


# The parts.


def quickstart() -> str:
    """The quickstart's table, and what it says of each method."""
    from tokensel.comparison import verdict

    results = read("quickstart")
    rows = results["table"]
    notes = {"sstoken": ", as published", "history_excess": ", REL with the sign reversed"}
    best = min(rows, key=lambda row: row["held-out clean NLL"])
    base = {"method": "base, before fine-tuning", "held-out clean NLL (nats)": f"{results['base_nll']:.3f}"}
    lines = [base | {"planted noise kept": "", "tokens kept": ""}]
    for row in rows:
        nll = f"{row['held-out clean NLL']:.3f}"
        lines.append(
            {
                "method": f"`{row['method']}`{notes.get(row['method'], '')}",
                "held-out clean NLL (nats)": f"**{nll}**" if row is best else nll,
                "planted noise kept": row["noise kept"].replace("%", " %"),
                "tokens kept": row["tokens kept"].replace("%", " %"),
            }
        )
    return "\n".join([tables.markdown(lines), "", *(f"- {line}" for line in verdict(rows))])


def step() -> str:
    """The selection step on a CPU, with the columns that a first page needs."""
    results = next(of_machine for key, of_machine in speed_results().items() if key.startswith("cpu"))
    return "\n\n".join(
        [
            *tables.step(results, without=("/ ours", "error of the loss", "of the gradients")),
            f"`make bench` on {machine_line(results)}.",
        ]
    )


def speed(device: str) -> str:
    return tables.page(
        speed_results(), device, lambda key: "\n".join(f"![{alt}]({key}_{name}.svg)" for name, alt in PICTURES.items())
    )


def quality(study: str) -> str:
    """Of the model that is made here, what the docs show."""
    return SHORT_TABLES[study](read(f"quality.{study}"))


def real(model: str | None = None) -> str:
    """Of a pretrained model, with its picture; SmolLM2 without a name."""
    from benchmarks.quality.real_tables import real_table

    results = read_if_measured("quality.real" + (f".{model}" if model else ""))
    if results is None:
        return "not measured"
    curves = "Held-out loss over the response tokens seen, by kind of rows"
    return real_table(results) + (f"\n\n![{curves}](real.svg)" if model is None else "")


def first_real() -> str:
    """What the first page shows of it."""
    from benchmarks.quality.real_tables import first_table

    results = read_if_measured("quality.real")
    return "not measured" if results is None else first_table(results)


def signals() -> str:
    """What each signal sees of the noise, with its picture."""
    from benchmarks.quality.signals import signals_table

    if (results := read_if_measured("quality.signals")) is None:
        return "not measured"
    seen = "Distributions of signals over noise and clean tokens, and their ROC areas over the steps"
    return f"{signals_table(results)}\n\n![{seen}](signals.png)"


def rows_of_any_length() -> str:
    return long_rows.table(read("long_rows"))


def step_of_a_large_vocabulary() -> str:
    return large_vocabulary.table(read("large_vocabulary"))


def a_real_model() -> str:
    results = read_if_measured("smollm2")
    return "not measured" if results is None else smollm2.tables(results)


def selection_by_tokens() -> str:
    results = read_if_measured("selection")
    return "not measured" if results is None else selection.table(results)


def a_long_row_on_a_gpu() -> str:
    return tables.arithmetic(Case("step", "training_step", "Llama-3.1-8B", 131072))


def architectures() -> str:
    """Which models are tested, and which are refused or have no attention to measure."""
    from tests.architectures import NO_ATTENTION, REFUSED, supported

    names = supported()
    head = f"{len(names)} architectures are tested with every signal (`model_type`; of a vision model, its text):"
    lines = textwrap.wrap(", ".join(names), 118, break_on_hyphens=False)
    table = ["", "| `model_type` | selected by | because they |", "| --- | --- | --- |"]
    for how, groups in (("methods without attention", NO_ATTENTION), ("none: refused", REFUSED)):
        table += [f"| {', '.join(sorted(rows))} | {how} | {why} |" for why, (_, rows) in groups.items()]
    return "\n".join([head, *lines, *table])


def files() -> str:
    """The files that are read, and how an error names the place of a row in them."""
    from tests.data_tried import FILES, MANY

    lines = ["| `dataset_name` | what is read | a row's place in errors |", "| --- | --- | --- |"]
    lines += [f"| `{file.name}` | {file.about} | `{file.place}` |" for file in FILES]
    return "\n".join(lines + [f"| {many.name} | {many.about} | its file's |" for many in MANY])


def layouts() -> str:
    """A row of each layout, and its tokens."""
    from tests.data_tried import LAYOUTS
    from tokensel.data.layouts import LAYOUTS as KNOWN

    lines = ["| layout | what it is | a row | its tokens, **response tokens** |", "| --- | --- | --- | --- |"]
    for tried in LAYOUTS:
        groups = itertools.groupby(
            zip(tried.tokens.split(" "), tried.labels.split(" "), strict=True), lambda pair: pair[1] == "."
        )
        parts = [(" ".join(token for token, _ in pairs).replace("\n", "\\n"), prompt) for prompt, pairs in groups]
        tokens = " ".join(f"`{text}`" if prompt else f"**`{text}`**" for text, prompt in parts)
        name = f"| {tried.layout} | {KNOWN[tried.layout].about} "
        name = "| | " if any(line.startswith(name) for line in lines) else name
        lines.append(f"{name}| `{json.dumps(tried.row)}` | {tokens} |")
    return "\n".join(lines)


def methods() -> str:
    import tokensel

    lines = ["| method | score and rule | scope | needs |", "| --- | --- | --- | --- |"]
    for row in tokensel.methods.describe():
        rule = row["score and rule"].rstrip(".")
        lines.append(f"| `{row['method']}` | {rule} | {row['scope']} | {row['needs']} |")
    return "\n".join(lines)


def chat_templates() -> str:
    """What the chat templates that TRL ships give."""
    from tests.chat_templates import table

    return table()


# What the first page shows of the estimates: kernels with one case, what they are, and what is wanted.
BACKWARD = ("logits_gradient", "hidden_gradient", "head_gradient")
MASS = "head size 128, group"
FIRST = [
    (("hidden_stats",), "two models", "losses of two models / their products", "1.1"),
    (("hidden_stats",), "two models, softcap", "the same with a softcap", None),
    (BACKWARD, "", "backward of kept rows / its three products", "1.1"),
    (("attention_mass",), f"{MASS} [47]", "attention mass / FlashAttention-2's forward", "0.6"),
    (("attention_mass",), f"{MASS} [47], lse given", "the same with its lse, 25 % prompt", "0.2"),
]


def _estimated() -> dict[str, list[dict]]:
    from tokensel_kernels.rates import ESTIMATES

    return json.loads(ESTIMATES.read_text(encoding="utf-8"))["sm_90"]["shapes"]


def first_estimates() -> str:
    """From the best model's low to the worst one's high, what is wanted, and that nothing is measured.

    Products of one size weigh alike.
    """
    lines = []
    for kernels, case, what, wanted in FIRST:
        lows, highs = [], []
        for rows in _estimated().values():
            alike = [r for r in rows if r["kernel"] in kernels and fnmatch(r["case"].partition(", ")[2], case)]
            if alike:
                lows.append(sum(row["low"] for row in alike) / len(kernels))
                highs.append(sum(row["high"] for row in alike) / len(kernels))
        lines.append(
            {
                "time of": what,
                "estimated for sm_90": f"{min(lows):.2f} to {max(highs):.2f}",
                "wanted": f"≤ {wanted}" if wanted else "",
                "measured": "not measured",
            }
        )
    return tables.markdown(lines)


def estimates() -> str:
    """All ratios of each model."""
    parts = []
    for shape, rows in _estimated().items():
        lines = [
            {
                "kernel": f"`{row['kernel']}`",
                "case": row["case"],
                "low": f"{row['low']:.3f}",
                "high": f"{row['high']:.3f}",
            }
            for row in rows
        ]
        parts += [f"{shape}, 8,192 rows, bfloat16, sm_90:", tables.markdown(lines)]
    return "\n\n".join(parts)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"real": first_real, "step": step, "estimates": first_estimates},
    "docs/start.md": {"quickstart": quickstart},
    "docs/kernels.md": {"estimates": estimates},
    "docs/benchmarks.md": {
        **{name: functools.partial(speed, device) for name, device in (("cpu", "cpu"), ("gpu", "cuda"))},
        "large_vocabulary": step_of_a_large_vocabulary,
        "smollm2": a_real_model,
        "long_context": a_long_row_on_a_gpu,
    },
    "docs/quality.md": {
        "real": real,
        "real gemma3": functools.partial(real, "gemma3"),
        "signals": signals,
        **{study: functools.partial(quality, study) for study in SHORT_TABLES},
        "long_rows": rows_of_any_length,
    },
    "docs/models.md": {"architectures": architectures},
    "docs/scale.md": {"selection": selection_by_tokens},
    "docs/methods.md": {"methods": methods},
    "docs/data.md": {"files": files, "layouts": layouts, "chat_templates": chat_templates},
}


def with_part(text: str, name: str, body: str) -> str:
    """The page with `body` between the part's markers.

    Raises:
        ValueError: a marker that is not there, or there twice; names it.
    """
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"needs one line {marker.strip()}, has {text.count(marker)}")
    before, _, rest = text.partition(begin)
    _, end, after = rest.partition(end)
    if not end:
        raise ValueError(f"has <!-- end: {name} --> before {begin.strip()}")
    return f"{before}{begin}\n{body}\n\n{end}{after}"


# The pictures: file -> the digest of what it shows, which is in its metadata.


def draw_speed(key: str) -> None:
    from benchmarks.speed import plots

    plots.write(speed_results()[key], DOCS)


def draw_feedback() -> None:
    from benchmarks.quality.plots import plot_feedback

    plot_feedback(read("quality.feedback"), DOCS / "feedback.png")


def draw_real() -> None:
    from benchmarks.quality.plots import plot_real

    plot_real(read("quality.real"), DOCS / "real.svg")


def draw_signals() -> None:
    from benchmarks.quality.signal_plots import plot_signals

    plot_signals(read("quality.signals"), DOCS / "signals.png")


def draw_long_rows() -> None:
    long_rows.plot(read("long_rows"), DOCS / "long_rows.png")


def pictures() -> list[tuple[list[str], str, Callable[[], None]]]:
    """(files, digest of what they show, how they are drawn)."""
    drawn: list[tuple[list[str], str, Callable[[], None]]] = [
        ([f"{key}_{name}.svg" for name in PICTURES], results.digest, functools.partial(draw_speed, key))
        for key, results in speed_results().items()
    ]
    others = (
        ("quality.feedback", "rows", "feedback.png", draw_feedback),
        ("quality.real", "rows", "real.svg", draw_real),
        ("quality.signals", "kinds", "signals.png", draw_signals),
        ("long_rows", "peak_mib", "long_rows.png", draw_long_rows),
    )
    for name, shown, picture, draw in others:
        if results := read_if_measured(name):
            drawn.append(([picture], digest(results[shown]), draw))
    return drawn


def shows(picture: Path, what: str) -> bool:
    return picture.exists() and what.encode() in picture.read_bytes()


def write_docs(*, check: bool = False) -> tuple[list[str], list[str]]:
    """Writes what differs, unless it is only checked: (what differed, what is wrong with pages)."""
    differing, wrong = [], []
    for page, parts in PAGES.items():
        path = ROOT / page
        if not path.exists():
            wrong.append(
                f"{page} is not there; it needs <!-- begin: NAME --> and <!-- end: NAME --> of: {', '.join(parts)}"
            )
            continue
        text = before = path.read_text(encoding="utf-8")
        for name, make in parts.items():
            try:
                changed = with_part(text, name, make())
            except ValueError as error:
                wrong.append(f"{page} {error}")
                continue
            if changed != text:
                differing.append(f"{page}: {name}")
            text = changed
        if text != before and not check:
            path.write_text(text, encoding="utf-8")
    for names, what, draw in pictures():
        if stale := [name for name in names if not shows(DOCS / name, what)]:
            differing += [f"docs/{name}" for name in stale]
            if not check:
                draw()
    return differing, wrong


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything differs")
    options = parser.parse_args(argv)
    differing, wrong = write_docs(check=options.check)
    for part in differing:
        print(f"{part} {'differs; run python -m tools.write_docs' if options.check else 'written'}")
    for problem in wrong:
        print(problem, file=sys.stderr)
    if wrong or (options.check and differing):
        sys.exit(1)


if __name__ == "__main__":
    main()
