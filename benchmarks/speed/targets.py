"""The targets: a function of a device's results gives figures, of which the worst is compared with the bound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.speed.results import OURS, Results, of_floor, ratio

CPU, GPU = OURS["cpu"], OURS["cuda"]


@dataclass(frozen=True)
class Target:
    device: str
    what: str
    at_most: bool
    bound: float
    figures: Callable[[Results], list[float | None]]

    def row(self, own: Results | None) -> dict:
        """Of one chip's results, or of none."""
        figures = [value for value in (self.figures(own) if own else []) if value is not None]
        worst = (max if self.at_most else min)(figures) if figures else None
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
    records = results.of("attention_mass", model="CPU-sized", dtype=results.main_dtype)
    sizes = [(r["case"]["tokens"], r["ways"][CPU].get("extra_mib")) for r in records]
    points = [(math.log(tokens), math.log(mib)) for tokens, mib in sizes if mib]
    return [statistics.linear_regression(*zip(*points, strict=True)).slope] if len(points) > 1 else []


def _of_fastest_sft(way: str) -> Callable[[dict], float | None]:
    def figure(record: dict) -> float | None:
        plain = [name for name, result in record["ways"].items() if name.startswith("SFT") and "median" in result]
        return ratio(record, way, min(plain, key=lambda n: record["ways"][n]["median"])) if plain else None

    return figure


def _of_best_other(what: str) -> Callable[[dict], float | None]:
    def figure(record: dict) -> float | None:
        others = [n for n, result in record["ways"].items() if not n.startswith("tokensel") and what in result]
        best = min(others, key=lambda n: record["ways"][n][what], default=None)
        return None if best is None else ratio(record, best, CPU, what)

    return figure


def _way_mib(way: str) -> Callable[[dict], float | None]:
    return lambda record: record["ways"].get(way, {}).get("extra_mib")


_STEP = "selection step"
TARGETS = [
    *[Target("cpu", f"{_STEP}, {t}: time / its own matrix products", True, 1.15, _step(t, lambda r: of_floor(r, CPU)))
      for t in ("float32", "bfloat16")],
    *[Target("cpu", f"{_STEP}, {t}: published way's time / ours", False, bound,
             _step(t, lambda r: ratio(r, "published", CPU))) for t, bound in (("float32", 1.0), ("bfloat16", 1.4))],
    *[Target("cpu", f"{_STEP}, {t}: time of the fastest other way / ours", False, 1.0,
             _step(t, _of_best_other("median"))) for t in ("float32", "bfloat16")],
    *[Target("cpu", f"{_STEP}, {t}: extra memory of the leanest other way / ours", False, 1.0,
             _step(t, _of_best_other("extra_mib"))) for t in ("float32", "bfloat16")],
    *[Target("cpu", f"{_STEP}, {t}: published way's extra memory / ours", False, 25,
             _step(t, lambda r: ratio(r, "published", CPU, "extra_mib"))) for t in ("float32", "bfloat16")],
    Target("cpu", "attention mass with lse, every length: eager way's time / ours", False, 1.0,
           _each("attention_mass", lambda r: ratio(r, "published", f"{CPU}, lse"), group="attention_mass")),
    Target("cpu", "attention mass: exponent of the memory in the length", True, 1.1, _mass_growth),
    Target("cuda", "pair statistics: time / the two cuBLAS products", True, 1.10,
           _each("pair_stats", lambda r: of_floor(r, GPU), softcap=None)),
    Target("cuda", "pair statistics, fused: extra MiB", True, 64, _each("pair_stats", _way_mib(GPU))),
    Target("cuda", "kept-row backward: time / its three products", True, 1.10,
           _each("kept_backward", lambda r: of_floor(r, GPU), softcap=None)),
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
