"""How a case is measured: every way's output checked, peak memory, then all ways in turn, round after round."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.cases import Case
from benchmarks.speed.floors import FLOORS, native_floor
from benchmarks.speed.inputs import INPUTS, Inputs
from benchmarks.speed.losses import Absent
from benchmarks.speed.peers import ways_of

R = TypeVar("R")
ENOUGH = 3.0  # seconds of rounds
# Seconds of a first run, and how often a way that takes longer is run again at most; a quicker one as the others are.
MOST = {30.0: 0, 10.0: 2}
# The largest errors that tokensel may make; what others make is printed beside their times.
LIMITS = {"nll": 2e-3, "loss": 2e-3, "kept": 0, "d_hidden": 2e-2, "d_weight": 2e-2, "mass": 2e-3}
# Of a whole model's step, whose bfloat16 layers move a few tokens across the edge of what is kept.
LIMITS |= {"kept_count": 0, "kept_share": 5e-2, "d_head": 5e-2, "d_layer": 1e-1}


class Clock:
    """Seconds of a run and of the parts that it marks; on a GPU by events, with the caches flushed before."""

    def __init__(self, device: torch.device, flush_mib: int = 256) -> None:
        self.gpu = device.type == "cuda"
        # written to: memory that is only promised would be counted for the way that is measured first
        self.flush = torch.ones(flush_mib * 2**20, dtype=torch.uint8, device=device)
        self.marks: list[tuple[str, object]] = []

    def mark(self, part: str) -> None:
        at = time.perf_counter()
        if self.gpu:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        self.marks.append((part, at))

    def time(self, run: Callable[[], object]) -> tuple[float, dict[str, float], object]:
        """(seconds, seconds of each part, what the run returned)."""
        self.flush.zero_()
        self.marks = []
        self.mark("start")
        out = run()
        self.mark("end")
        if self.gpu:
            torch.cuda.synchronize()
        parts = {
            name: before.elapsed_time(at) / 1e3 if self.gpu else at - before
            for (_, before), (name, at) in zip(self.marks, self.marks[1:], strict=False)
        }
        return sum(parts.values()), {name: s for name, s in parts.items() if name != "end"}, out


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_extra_mib(run: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """(most memory while `run()` runs, above what there was before, MiB; what it returned). On a CPU resident memory,
    Linux only; on a GPU allocated memory. `tokensel.metrics.peak_memory_mib` is another: a process's from its start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, out
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed goes back, or this one would seem to need less
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    before = _status_kib("VmRSS:")
    out = run()
    return (_status_kib("VmHWM:") - before) / 1024, out


