"""The plots of the studies."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.quality.real import SHOWN
from benchmarks.quality.real_tables import kinds_measured
from benchmarks.quality.tables import of
from benchmarks.resume import digest, measured


def plot_feedback(results: dict, path: Path) -> None:
    """Loss of kept and of dropped tokens over the steps, both signs; one panel a row that has curves."""
    from matplotlib.figure import Figure

    rows = results["rows"]
    chosen = [label for label in rows if any(of(runs, "curves") for runs in rows[label].values())]
    figure = Figure(figsize=(3.2 * len(chosen), 3.4), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, chosen, strict=True):
        for sign, color, name in (("+", "tab:red", "REL as published"), ("-", "tab:blue", "REL reversed")):
            for curve, style in (("kept_nll", "-"), ("dropped_nll", "--")):
                runs = [curves[curve] for curves in of(rows[label][sign], "curves")]
                if not runs:
                    continue
                steps = [step for step, _ in runs[0]]
                mean = [statistics.mean(run[i][1] for run in runs) for i in range(len(steps))]
                axes.plot(steps, mean, style, color=color, label=f"{name}, {curve.removesuffix('_nll')}")
        axes.set_title(f"noise: {label.split('|')[0]}", fontsize=10)
        axes.set_xlabel("optimizer step")
    panels[0].set_ylabel("current NLL (nats)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110, metadata={"Description": digest(rows)})


def plot_real(results: dict, path: Path) -> None:
    """Held-out loss over the response tokens that have been seen, mean over the seeds; a panel a kind of rows."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "tokensel"
    kinds = kinds_measured(results)
    columns = min(4, len(kinds)) or 1  # without a kind an empty panel
    rows = -(-len(kinds) // columns) or 1
    figure = Figure(figsize=(3 * columns, 2.8 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for kind, axes in zip(kinds, panels, strict=False):
        base = results.get("bases", {}).get(kind)
        for name in SHOWN:
            curves = of(results["rows"][kind].get(name, []), "curve")
            at_points = zip(*curves, strict=False)  # each of all seeds, as far as all go
            points = [[statistics.mean(values) for values in zip(*seeds, strict=True)] for seeds in at_points]
            if not points:
                continue
            if measured(base):
                points.insert(0, [0, base["held_out"]])
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{SHOWN.index(name)}", label=name)
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("response tokens", fontsize=8)
        axes.tick_params(labelsize=8)
    for axes in panels:  # those without a kind
        axes.set_axis_off()
    figure.axes[0].set_ylabel("held-out NLL (nats)", fontsize=8)
    lines = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines) or 1, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Description": digest(results["rows"]), "Date": None})
