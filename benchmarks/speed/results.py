"""Results of `pytest benchmarks --results`: read, and compared with the floor and with one another."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import short_commit
from benchmarks.resume import digest

OURS = {"cpu": "tokensel chunked", "cuda": "tokensel fused"}  # whose figures are compared with the targets


def key_of(machine: dict) -> str:
    """A name for files and tables, each with a table of its own: "cpu_avx2" or, of older results, "cpu"; of a GPU its
    own, such as "nvidia_h200"."""
    if machine["device"] == "cuda":
        return re.sub(r"\W+", "_", machine["gpu"].lower())
    return "_".join([machine["device"], *machine.get("capability", "").lower().split()])


@dataclass
class Results:
    """What one machine has measured."""

    machine: dict
    records: list[dict]
    load: float
    folder: Path

    @property
    def digest(self) -> str:
        return digest(self.records)

    @property
    def key(self) -> str:
        return key_of(self.machine)

    @property
    def main_dtype(self) -> str:
        """The type that the machine's cases are measured in, but for a few."""
        return "float32" if self.machine["device"] == "cpu" else "bfloat16"

    def of(self, work: str, **wanted: object) -> list[dict]:
        fields = {"work": work, **wanted}
        return [r for r in self.records if all(r["case"].get(key) == value for key, value in fields.items())]


def load(paths: list[Path]) -> dict[str, Results]:
    """Results by `key_of` their machine.

    Raises:
        ValueError: a file that is not one of results, or results of two machines, or two states of one.
    """
    results: dict[str, Results] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            machine, records, busy = content["machine"], content["records"], float(content["load"])
            before = results.setdefault(key_of(machine), Results(machine, [], busy, path.parent))
            here = [record["name"] for record in records]
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); `make bench` writes one") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} holds no results of `pytest benchmarks --results`: {error!r}") from error
        if differing := [
            f"{key}: {before.machine.get(key)} and {machine.get(key)}"
            for key in sorted(before.machine | machine)
            if before.machine.get(key) != machine.get(key)
        ]:
            raise ValueError(
                f"{path} is of another machine or state than the files before it ({', '.join(differing)}); figures of "
                "two are not mixed in one table: report them one at a time"
            )
        names = {record["name"] for record in before.records}
        if twice := [name for name in here if name in names]:
            raise ValueError(f"{path} holds {twice[0]} again, which a file before it has measured; give each file once")
        before.records += records
    return results


def of_floor(record: dict, way: str) -> float | None:
    median = record["ways"].get(way, {}).get("median")
    return median / record["floor"] if median and record.get("floor") else None


def ratio(record: dict, way: str, other: str, what: str = "median") -> float | None:
    """How many times as much of `what` (median seconds, extra_mib) `way` takes as `other`."""
    a, b = (record["ways"].get(name, {}).get(what) for name in (way, other))
    return a / b if a is not None and b else None  # no memory seen at all is too little to be compared with


def machine_line(results: Results) -> str:
    m = results.machine
    place = f"{m['gpu']}, " if "gpu" in m else ""
    busy = f"; load average {results.load:.1f} at the start, so others ran" if results.load > 0.5 else ""
    place += f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    return f"{place}, PyTorch {m['torch']}, commit {short_commit(m['commit'])}{busy}"
