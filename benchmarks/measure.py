"""How things are measured here: interleaved medians, peak memory in a fresh process, and on which machine."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm

import tokensel

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict:
    """What a figure has to be read with: processor, cores, memory, versions, commit."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokensel": tokensel.__version__,
        "commit": (commit or "unknown") + ("+changes" if changed else ""),
    }


def interleaved_seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times every way once a round, all ways in turn, so that a slow minute of the machine hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_fresh_process(function: Callable, *args: object) -> object:
    """Result of `function(*args)` in a process of its own: no memory that an earlier way has left behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_extra_mib(run: Callable[[], object]) -> float:
    """Most resident memory while `run()` runs, above what there was before, MiB. Linux only."""
    status = Path("/proc/self/status")

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    before = kib("VmRSS:")
    run()
    return (kib("VmHWM:") - before) / 1024
