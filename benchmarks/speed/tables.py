"""Tables, targets and plots of results: python -m benchmarks.speed.tables RESULTS.json [MORE.json] [--readme README.md]

Plots (PNG and SVG) go beside the results. `--readme` rewrites what stands between the markers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.cases import MODELS
from tokensel.report import format_table

BEGIN, END = "<!-- benchmarks: written by `make bench` -->", "<!-- /benchmarks -->"
MAIN = {"attention_mass": "CPU-sized"}  # the model whose lengths are compared on a CPU
AUTO = {"cpu": "tokensel chunked", "cuda": "tokensel fused"}  # what impl="auto" takes, for bfloat16 on a GPU


@dataclass
class Results:
    """What one machine has measured."""

    machine: dict
    records: list[dict]
    load: float
    folder: Path

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.records, sort_keys=True).encode()).hexdigest()[:16]

    def of(self, work: str, **wanted: object) -> list[dict]:
        fields = {"work": work, **wanted}
        return [r for r in self.records if all(r["case"][key] == value for key, value in fields.items())]


def load(paths: list[Path]) -> dict[str, Results]:
    """Results by device ("cpu", "cuda").

    Raises:
        ValueError: a file that is not one of results, or results of two machines, or two states of one.
    """
    found: dict[str, Results] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            machine, records = content["machine"], content["records"]
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); `make bench` writes one") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of `pytest benchmarks --results`: {error!r}") from error
        device = machine["device"]
        if device not in found:
            found[device] = Results(machine, [], content["load"], path.parent)
        other = found[device].machine
        if differing := [key for key in sorted(other | machine) if other.get(key) != machine.get(key)]:
            what = ", ".join(f"{key}: {other.get(key)} and {machine.get(key)}" for key in differing)
            raise ValueError(f"{path} is of another machine or state than the files before it ({what}); figures of two "
                             "are not mixed in one table: report them one at a time")  # fmt: skip
        known = {record["name"] for record in found[device].records}
        if twice := [record["name"] for record in records if record["name"] in known]:
            raise ValueError(f"{path} holds {twice[0]} again, which a file before it has measured; give each file once")
        found[device].records += records
    return found


def of_floor(record: dict, way: str) -> float | None:
    median = record["ways"].get(way, {}).get("median")
    return median / record["floor"] if median and record.get("floor") else None


def ratio(record: dict, way: str, other: str, what: str = "median") -> float | None:
    """How many times as much of `what` (median seconds, extra_mib) `way` takes as `other`."""
    a, b = (record["ways"].get(name, {}).get(what) for name in (way, other))
    return a / b if a is not None and b else None  # no memory seen at all is too little to be compared with


# The targets: a function of a device's results gives the figures, of which the worst is compared with the bound.


@dataclass(frozen=True)
class Target:
    device: str
    what: str
    at_most: bool
    bound: float
    figures: Callable[[Results], list[float | None]]

    def row(self, results: dict[str, Results]) -> dict:
        found = self.figures(results[self.device]) if self.device in results else []
        found = [value for value in found if value is not None]
        worst = (max if self.at_most else min)(found) if found else None
        met = worst is not None and (worst <= self.bound if self.at_most else worst >= self.bound)
        return {
            "target": self.what,
            "device": {"cpu": "CPU", "cuda": "GPU"}[self.device],
            "wanted": f"{'≤' if self.at_most else '≥'} {self.bound:g}",
            "measured": "not measured" if worst is None else f"{worst:.3g}",
            "": "" if worst is None else "met" if met else "**not met**",
        }


def _step(dtype: str, figure: Callable[[dict], float | None]) -> Callable[[Results], list[float | None]]:
    return lambda results: [figure(r) for r in results.of("selection_step", group="step", dtype=dtype)]


def _each(work: str, figure: Callable[[dict], float | None], **wanted) -> Callable[[Results], list[float | None]]:
    return lambda results: [figure(r) for r in results.of(work, **wanted)]


def _mass_growth(results: Results) -> list[float | None]:
    """Exponent of the memory in the length: the slope of a line through the logarithms, over all lengths."""
    records = results.of("attention_mass", model=MAIN["attention_mass"], dtype=_main_dtype(results))
    known = [(r["case"]["tokens"], r["ways"][AUTO["cpu"]].get("extra_mib")) for r in records]
    known = [(math.log(tokens), math.log(mib)) for tokens, mib in known if mib]
    return [statistics.linear_regression(*zip(*known, strict=True)).slope] if len(known) > 1 else []


def _of_fastest_sft(way: str) -> Callable[[dict], float | None]:
    def figure(record: dict) -> float | None:
        plain = [name for name, result in record["ways"].items() if name.startswith("SFT") and "median" in result]
        return ratio(record, way, min(plain, key=lambda n: record["ways"][n]["median"])) if plain else None

    return figure


def _way_mib(way: str) -> Callable[[dict], float | None]:
    return lambda record: record["ways"].get(way, {}).get("extra_mib")


CPU, GPU = AUTO["cpu"], AUTO["cuda"]
_STEP = "selection step"
TARGETS = [
    *[Target("cpu", f"{_STEP}, {t}: time / its own matrix products", True, 1.15, _step(t, lambda r: of_floor(r, CPU)))
      for t in ("float32", "bfloat16")],
    *[Target("cpu", f"{_STEP}, {t}: published way's time / ours", False, bound,
             _step(t, lambda r: ratio(r, "published", CPU))) for t, bound in (("float32", 1.0), ("bfloat16", 1.4))],
    *[Target("cpu", f"{_STEP}, {t}: time of PyTorch's chunked function / ours", False, bound,
             _step(t, lambda r: ratio(r, "torch chunked", CPU))) for t, bound in (("float32", 3), ("bfloat16", 10))],
    *[Target("cpu", f"{_STEP}, {t}: published way's extra memory / ours", False, 25,
             _step(t, lambda r: ratio(r, "published", CPU, "extra_mib"))) for t in ("float32", "bfloat16")],
    Target("cpu", "attention mass with lse, every length: eager way's time / ours", False, 1.0,
           _each("attention_mass", lambda r: ratio(r, "published", f"{CPU}, lse"), group="attention_mass")),
    Target("cpu", "attention mass: exponent of the memory in the length", True, 1.1, _mass_growth),
    Target("cuda", "pair statistics: time / the two cuBLAS products", True, 1.10,
           _each("pair_stats", lambda r: of_floor(r, GPU))),
    Target("cuda", "pair statistics, fused: extra MiB", True, 64, _each("pair_stats", _way_mib(GPU))),
    Target("cuda", "kept-row backward: time / its three products", True, 1.10,
           _each("kept_backward", lambda r: of_floor(r, GPU))),
    Target("cuda", f"{_STEP}: extra MiB beside the gradients", True, 512, _each("selection_step", _way_mib(GPU))),
    Target("cuda", "attention mass / FlashAttention's forward, every length", True, 0.6,
           _each("attention_mass", lambda r: ratio(r, GPU, "flash forward"))),
    Target("cuda", "the same with its lse, 25 % prompt", True, 0.2,
           _each("attention_mass", lambda r: ratio(r, f"{GPU}, lse", "flash forward"))),
    Target("cuda", "training step, recorded history / SFT with the fastest loss", True, 1.0,
           _each("training_step", _of_fastest_sft(f"{GPU}, recorded"))),
    Target("cuda", "training step, live history / SFT with the fastest loss", True, 1.4,
           _each("training_step", _of_fastest_sft(f"{GPU}, live"))),
]  # fmt: skip


# Tables.


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
    """The way that impl="auto" takes, by its best known use first: with the lse, with a recorded history."""
    ways = [way for way in record["ways"] if way.startswith(AUTO[device])]
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
    """One row a case and way of ours, beside the fastest peer and the published way."""
    auto = AUTO[results.machine["device"]]
    rows = []
    for record in results.records:
        times = {n: w["median"] for n, w in record["ways"].items() if not n.startswith("tokensel") and "median" in w}
        # the attention itself gives no mass
        best = min((n for n in times if not n.endswith("forward")), key=times.get, default=NONE)
        for ours, result in record["ways"].items():
            if ours.startswith(auto):
                rows.append(
                    {
                        "case": record["name"] + ours.removeprefix(auto),
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


def machine_line(results: Results) -> str:
    m = results.machine
    place = f"{m['gpu']}, " if "gpu" in m else ""
    busy = f"; load average {results.load:.1f} at the start, so others ran" if results.load > 0.5 else ""
    place += f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    return f"{place}, PyTorch {m['torch']}, commit {m['commit'][:10]}{busy}"


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
                f"{dtype}: kept unlike float64": "" if way in floors else errors.get("kept", NONE),
            }
        rows.append(row)
    return rows


def _median(record: dict, results: Results) -> float | None:
    return record["ways"][_ours(record, results.machine["device"])].get("median")


def absent_ways(results: Results) -> dict[str, list[str]]:
    """Ways that could not run there, by the reason."""
    found: dict[str, list[str]] = {}
    for record in results.records:
        for way, result in record["ways"].items():
            if "absent" in result and way not in found.setdefault(result["absent"], []):
                found[result["absent"]].append(way)
    return found


def readme_block(results: dict[str, Results]) -> str:
    """What stands in README between the markers."""
    parts = [BEGIN]
    for device, command in {"cpu": "make bench", "cuda": "make bench-gpu"}.items():
        targets = markdown([target.row(results) for target in TARGETS if target.device == device])
        if device not in results:
            parts += [f"On a GPU nothing has been measured yet (`{command}`); what is wanted there:", targets]
            continue
        found = results[device]
        parts.append(f"`{command}` on {machine_line(found)}.")
        if records := found.of("selection_step", group="step"):
            model = records[0]["case"]
            parts += [f"A selection step, {model['model']}, {model['tokens']} rows, rho {model['rho']}:",
                      markdown(step_rows(found))]  # fmt: skip
        folder = found.folder.as_posix()
        parts.append("\n".join(f"![{alt}]({folder}/{device}_{name}.svg)" for name, alt in PICTURES.items()))
        parts += ["Every target; the worst case of each counts:", targets]
        parts += [_folded("Every case beside its fastest peer and the published way", markdown(overview_rows(found)))]
        parts += [f"Not run there: {', '.join(ways)} ({reason})." for reason, ways in absent_ways(found).items()]
    return "\n\n".join([*parts, END])


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def rewritten(text: str, block: str) -> str:
    """README with the block in its place.

    Raises:
        ValueError: no markers.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the file has no lines {BEGIN} and {END} between which the results would stand")
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]


