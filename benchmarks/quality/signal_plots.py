"""The picture of what the signals see of the noise."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.signals import BINS, SIGNALS, STEPS
from benchmarks.resume import digest, measured

PANELS = (("nll", STEPS[0]), ("nll", STEPS[-1]), ("rel", STEPS[-1]))  # distributions; the area over the steps is last


def plot_signals(results: dict, path: Path) -> None:
    """A row a kind that is measured: distributions of noise and of clean tokens, and the ROC areas over the steps.

    Raises:
        ValueError: no kind is measured.
    """
    from matplotlib.figure import Figure

    kinds = {kind: found for kind, found in results["kinds"].items() if measured(found)}
    if not kinds:
        raise ValueError("results have no kind that is measured; run `python -m benchmarks.quality signals` first")
    figure = Figure(figsize=(12, 1.9 * len(kinds) + 0.9), layout="constrained")
    rows = figure.subplots(len(kinds), len(PANELS) + 1, squeeze=False)
    for panels, (kind, found) in zip(rows, kinds.items(), strict=True):
        for axes, (name, step) in zip(panels, PANELS, strict=False):
            _distributions(axes, found[str(step)]["histograms"][name])
            axes.set_title(f"{kind}: {SIGNALS[name]}, step {step}", fontsize=9)
        areas = panels[-1]
        for name, title in SIGNALS.items():
            areas.plot(STEPS, [found[str(step)]["signals"][name]["auc"] for step in STEPS], ".-", label=title)
        areas.axhline(0.5, color="gray", linewidth=0.8)
        areas.set_xscale("log")
        areas.set_xticks(STEPS, [str(step) for step in STEPS])
        areas.minorticks_off()
        areas.set_ylim(0, 1.02)
        areas.set_title(f"{kind}: ROC area", fontsize=9)
    for axes in rows[-1][:-1]:
        axes.set_xlabel("nats", fontsize=9)
    rows[-1][-1].set_xlabel("optimizer step", fontsize=9)
    for axes in rows.flat:
        axes.tick_params(labelsize=8)
    lines = [axes.get_legend_handles_labels() for axes in (rows[0][0], rows[0][-1])]
    handles, labels = (sum(parts, []) for parts in zip(*lines, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Description": digest(results["kinds"])})


def _distributions(axes, histogram: dict) -> None:
    """The share of the noise, and of the clean tokens, in each bin."""
    low, high = histogram["range"]
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    for name, color in (("clean", "tab:blue"), ("noise", "tab:red")):
        counts = histogram[name]["counts"]
        axes.stairs([n / sum(counts) for n in counts], edges, fill=True, color=color, alpha=0.45, label=name)
    axes.set_yticks([])
