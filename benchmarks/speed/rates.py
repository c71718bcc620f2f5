"""The rates that impl="auto" reads, from GPU results: python -m benchmarks.speed.rates RESULTS.json [--into RATES.json]

A rate is a way's time over that of its work's matrix products in the same run, the median of the cases that both
implementations have run. Other chips' rates in the file stay as they are.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.speed.results import Results, load, of_floor
from tokensel_kernels.rates import IMPLS, SHIPPED, Rates, read_rates, write_rates

WORKS = {"statistics": "pair_stats", "gradient": "kept_backward"}


def rates_of(results: Results) -> dict[str, dict[str, float]]:
    """work -> implementation -> rate, as far as both implementations were measured in half precision."""
    rates = {}
    for work, name in WORKS.items():
        records = [r for r in results.of(name, group=name, softcap=None) if r["case"]["dtype"] != "float32"]
        figures = [{impl: of_floor(record, f"tokensel {impl}") for impl in IMPLS} for record in records]
        both = [figure for figure in figures if None not in figure.values()]
        if both:
            rates[work] = {impl: round(statistics.median(f[impl] for f in both), 3) for impl in IMPLS}
    return rates


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, default=SHIPPED, help="file to write (default: the one that auto reads)")
    options = parser.parse_args(arguments)
    try:
        (own,) = load([options.results]).values()
        if own.machine["device"] != "cuda":
            raise ValueError(f"{options.results} is of a {own.machine['device']}; auto reads the rates of GPUs")
        before: Rates = read_rates(options.into) if options.into.exists() else {}
    except ValueError as error:
        parser.error(str(error))
    found = rates_of(own)
    if not found:
        parser.error(f"{options.results} has no case that both {' and '.join(IMPLS)} have run")
    write_rates(options.into, before | {own.machine["gpu"]: found})
    print(f"{options.into}: {own.machine['gpu']}: {found}")


if __name__ == "__main__":
    main()
