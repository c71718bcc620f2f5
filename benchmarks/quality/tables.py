"""The tables of the studies, from their results."""

from __future__ import annotations

import statistics

from benchmarks.resume import measured


def all_runs(results: dict) -> dict[str, dict | None]:
    """Every run by its name; None where there is none yet."""
    runs = {}
    for label, row in results["rows"].items():
        for column, of_seeds in {"": row["runs"]}.items() if "runs" in row else row.items():
            runs |= {" ".join(filter(None, (label, column, f"seed {s}"))): run for s, run in enumerate(of_seeds)}
    return runs


def has_form(results: dict) -> bool:
    """Whether results are those of a study: of whatever they have, objects and lists are where the studies put them."""
    types = {"study": str, "rows": dict, "kinds": dict, "bases": dict, "answers": dict, "machines": list}
    types |= {"minutes": int | float}
    if "study" not in results or any(not isinstance(results[name], types[name]) for name in types.keys() & results):
        return False
    rows = results.get("rows", {}).values()
    if not all(isinstance(row, dict) for row in rows):
        return False
    lists = [of_seeds for row in rows for of_seeds in ([row["runs"]] if "runs" in row else row.values())]
    if not all(isinstance(of_seeds, list) for of_seeds in lists):
        return False
    runs = [run for of_seeds in lists for run in of_seeds]
    for name in ("kinds", "bases", "answers"):
        runs += results.get(name, {}).values()
    return all(run is None or isinstance(run, dict) for run in runs)


def spread(values: list[float | None], digits: int = 3) -> str:
    """mean ± half the range over the seeds; the value of one alone; `-` where nothing was measured."""
    real = [v for v in values if v is not None]
    if not real:
        return "-"
    mean, half = round(statistics.mean(real), digits) + 0.0, (max(real) - min(real)) / 2  # + 0.0: no -0.000
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(real) > 1 else "")


def percent(values: list[float | None]) -> str:
    real = [v for v in values if v is not None]
    return f"{100 * statistics.mean(real):.0f} %" if real else "-"


def of(runs: list[dict], name: str) -> list[float]:
    return [run[name] for run in runs if measured(run) and name in run]


def differences(runs: list[dict | None], others: list[dict | None], name: str = "nll") -> list[float]:
    """A value minus the other's, of every seed that has both, in one world."""
    pairs = [(run, other) for run, other in zip(runs, others, strict=False) if measured(run) and measured(other)]
    return [run[name] - other[name] for run, other in pairs if run.get("world") == other.get("world")]


def cell(runs: list[dict | None], text: str) -> str:
    """A text made of the runs that there are, with how many failed."""
    failed = sum(run is not None and not measured(run) for run in runs)
    if not any(map(measured, runs)):
        return "failed" if failed else "not measured"
    return f"{text} ({failed} of {len(runs)} failed)" if failed else text


def with_notes(lines: list[str], results: dict) -> str:
    """A table, and below it what its reader has to know: runs that are not there yet, or failed."""
    runs = all_runs(results)
    notes = [f"- failed: {name}: {run['failed']}" for name, run in runs.items() if run and not measured(run)]
    if (done := sum(run is not None for run in runs.values())) < len(runs):
        notes.insert(0, f"- unfinished: {done} of {len(runs)} runs")
    return "\n".join([*lines, "", *notes] if notes else lines)


def planted_table(results: dict) -> str:
    """Without the methods that a file of results lacks; without memory where no method needs a MiB more than `full`."""
    rows = {label: row for label, row in results["rows"].items() if any(run is not None for run in row["runs"])}
    full = rows.get("full", {}).get("peak_mib")
    extra = {label: max(0, row["peak_mib"] - full) if full else 0 for label, row in rows.items()}
    names = ["method", "held-out clean NLL", "noise kept", "dropped that was noise", "kept", "tokens/s"]
    names += ["extra MiB"] * any(mib >= 1 for mib in extra.values())
    lines = [
        f"| {' | '.join(names)} |",
        "| --- |" + " --: |" * (len(names) - 1),
        f"| base, before | {spread(results.get('base_nll', []))} |" + " |" * (len(names) - 2),
    ]

    def mean_loss(label: str) -> float:
        losses = of(rows[label]["runs"], "nll")
        return statistics.mean(losses) if losses else float("inf")

    for label in sorted(rows, key=mean_loss):
        runs = rows[label]["runs"]
        cells = [
            f"**{label}**" if label in ("full", "random") else label,
            cell(runs, spread(of(runs, "nll"))),
            *(percent(of(runs, name)) for name in ("noise_kept", "precision", "kept_share")),
            f"{statistics.median(of(runs, 'tokens_per_second') or [0]):,.0f}",
            f"{extra[label]:.0f}",
        ]
        lines.append(f"| {' | '.join(cells[: len(names)])} |")
    return with_notes(lines, results)


def text_table(results: dict) -> str:
    kinds = list(results["rows"])
    lines = [
        "| method | " + " | ".join(f"noise: {kind} | noise kept" for kind in kinds) + " |",
        "| --- |" + " --: | --: |" * len(kinds),
        f"| base, before | {spread(results.get('base_nll', []))} |" + " |" * (2 * len(kinds) - 1),
    ]
    for label in next(iter(results["rows"].values())):
        cells = [results["rows"][kind][label] for kind in kinds]
        lines.append(
            f"| {label} | "
            + " | ".join(f"{cell(runs, spread(of(runs, 'nll')))} | {percent(of(runs, 'noise_kept'))}" for runs in cells)
            + " |"
        )
    return with_notes(lines, results)


def feedback_table(results: dict) -> str:
    """Held-out loss of either sign, as the difference to `random` at equal rho; where + is safe."""
    lines = [
        "| noise | base | trained | learning rate | `random` | `rel` minus it | `history_excess` minus it |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for label, signs in results["rows"].items():
        noise, base, trained, rate = label.split("|")
        cells = [cell(signs["random"], spread(of(signs["random"], "nll")))]
        for sign in ("+", "-"):
            cells.append(cell(signs[sign], spread(differences(signs[sign], signs["random"]))))
        lines.append(f"| {noise} | {base} | {trained} | {rate} | {' | '.join(cells)} |")
    return with_notes(lines, results)


TABLES = {"planted": planted_table, "text": text_table, "feedback": feedback_table}


# What the docs show of them
PLANTED = (
    *("full", "random", "clean_posterior", "rho1", "token_cleaning", "min_k_pp", "history_excess", "attention"),
    *("sstoken", "rel"),
)


def planted_short(results: dict) -> str:
    """The methods that a reader asks for first, with their default options."""
    return planted_table(results | {"rows": {name: results["rows"][name] for name in PLANTED}})


def feedback_short(results: dict) -> str:
    """The range of the differences to `random` over rates, and LoRA or full; where + is safe."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for label, signs in results["rows"].items():
        noise, base, *_ = label.split("|")
        for sign in ("+", "-"):
            if found := differences(signs[sign], signs["random"]):
                groups.setdefault((noise, base), {}).setdefault(sign, []).append(statistics.mean(found))
    lines = ["| noise | base | `rel` minus `random` | `history_excess` minus it |", "| --- | --- | --: | --: |"]
    for (noise, base), signs in groups.items():
        ranges = [f"{min(signs[sign]):.3f} to {max(signs[sign]):.3f}" if sign in signs else "-" for sign in ("+", "-")]
        lines.append(f"| {noise} | {base} | {' | '.join(ranges)} |")
    return with_notes(lines, results)


SHORT_TABLES = {"planted": planted_short, "text": text_table, "feedback": feedback_short}
