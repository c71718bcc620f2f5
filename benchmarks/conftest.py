"""Options of `pytest benchmarks`, and its file of results. Here, because pytest asks the folder that it is given."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import resume
from benchmarks.machine import machine
from benchmarks.speed import cases, measure
from benchmarks.speed.peers import ways_of


def pytest_addoption(parser):
    group = parser.getgroup("tokensel benchmarks")
    group.addoption("--set", default="cpu", choices=sorted(cases.SETS), help="which cases (default: cpu)")
    group.addoption("--case", action="append", default=[], help="only cases of this name; * matches anything")
    group.addoption("--results", type=Path, help="JSON file, written after every case; one of the same state goes on")
    group.addoption("--fresh", action="store_true", help="measure every case anew, whatever --results has")
    group.addoption("--minutes", type=float, default=float("inf"), help="start no case after so many")


def pytest_configure(config):
    wanted = config.getoption("--set")
    try:
        config.chosen = cases.chosen(wanted, config.getoption("--case"))
    except ValueError as error:
        raise pytest.UsageError(f"--case: {error}") from error
    config.device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    if wanted == "gpu" and config.device.type != "cuda":
        raise pytest.UsageError("--set gpu needs a GPU; `make bench-smoke` runs the same code without one")
    if wanted == "smoke" and config.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("--set smoke without a GPU needs TRITON_INTERPRET=1; `make bench-smoke` sets it")
    if wanted == "smoke":
        torch.compiler.set_stance("force_eager")  # a minute of compiling would show nothing


def pytest_generate_tests(metafunc):
    pairs = [(case, way) for case in metafunc.config.chosen for way in ways_of(case)]
    ids = [f"{case.name}-{way}" for case, way in pairs]
    metafunc.parametrize(("measured", "way"), pairs, ids=ids, indirect=["measured"])


class Results:
    """The records of a run; on disk after every one of them, so that an interrupted run keeps what it has."""

    def __init__(self, config: pytest.Config) -> None:
        self.device, self.path = config.device, config.getoption("--results")
        self.until = time.monotonic() + 60 * config.getoption("--minutes")
        smoke = config.getoption("--set") == "smoke"
        self.clock = measure.Clock(config.device, flush_mib=1 if smoke else 256)
        self.rounds = {"rounds": (1, 1)} if smoke else {}
        self.content = {"machine": machine(config.device), "load": os.getloadavg()[0], "records": []}
        if self.path and self.path.exists() and not config.getoption("--fresh"):
            plugin = config.pluginmanager.get_plugin
            with plugin("capturemanager").global_and_fixture_disabled():  # on the terminal, not in a test's output
                self.content = self.continued(plugin("terminalreporter").write_line)

    def continued(self, say: Callable[[str], None]) -> dict:
        """What an interrupted run of this machine and commit has left, or the new content."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            measured_on, finished = content["machine"], len(content["records"])
        except (ValueError, KeyError, TypeError):
            measured_on, finished = None, 0
        if measured_on == self.content["machine"]:
            say(f"\n{self.path}: {finished} cases are kept; --fresh measures them anew")
            return content
        say(f"\n{self.path} is of another machine, commit or version: every case is measured anew")
        return self.content

    def of(self, case: cases.Case) -> dict:
        records = self.content["records"]
        for record in records:
            if record["name"] == case.name:
                return record
        if time.monotonic() > self.until:
            pytest.skip("no time left (--minutes)")
        record = measure.measure_case(case, self.device, self.clock, **self.rounds)
        records.append(record)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            resume.write(self.path, self.content, indent=1)
        return record


@pytest.fixture(scope="session")
def results(pytestconfig):
    return Results(pytestconfig)


@pytest.fixture
def measured(request, results):
    """The record of a case: all its ways are measured in turn, when the first of them asks."""
    return results.of(request.param)
