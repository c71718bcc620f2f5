"""Tables of results, and plots beside them: python -m benchmarks.speed.tables RESULTS.json [MORE.json]

`python -m tools.write_docs` puts those of the committed results into the docs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from benchmarks.speed import plots
from benchmarks.speed.cases import Case
from benchmarks.speed.results import OURS, Results, load, machine_line, of_floor, ratio
from benchmarks.speed.targets import TARGETS
from tokensel.report import format_table
from tokensel_kernels.roofline import as_row

NONE = "not measured"


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _mib(result: dict) -> str:
    return f"{result['extra_mib']:,.0f}" if "extra_mib" in result else NONE


def _rate(record: dict, seconds: float | None) -> str:
    """What the algorithm's operations, or its bytes where it has none, come to in that time."""
    if not seconds:
        return NONE
    per_second = (record["operations"] or record["bytes"]) / seconds
    return f"{per_second / 1e9:,.0f} {'GFLOP/s' if record['operations'] else 'GB/s'}"


def _ours(record: dict, device: str) -> str:
    """The way of ours that the others are compared with, in its best use: with the lse, with a recorded history."""
    ways = [way for way in record["ways"] if way.startswith(OURS[device])]
    return next((way for way in ways if way.endswith(("lse", "recorded"))), ways[0])


def case_rows(results: Results) -> list[dict]:
    """One row a way of a case: runs, time, ratios to the floor and to tokensel, memory; why it has none."""
    rows = []
    for record in results.records:
        ours = _ours(record, results.machine["device"])
        for name, result in record["ways"].items():
            errors = ", ".join(f"{key} {value:.1e}" for key, value in result.get("errors", {}).items())
            rows.append(
                {
                    "case": record["name"],
                    "way": name,
                    "runs": len(result.get("seconds", [])),
                    "time": _seconds(result.get("median")),
                    "rate": _rate(record, result.get("median")),
                    "/ floor": _times(of_floor(record, name)),
                    "/ ours": _times(ratio(record, name, ours)),
                    "extra MiB": _mib(result),
                    "errors, or why not": result.get("failed") or result.get("absent") or errors,
                }
            )
        for name in ("floor", "native_floor"):
            if record.get(name):
                floor = dict.fromkeys(rows[0], "") | {"case": record["name"], "way": name.replace("_", " ")}
                rows.append(floor | {"time": _seconds(record[name]), "rate": _rate(record, record[name])})
    return rows


def overview_rows(results: Results) -> list[dict]:
    """One row a case and way of ours, beside the fastest peer and the published way; on a GPU fused beside chunked."""
    device = results.machine["device"]
    prefix = "tokensel" if device == "cuda" else OURS[device]
    rows = []
    for record in results.records:
        times = {n: w["median"] for n, w in record["ways"].items() if not n.startswith("tokensel") and "median" in w}
        # the attention itself gives no mass
        best = min((n for n in times if not n.endswith("forward")), key=times.get, default=NONE)
        for ours, result in record["ways"].items():
            if ours.startswith(prefix):
                rows.append(
                    {
                        "case": record["name"] + ours.removeprefix(prefix),
                        "tokensel": result.get("failed") or _seconds(result.get("median")),
                        "/ floor": _times(of_floor(record, ours)),
                        "fastest peer": best,
                        "its time / ours": _times(ratio(record, best, ours)),
                        "published / ours": _times(ratio(record, "published", ours)),
                        "MiB": _mib(result),
                        "of that peer": _mib(record["ways"].get(best, {})),
                        "of published": _mib(record["ways"].get("published", {})),
                    }
                )
    return rows


