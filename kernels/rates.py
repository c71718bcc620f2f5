"""Which implementation `impl="auto"` takes on a GPU: the one that is measured faster there, or else estimated so.

`rates.json` is chip -> work -> implementation -> time over that of the work's own matrix products, by the library at
full size. The GPU benchmarks write it (`python -m benchmarks.speed.rates`); of a chip that is not in it nothing has
been measured, and figures of one chip say nothing of another.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

SHIPPED = Path(__file__).with_name("rates.json")
ESTIMATES = Path(__file__).with_name("estimates.json")
WORKS = ("statistics", "gradient")
IMPLS = ("fused", "chunked")
RULE = (
    "the faster of fused and chunked, for statistics and gradient each: by what was measured on that chip "
    "(rates.json), else by the estimates of its family (estimates.json), else fused"
)

Rates = dict[str, dict[str, dict[str, float]]]


def read_rates(path: str | Path, below: Rates | None = None) -> Rates:
    """The rates of a file, over those of another table, chip by chip.

    Raises:
        ValueError: the file, the entry, what was expected and what is there.
    """

    def entries(value: object, where: str, names: tuple[str, ...] | None = None) -> Mapping:
        if not isinstance(value, dict) or (names and not set(value) <= set(names)):
            expected = f"an object with {', '.join(names)}" if names else "an object"
            raise ValueError(f"rates of {path}: {where} must be {expected}; got {value!r}")
        return value

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"rates of {path} cannot be read: {error}") from error
    rates = dict(below or {})
    for chip, works in entries(content, "the file").items():
        for work, impls in entries(works, chip, WORKS).items():
            for impl, rate in entries(impls, f"{work} of {chip}", IMPLS).items():
                number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
                if not (number and 0 < rate < math.inf):
                    raise ValueError(f"rates of {path}: {impl} of {work} of {chip} must be positive; got {rate!r}")
        rates[chip] = works
    return rates


def write_rates(path: str | Path, rates: Rates) -> None:
    """Writes a table as `read_rates` reads it, chips and works in a fixed order."""
    ordered = {chip: {work: rates[chip][work] for work in WORKS if work in rates[chip]} for chip in sorted(rates)}
    Path(path).write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


@functools.lru_cache
def shipped() -> Rates:
    return read_rates(SHIPPED)


@functools.lru_cache
def estimated() -> Rates:
    """Family -> work -> implementation -> what the machine code says, in the place of a rate."""
    content = json.loads(ESTIMATES.read_text(encoding="utf-8"))
    return {family: entry["works"] for family, entry in content.items()}


def choose(chip: str, family: str, work: str) -> tuple[str, str]:
    """("fused" or "chunked", why) for the statistics or the gradient on a chip, by RULE.

    Args:
        chip: its name, as `torch.cuda.get_device_name` gives it. family: as in `tiles.json`.
        work: "statistics" or "gradient".
    Raises:
        ValueError: another work.
    """
    if work not in WORKS:
        raise ValueError(f"work must be one of {', '.join(WORKS)}; got {work!r}")
    sources = {f"measured on {chip}": shipped().get(chip, {}), f"estimated for {family}": estimated().get(family, {})}
    for source, rates in sources.items():
        known = rates.get(work, {})
        if set(known) == set(IMPLS):
            figures = " and ".join(f"{impl} {known[impl]:.2f}" for impl in IMPLS)
            return min(IMPLS, key=lambda impl: known[impl]), f"{source}: {figures} times its matrix products"
    return "fused", f"neither measured on {chip} nor estimated for {family}"