# Plots.

PICTURES = {  # README's
    "time": "time of every way against the floor",
    "memory": "extra memory against length",
    "growth": "time and memory of a selection step against N, V and rho",
    "breakdown": "parts of a selection step",
}
COLOURS = {"tokensel chunked": "C0", "tokensel fused": "C2", "published": "C3"}


def _colour(way: str) -> str | None:
    return next((colour for name, colour in COLOURS.items() if way.startswith(name)), None)


def _legend(axes, **place) -> None:
    if axes.get_legend_handles_labels()[0]:  # matplotlib warns of one without entries
        axes.legend(fontsize=7, **place)


def _plot_time(axes, results: Results) -> None:
    records = [r for r in results.records if r.get("floor") and r["case"]["group"] not in ("growth", "memory")]
    shown = sorted({way for r in records for way in r["ways"] if of_floor(r, way)})
    markers = dict(zip(shown, "osvD^P*Xph<>dH8" * 3, strict=False))
    seen = set()
    for y, record in enumerate(records):
        for way in record["ways"]:
            if (x := of_floor(record, way)) is not None:
                style = {"color": _colour(way) or "0.45", "marker": markers[way], "markersize": 7, "alpha": 0.8}
                axes.plot(x, -y, linestyle="", label=None if way in seen else way, **style)
                seen.add(way)
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set_yticks([-y for y in range(len(records))], [r["name"] for r in records], fontsize=8)
    axes.set(xscale="log", xlabel="time / floor (the operations alone, measured in the same run)")
    _legend(axes, loc="center left", bbox_to_anchor=(1, 0.5))