def markdown(rows: list[dict]) -> str:
    head = list(rows[0])
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *[[str(row[column]) for column in head] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arithmetic(case: Case) -> str:
    """Of one row's training step: operations, bytes and the least time of each call, and what the published way holds.

    Nothing of it is measured.
    """
    m, S = case.shape, case.tokens
    calls = [dataclasses.replace(call, kernel=call.kernel.split(",")[0]) for call in case.costs]
    least = sum(call.milliseconds() for call in calls)
    rows = [
        {name: value for name, value in as_row(call).items() if name != "shape"}
        | {"share of the time": f"{call.milliseconds() / least:.1%}".replace("%", " %")}
        for call in calls
    ]
    logits, attention = S * m.vocabulary, m.heads * S**2  # entries
    held = {
        f"logits {S:,} × {m.vocabulary:,}, bfloat16": 2 * logits,
        "the same in float32, for the loss": 4 * logits,
        f"attention {m.heads} × {S:,} × {S:,} of one layer, bfloat16": 2 * attention,
        f"of all {m.layers} layers, as `output_attentions` gives it": 2 * attention * m.layers,
    }
    sizes = [{"the published way holds": what, "GiB": f"{size / 2**30:,.1f}"} for what, size in held.items()]
    return "\n\n".join([markdown(rows), markdown(sizes)])


def step_rows(results: Results) -> list[dict]:
    """The selection step of every type side by side, one row a way that somebody could run here."""
    records = results.of("selection_step", group="step")
    ways = [way for way in records[0]["ways"] if any("absent" not in r["ways"].get(way, {}) for r in records)]
    floors = {"floor": "our matrix products alone", "native_floor": "the same, results in the inputs' type"}
    rows = []
    for way in [*ways, *(name for name in floors if any(r.get(name) for r in records))]:
        row = {"": floors.get(way, way)}
        for record in records:
            result, dtype = record["ways"].get(way, {}), record["case"]["dtype"]
            seconds = record.get(way) if way in floors else result.get("median")
            errors = result.get("errors", {})
            row |= {
                f"{dtype}: time": result.get("failed") or _seconds(seconds),
                f"{dtype}: / ours": _times(seconds / ours if seconds and (ours := _median(record, results)) else None),
                f"{dtype}: extra MiB": "" if way in floors else _mib(result),
                f"{dtype}: error of the loss": "" if way in floors else f"{errors['loss']:.0e}" if errors else NONE,
                f"{dtype}: of the gradients": "" if way in floors else _gradients_error(errors),
                f"{dtype}: kept unlike float64": "" if way in floors else errors.get("kept", NONE),
            }
        rows.append(row)
    return rows


def _gradients_error(errors: dict) -> str:
    """The larger of both gradients' errors, as a share of the gradient."""
    shares = [error for name, error in errors.items() if name.startswith("d_")]
    return f"{max(shares):.0e}" if shares else NONE


def _median(record: dict, results: Results) -> float | None:
    return record["ways"][_ours(record, results.machine["device"])].get("median")


def absent_ways(results: Results) -> dict[str, list[str]]:
    """Ways that could not run there, by the reason."""
    ways: dict[str, list[str]] = {}
    for record in results.records:
        for way, result in record["ways"].items():
            if "absent" in result and way not in ways.setdefault(result["absent"], []):
                ways[result["absent"]].append(way)
    return ways


def page(results: dict[str, Results], device: str, pictures: Callable[[str], str] = lambda key: "") -> str:
    """What the docs say of a device ("cpu", "cuda"), one chip after the other: step, pictures, every target and case.

    pictures: what shows the results of a chip, by its key.
    """
    command = {"cpu": "make bench", "cuda": "make bench-gpu"}[device]
    measured = [own for own in results.values() if own.machine["device"] == device]
    if not measured:
        wanted = markdown(_target_rows(device, None))
        return f"Nothing has been measured yet (`{command}`); what is wanted there:\n\n{wanted}"
    return "\n\n".join(_chip(own, command, pictures(own.key)) for own in measured)


def _target_rows(device: str, own: Results | None) -> list[dict]:
    return [target.row(own) for target in TARGETS if target.device == device]


def _chip(own: Results, command: str, pictures: str) -> str:
    return "\n\n".join(
        [
            f"`{command}` on {machine_line(own)}.",
            *step(own),
            *filter(None, [pictures]),
            "Every target; the worst case of each counts:",
            markdown(_target_rows(own.machine["device"], own)),
            _folded("Every case beside its fastest peer and the published way", markdown(overview_rows(own))),
            *(f"Not run there: {', '.join(ways)} ({reason})." for reason, ways in absent_ways(own).items()),
        ]
    )


def step(results: Results, without: tuple[str, ...] = ()) -> list[str]:
    """The selection step: a line that says of what, and its table, `without` some of each type's columns. Empty where
    none was measured."""
    if not (records := results.of("selection_step", group="step")):
        return []
    case = records[0]["case"]
    line = f"A selection step, {case['model']}, {case['tokens']} rows, rho {case['rho']}:"
    rows = [{name: v for name, v in row.items() if not name.endswith(without)} for row in step_rows(results)]
    return [line, markdown(rows)]


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    try:
        results = load(options.results)
    except ValueError as error:
        parser.error(str(error))
    for own in results.values():
        print(f"{machine_line(own)}\n")
        print(format_table(case_rows(own), left=("way", "errors, or why not")), end="\n\n")
        print(format_table(overview_rows(own), left=("fastest peer",)), end="\n\n")
        print(format_table(_target_rows(own.machine["device"], own)), end="\n\n")
        for path in plots.write(own, own.folder):
            print(path)


if __name__ == "__main__":
    main()
