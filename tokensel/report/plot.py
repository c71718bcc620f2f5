"""A plot of REL over a training run; needs matplotlib when it draws."""

from __future__ import annotations

from pathlib import Path


def plot_rel(path: str | Path, runs: list[dict]) -> None:
    """PNG of REL over the optimizer steps: mean, and a band of one standard deviation, per run.

    Args:
        runs: dicts of "name" and "curves", the latter with "rel_mean" and "rel_std" as lists of [step, nats].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        points = run["curves"]["rel_mean"]
        if not points:
            continue
        steps, mean = zip(*points, strict=True)
        std = [value for _, value in run["curves"]["rel_std"]]
        (line,) = axes.plot(steps, mean, label=run["name"])
        low = [m - s for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("REL = history NLL - current NLL (nats)")
    axes.set_title("Improvement over the history: mean and one standard deviation over response tokens", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