def _plot_memory(axes, results: Results) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in results.of("attention_mass", dtype=_main_dtype(results)):
        for way, result in record["ways"].items():
            if result.get("extra_mib", 0) > 0:
                lines.setdefault(way, []).append((record["case"]["tokens"], result["extra_mib"]))
    others = iter((("0.3", "-", "s"), ("0.6", ":", "^"), ("0.5", "-.", "v")))
    for way, points in lines.items():
        color, style, marker = (_colour(way), "--" if "lse" in way else "-", "o") if _colour(way) else next(others)
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, color=color, label=way, linestyle=style)
    axes.set(xscale="log", yscale="log", xlabel="length of the sequence", ylabel="extra memory of attention mass, MiB")
    lengths = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axes.minorticks_off()
    _legend(axes)


def _plot_growth(figure, results: Results) -> None:
    """Time above, memory below; a column for each size that grows while the others stay."""
    records = [r for r in results.records if r["case"]["group"] in ("growth", "memory", "step")
               and r["case"]["work"] == "selection_step"]  # fmt: skip
    grown = [r["case"] for r in records if r["case"]["group"] == "growth"]
    sizes = {"tokens": "rows N", "vocabulary": "vocabulary V", "rho": "share kept rho"}
    panels = figure.subplots(2, len(sizes), sharex="col", sharey="row", squeeze=False)
    for column, (size, label) in enumerate(sizes.items()):
        lines: dict[str, dict[float, dict]] = {}
        for record in records:
            case = record["case"]
            others = [name for name in sizes if name != size]
            if grown and case["model"] == grown[0]["model"] and all(case[n] == _usual(grown, n) for n in others):
                at = MODELS[case["model"]].vocabulary if case[size] is None else case[size]
                for way, result in record["ways"].items():
                    if "extra_mib" in result and _colour(way):
                        lines.setdefault(way, {})[at] = result
        for way, points in lines.items():
            for row, what in enumerate(("median", "extra_mib")):
                known = [(at, result[what]) for at, result in sorted(points.items()) if what in result]
                if known:
                    panels[row][column].plot(*zip(*known, strict=True), marker="o", color=_colour(way), label=way)
        panels[1][column].set_xlabel(label)
    for axes, label in zip(panels[:, 0], ("seconds", "extra MiB"), strict=True):
        axes.set(ylabel=label, ylim=(0, None))
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    _legend(panels[0][0])