@contextlib.contextmanager
def limited_memory(device: torch.device) -> Iterator[None]:
    """Makes a CPU allocation fail that the machine's memory cannot hold, where Linux would end the process."""
    if device.type != "cpu" or not Path("/proc/meminfo").exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    available = next(int(s.split()[1]) for s in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in s)
    resource.setrlimit(resource.RLIMIT_DATA, ((_status_kib("VmData:") + available * 9 // 10) * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


class Poisoned(TorchDispatchMode):
    """Fills what is allocated without a value with NaN, so that what a way forgets to write is seen."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith(("aten::empty", "aten::new_empty")) and name != "aten::empty_strided":
            return out.fill_(torch.nan) if out.is_floating_point() else out
        return out


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _reason(error: Exception) -> str:
    reason = "out of memory" if _is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    return reason.splitlines()[0][:200]


def measure_case(case: Case, device: torch.device, clock: Clock, rounds: tuple[int, int] = (3, 20)) -> dict:
    """Everything about a case that goes into the results. A way that fails is recorded, and the others go on.

    rounds: at least and at most; as many as fit in ENOUGH, fewer of a slow way (MOST).
    """
    record = {"name": case.name, "case": asdict(case), "operations": case.operations, "bytes": case.bytes}
    torch.compiler.reset()  # or an earlier case's shape would make this one's code that of dynamic shapes
    with limited_memory(device):
        try:
            inputs = INPUTS[case.work](case, device)
        except Exception as error:  # recorded, or every way would try again
            return record | {"floor": None, "ways": {name: {"failed": _reason(error)} for name in ways_of(case)}}
        ways: dict[str, dict] = {}
        runs: dict[str, Callable] = {}
        for name, prepare in ways_of(case).items():
            ways[name] = {}
            try:
                runs[name] = prepare(inputs)
                ways[name] |= _first_run(name, runs[name], inputs, clock)
            except (Absent, ImportError) as error:
                ways[name]["absent"] = str(error)
            except Exception as error:  # others' code may fail in its own ways: recorded, and shown in the table
                ways[name]["failed"] = _reason(error)
            if "first_run" not in ways[name]:
                runs.pop(name, None)
            _forget(inputs)
        if case.group == "memory":
            return record | {"ways": ways}
        floors: dict[str, dict] = {"floor": {}, "native_floor": {}}
        for name, prepare in {"floor": FLOORS[case.work], "native_floor": native_floor}.items():
            try:
                if run := prepare(inputs):
                    floors[name]["first_run"], _, _ = clock.time(run)
                    runs[name] = run
            except Exception as error:
                floors[name]["failed"] = _reason(error)
        _rounds({name: (ways | floors)[name] for name in runs}, runs, inputs, clock, rounds)
        scale = case.operations / (2 * inputs.square**3) if case.work in ("attention_mass", "training_step") else 1.0
        floor = floors["floor"].get("median")
        record |= {"floor": floor and scale * floor, "ways": ways}
        if case.work in ("pair_stats", "kept_backward", "selection_step"):
            native = floors["native_floor"]
            record["native_floor"] = native.get("median") if native else record["floor"]
        return record


def _rounds(results: dict[str, dict], runs: dict[str, Callable], inputs: Inputs, clock: Clock, rounds: tuple) -> None:
    """Runs all ways in turn on the same new values, round after round, and adds seconds and medians to their results.
    The first runs, poisoned and not interleaved, count for nothing, but where there is no other."""
    most = {
        name: next((runs for seconds, runs in MOST.items() if result["first_run"] > seconds), rounds[1])
        for name, result in results.items()
    }
    for name, result in results.items():
        result |= {"seconds": [] if most[name] else [result["first_run"]], "parts": {}}
    started = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - started > ENOUGH:
            break
        inputs.redraw()
        for name, result in results.items():
            if done >= most[name] or "failed" in result:
                continue
            try:
                seconds, parts, _ = clock.time(runs[name])
            except Exception as error:  # what the others have is kept
                result["failed"] = _reason(error)
                _forget(inputs)
                continue
            result["seconds"].append(seconds)
            for part, value in parts.items():
                result["parts"].setdefault(part, []).append(value)
            inputs.clear()
    for result in results.values():
        if result["seconds"] and "failed" not in result:
            result["median"] = statistics.median(result["seconds"])
        result["parts"] = {part: statistics.median(values) for part, values in result["parts"].items()}


def _first_run(name: str, run: Callable, inputs: Inputs, clock: Clock) -> dict:
    """Errors, peak memory and seconds of a way. One that is quick or compiles runs again for the last two, now without
    what libraries allocate once."""

    def measured(run: Callable[[], tuple[float, dict, object]]) -> tuple[float, float, object]:
        extra, (seconds, _, out) = peak_extra_mib(run, inputs.device)
        return extra - sum(t.grad.nbytes for t in inputs.trained if t.grad is not None) / 2**20, seconds, out

    def poisoned() -> tuple[float, dict, object]:
        with Poisoned():
            return clock.time(run)

    inputs.mark = clock.mark
    compiles = "compiled" in name  # which it would not do under a mode; its buffers are not seen by one either
    extra, seconds, out = measured((lambda: clock.time(run)) if compiles else poisoned)
    errors = inputs.errors(out) if out is not None else {}
    del out
    if compiles or seconds < ENOUGH:
        inputs.clear()
        extra, seconds, _ = measured(lambda: clock.time(run))
    return {"first_run": seconds, "extra_mib": max(0.0, extra), "errors": errors}


def _forget(inputs: Inputs) -> None:
    inputs.clear()
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()


def wrong(result: dict) -> dict[str, float]:
    """The errors of a way that are above LIMITS, or no number."""
    return {name: e for name, e in result.get("errors", {}).items() if not e <= LIMITS[name]}
