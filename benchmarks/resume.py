"""Results that survive an interruption, and runs whose failure costs the others nothing."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tokensel.files import replacing

RESULTS = Path(__file__).parent / "results"  # those that are committed


def attempt(function: Callable, *arguments: object, **settings: object) -> object:
    """What the function returns, or {"failed": why}."""
    try:
        return function(*arguments, **settings)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def in_new_process(function: Callable, *arguments: object) -> object:
    """What the function returns in a process of its own, or {"failed": why} where that process is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"failed": "killed; out of memory?"}


def measured(run: object) -> bool:
    """Whether a run has ended well: None is one that has not been started."""
    return run is not None and not (isinstance(run, dict) and "failed" in run)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else fills in these results meanwhile; `path`.lock stays behind, and is nobody's once its process ends.

    Raises:
        BlockingIOError: another process does.
    """
    with open(path.with_name(f"{path.name}.lock"), "ab") as lock:  # "wb" would empty what a link of that name leads to
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"another process is filling in {path}; --output another folder"
            ) from error
        yield


def resume(path: Path, settings: dict, has_form: Callable[[dict], bool] = lambda results: True) -> dict:
    """The file's results, if they are of the same settings; else the settings alone.

    Args:
        has_form: whether an object is one of such results.
    Raises:
        ValueError: the file is no JSON, or holds something else.
    """
    if not path.exists():
        return dict(settings)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; --fresh replaces it") from error
    if not isinstance(results, dict) or not has_form(results):
        raise ValueError(f"{path} is not of this study; --fresh replaces it")
    return results if all(results.get(name) == value for name, value in settings.items()) else dict(settings)


def goes_on(results: dict, settings: dict, path: Path) -> dict:
    """The results with the settings, for results that may come from several machines and commits.

    Raises:
        ValueError: they are of other settings; names these.
    """
    if other := [name for name, value in settings.items() if results.get(name, value) != value]:
        told = ", ".join(f"{name} {results[name]}, not {settings[name]}" for name in other)
        raise ValueError(f"{path} is of other settings ({told}); --output another folder, or --fresh replaces it")
    return results | settings


def write(path: Path, results: dict, indent: int | None = None) -> None:
    """Replaces the file as a whole: whoever interrupts this keeps the one before."""
    with replacing(path) as whole:
        whole.write_text(json.dumps(results, indent=indent) + "\n", encoding="utf-8")


def filled(
    parser: argparse.ArgumentParser,
    path: Path,
    empty: dict,
    settings: dict,
    has_form: Callable[[dict], bool],
    measure: Callable[[dict, Callable[[], None]], None],
    fresh: bool,
) -> dict:
    """The results of a file, once `measure(results, save)` has filled in what they lack; an error ends the program.

    Args:
        empty: the groups of measurements, with nothing in them.
        settings: what results that are gone on with must be of: machine and commit among them.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        results = settings if fresh else resume(path, settings, has_form)
        if path.exists() and not empty.keys() <= results.keys():
            print(f"{path} is given up, or of another machine or commit: everything is measured, and replaces it")
        results = empty | results
        measure(results, lambda: write(path, results))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"\ninterrupted; the same command goes on with what is in {path}\n")
    return results


def digest(content: object) -> str:
    """Names the results that a picture shows: it is in the picture's metadata."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