def _usual(cases: list[dict], size: str) -> object:
    """What a size is while another grows: its most frequent value."""
    return statistics.mode(case[size] for case in cases)


def _main_dtype(results: Results) -> str:
    return "float32" if results.machine["device"] == "cpu" else "bfloat16"


def _plot_breakdown(axes, results: Results) -> None:
    bars = [(f"{way}\n{r['case']['dtype']}", result["parts"], r["floor"])
            for r in results.of("selection_step", group="step")
            for way, result in r["ways"].items() if result.get("parts")]  # fmt: skip
    left = [0.0] * len(bars)
    for part in ("statistics", "selection", "backward"):
        widths = [parts.get(part, 0) for _, parts, _ in bars]
        axes.barh(range(len(bars)), widths, left=left, label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, (_, _, floor) in enumerate(bars):
        axes.plot([floor, floor], [y - 0.4, y + 0.4], color="black", label=None if y else "matrix products alone")
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a selection step")
    _legend(axes)


def plot(results: Results) -> list[Path]:
    """Writes every picture as PNG and SVG beside the results; each names the results that it shows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tokensel"
    from matplotlib import pyplot

    written = []
    one = {"time": _plot_time, "memory": _plot_memory, "breakdown": _plot_breakdown}
    for name in PICTURES:
        figure = pyplot.figure(figsize=(9, 4.5), layout="constrained")
        if name in one:
            axes = figure.subplots()
            one[name](axes, results)
            axes.grid(alpha=0.3)
        else:
            _plot_growth(figure, results)
        figure.suptitle(machine_line(results), fontsize=8)
        for suffix, extra in ((".png", {}), (".svg", {"Date": None})):
            path = results.folder / f"{results.machine['device']}_{name}{suffix}"
            figure.savefig(path, dpi=110, metadata={"Description": results.digest, **extra})
            written.append(path)
        pyplot.close(figure)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, help="rewrite the block between the markers of this file")
    options = parser.parse_args(arguments)
    try:
        results = load(options.results)
    except ValueError as error:
        parser.error(str(error))
    for found in results.values():
        print(f"{machine_line(found)}\n")
        print(format_table(case_rows(found), left=("way", "errors, or why not")), end="\n\n")
        print(format_table(overview_rows(found), left=("fastest peer",)), end="\n\n")
        for path in plot(found):
            print(path)
    print("\n" + format_table([target.row(results) for target in TARGETS]))
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(rewritten(text, readme_block(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
