"""The plot of the study of feedback."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.quality.tables import of
from benchmarks.resume import digest


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
