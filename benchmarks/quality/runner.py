"""Runs a study: makes the worlds that it needs, fills in the runs that its results lack, keeps each as it ends.

Every task runs on one thread, as many at a time as there are cores.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.worlds import RATE, World, base_nll, fine_tune
from benchmarks.resume import attempt, measured
from tokensel.metrics import peak_memory_mib


@dataclass(frozen=True)
class Run:
    """One fine-tuning, which every seed repeats: in which world, by which method, how."""

    world: tuple
    method: str
    parameters: dict
    steps: int
    rate: float = RATE
    lora: bool = False
    settings: dict = field(default_factory=dict)  # of the trainer
    curves: tuple[str, ...] = ()  # logged values that are kept, step by step


@dataclass(frozen=True)
class Study:
    """What is measured, as data."""

    scale: int
    make_world: Callable[..., World]  # (folder, seed, scale, *arguments)
    worlds: dict[tuple, tuple]  # key of a world -> arguments of make_world
    rows: dict[str, dict[str, Run]]  # label of a row -> column -> its run
    begin: Callable[[Path], dict] = lambda root: {}  # makes what all worlds share; results of that
    bases: bool = False  # record the loss of each world's base
    memory: bool = False  # record the peak memory of each row, whose seeds run in one process of their own


def device_used() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def be_quiet() -> None:
    disable_progress_bar()  # of loading a model; the studies show their own
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def _serve(connection: Connection) -> None:
    """A worker: receives tasks and sends what came out, until the parent is gone or says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    be_quiet()
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            connection.send(attempt(function, *arguments))


class _Worker:
    """A process that runs one task after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # or nobody would notice that the process is gone

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def run_all(function: Callable, tasks: dict, label: str, *, fresh: bool = False) -> Iterator[tuple]:
    """(key, function(*arguments) or how it failed) of every task, as they end. fresh: a new process for each.

    A process that is killed, out of memory say, fails its task alone.
    """
    most = 1 if device_used().type == "cuda" else len(os.sched_getaffinity(0))
    waiting, busy, free = deque(tasks.items()), {}, []
    try:
        with tqdm(total=len(tasks), desc=label, unit="run", disable=not tasks) as bar:
            while waiting or busy:
                while waiting and len(busy) < most:
                    key, arguments = waiting.popleft()
                    worker = free.pop() if free else _Worker()
                    busy[worker.connection] = worker, key
                    worker.connection.send((function, arguments))
                for connection in wait(list(busy)):
                    worker, key = busy.pop(connection)
                    try:
                        result, alive = connection.recv(), True
                    except (EOFError, ConnectionResetError):
                        result, alive = {"failed": "its process was killed; out of memory?"}, False
                    if alive and not fresh:
                        free.append(worker)
                    else:
                        worker.end()
                    bar.update()
                    yield key, result
    finally:
        for worker in [*free, *(worker for worker, _ in busy.values())]:
            worker.end()


def _tune(world: World | dict, run: Run) -> dict:
    """The result of a run, or why its world failed."""
    if not isinstance(world, World):
        return world
    how = {"steps": run.steps, "rate": run.rate, "lora": run.lora, "curves": run.curves}
    return fine_tune(world, run.method, run.parameters, **how, **run.settings)


def _tune_all(worlds: list[World | dict], run: Run) -> tuple[list[dict], float]:
    """A run in each of the worlds, and the peak memory of this process in MiB."""
    return [attempt(_tune, world, run) for world in worlds], peak_memory_mib(device_used())


def _places(study: Study, before: dict, seeds: int) -> dict:
    """row -> column -> a list over seeds, with what was measured before, None where there is nothing yet."""
    rows = {}
    for label, runs in study.rows.items():
        old = before.get(label, {})
        rows[label] = {column: old.get(column, [None] * seeds) for column in runs}
        if study.memory:
            (run,) = runs.values()
            rows[label] |= {"peak_mib": old.get("peak_mib"), "method": run.method}
            rows[label] |= {"parameters": run.parameters, "settings": run.settings}
    return rows


def _waiting(study: Study, rows: dict, seeds: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """(row, column, seeds) of every task; the seeds of a row whose memory is measured are one task."""
    tasks = []
    for label, runs in study.rows.items():
        for column in runs:
            lacking = tuple(seed for seed in range(seeds) if not measured(rows[label][column][seed]))
            if lacking and study.memory:
                tasks.append((label, column, tuple(range(seeds))))
            else:
                tasks += [(label, column, (seed,)) for seed in lacking]
    return tasks


def run_study(study: Study, results: dict, save: Callable[[], None], seeds: int) -> None:
    """Fills results["rows"] with the runs that it lacks, and saves each as it ends."""
    rows = results["rows"] = _places(study, results.get("rows", {}), seeds)
    if not (waiting := _waiting(study, rows, seeds)):
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results |= study.begin(root)
        needed = {
            (key, seed): (root / "-".join(map(str, (*key, seed))), seed, study.scale, *study.worlds[key])
            for label, column, of_seeds in waiting
            for key, seed in ((study.rows[label][column].world, seed) for seed in of_seeds)
        }
        worlds = dict(run_all(study.make_world, needed, "bases and recorded losses"))
        if study.bases:
            results["base_nll"] = [base_nll(worlds[key]) for key in needed if isinstance(worlds[key], World)]
        tasks = {
            (label, column, of_seeds): ([worlds[run.world, seed] for seed in of_seeds], run)
            for label, column, of_seeds in waiting
            for run in (study.rows[label][column],)
        }
        for (label, column, of_seeds), (runs, peak) in run_all(_tune_all, tasks, "runs", fresh=study.memory):
            for seed, run in zip(of_seeds, runs, strict=True):
                rows[label][column][seed] = run
            if study.memory:
                rows[label]["peak_mib"] = peak
            save()
