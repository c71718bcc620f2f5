"""Plots of results, as SVG."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.speed.cases import MODELS
from benchmarks.speed.results import Results, machine_line, of_floor

PICTURES = {  # name -> what it shows
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
    for record in results.of("attention_mass", dtype=results.main_dtype):
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
                values = [(at, result[what]) for at, result in sorted(points.items()) if what in result]
                if values:
                    panels[row][column].plot(*zip(*values, strict=True), marker="o", color=_colour(way), label=way)
        panels[1][column].set_xlabel(label)
    for axes, label in zip(panels[:, 0], ("seconds", "extra MiB"), strict=True):
        axes.set(ylabel=label, ylim=(0, None))
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    _legend(panels[0][0])


def _usual(cases: list[dict], size: str) -> object:
    """What a size is while another grows: its most frequent value."""
    return statistics.mode(case[size] for case in cases)


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


def write(results: Results, folder: Path) -> list[Path]:
    """Writes every picture as SVG into the folder; each names the results that it shows."""
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
        written.append(folder / f"{results.key}_{name}.svg")
        figure.savefig(written[-1], dpi=110, metadata={"Description": results.digest, "Date": None})
        pyplot.close(figure)
    return written
