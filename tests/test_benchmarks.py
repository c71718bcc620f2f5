"""The benchmark suite itself: that it measures what it says, and keeps what it has."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, measure, peers
from benchmarks.cases import SETS, Case
from benchmarks.inputs import INPUTS

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ONCE = {"rounds": (1, 1)}


def pytest_benchmarks(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def small(work: str, dtype: str = "float32", **fields) -> Case:
    return Case(work, work, "tiny", fields.pop("tokens", 100), dtype, **fields)


@pytest.fixture
def clock():
    return measure.Clock(CPU, flush_mib=1)


@pytest.fixture
def ways(monkeypatch):
    """Replaces the ways of pair_stats by those of a test."""

    def replace(**functions):
        monkeypatch.setitem(
            peers.WAYS, "pair_stats", {name: lambda s, f=f: lambda: f(s) for name, f in functions.items()}
        )

    return replace


def exact_nll(s):
    return {"nll": [nll.float() for nll in s.exact[1:]]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="`make bench-gpu` runs the real suite")
def test_the_gpu_suite_runs_through_in_the_interpreter(tmp_path):
    output = tmp_path / "new" / "smoke.json"
    done = pytest_benchmarks("--set", "smoke", "--results", output, "--benchmark-disable", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(output.read_text())
    assert {"cpu", "threads", "torch", "commit"} <= set(written["machine"])
    assert [r["name"] for r in written["records"]] == [case.name for case in SETS["smoke"]]
    for record in written["records"]:
        fused = [result for name, result in record["ways"].items() if name.startswith("tokensel fused")]
        assert fused and all("extra_mib" in result for result in fused)
        assert all(result["absent"] == "needs a GPU" for name, result in record["ways"].items() if "Liger" in name)
    assert {case.work for case in SETS["smoke"]} == {case.work for case in SETS["gpu"]} == set(peers.WAYS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("work", ["pair_stats", "kept_backward", "selection_step", "attention_mass"])
def test_every_way_is_right_to_the_precision_of_its_type(work, dtype, clock, monkeypatch):
    # the kernels are in the smoke test, which fails for a wrong output of tokensel's
    unfused = {name: way for name, way in peers.WAYS[work].items() if "fused" not in name}
    monkeypatch.setitem(peers.WAYS, work, unfused)
    torch.compiler.set_stance("force_eager")
    try:
        ways = measure.measure_case(small(work, dtype), CPU, clock, **ONCE)["ways"]
    finally:
        torch.compiler.set_stance("default")
    for name, result in ways.items():
        assert "failed" not in result, result
        for quantity, error in result.get("errors", {}).items():
            if quantity != "kept":  # rows at the edge may be swapped where logits are coarse
                limit = 1e-4 if dtype == "float32" else 2e-2 if name.startswith("tokensel") else 0.2
                assert error <= limit, (name, quantity, error)
        assert not (name.startswith("tokensel") and measure.wrong(result))


@pytest.mark.parametrize("error", [1e-2, math.nan])
def test_a_wrong_output_is_seen(error, clock, ways):
    ways(tokensel=lambda s: {"nll": [nll + error for nll in exact_nll(s)["nll"]]}, other=exact_nll)
    found = measure.measure_case(small("pair_stats"), CPU, clock, **ONCE)["ways"]
    assert measure.wrong(found["tokensel"]) and not measure.wrong(found["other"])


def test_what_a_way_forgets_to_write_is_nan(clock, ways):
    ways(forgetful=lambda s: {"nll": [torch.empty(100), s.exact[2]]})
    assert math.isnan(
        measure.measure_case(small("pair_stats"), CPU, clock, **ONCE)["ways"]["forgetful"]["errors"]["nll"]
    )


def test_memory_of_one_way_runs_out_and_the_others_go_on(clock, ways):
    ways(huge=lambda s: torch.ones(2**45), small=exact_nll)
    found = measure.measure_case(small("pair_stats"), CPU, clock, **ONCE)["ways"]
    assert found["huge"] == {"failed": "out of memory"}
    assert found["small"]["median"] > 0


def test_rounds_are_interleaved_and_medians_taken(clock, ways):
    calls = []
    ways(a=lambda s: calls.append("a"), b=lambda s: calls.append("b"))
    found = measure.measure_case(small("pair_stats"), CPU, clock, rounds=(3, 3))["ways"]
    assert "".join(calls) == "aabb" + "ab" * 3  # first runs and their memory, then rounds
    assert all(
        len(result["seconds"]) == 3 and sorted(result["seconds"])[1] == result["median"] for result in found.values()
    )


@pytest.mark.parametrize("work", ["pair_stats", "kept_backward", "selection_step"])
@pytest.mark.parametrize("way", ["tokensel chunked", "floor"])
def test_operations_are_those_that_are_declared(work, way):
    def in_place(out, a, b, **_):  # PyTorch's counter knows addmm only out of place
        return 2 * a[0] * a[1] * b[1]

    case = small(work, tokens=1280)
    inputs = INPUTS[work](case, CPU)
    run = peers.FLOORS[work](inputs) if way == "floor" else peers.WAYS[work][way](inputs)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    assert counter.get_total_flops() == pytest.approx(case.operations, rel=1e-2)  # ceil(rho n) of each sample are kept


def test_peak_extra_memory_sees_what_was_allocated_and_freed():
    extra, out = measure.peak_extra_mib(lambda: len(torch.ones(64 * 2**20 // 4)), CPU)
    assert 60 < extra < 90 and out == 64 * 2**20 // 4
    assert measure.peak_extra_mib(lambda: None, CPU)[0] < 10


def _extra_memory(work, way):
    """MiB of one way, and of its inputs' gradients; in a process of its own, whose heap has no history."""
    inputs = INPUTS[work](Case("memory", work, "small", 64, "float32"), CPU)
    clock = measure.Clock(CPU, flush_mib=1)
    measured = measure._first_run(way, peers.WAYS[work][way](inputs), inputs, clock)
    return measured["extra_mib"], (inputs.hidden.nbytes + inputs.weight.nbytes) / 2**20


def test_gradients_are_not_counted_as_a_ways_memory():
    logits = 64 * 32000 * 4 / 2**20
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        extra, gradients = fresh.apply(_extra_memory, ("selection_step", "published"))
        assert 2 * logits < extra < 6 * logits < 3 * logits + gradients
        extra, _ = fresh.apply(_extra_memory, ("pair_stats", "published"))
        assert logits < extra  # no gradient is left, none is taken off


def test_an_unknown_case_names_the_known_ones():
    done = pytest_benchmarks("--case", "pair_stats/nonsense")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "'pair_stats/nonsense'" in done.stderr
    assert all(case.name in done.stderr for case in SETS["cpu"])
    assert [c.name for c in cases.chosen("gpu", ["memory/*"])] == [c.name for c in SETS["gpu"] if c.group == "memory"]


def test_growth_is_measured_beside_the_published_way_alone():
    grown = next(case for case in SETS["gpu"] if case.group == "growth")
    assert list(peers.ways_of(grown)) == ["tokensel chunked", "tokensel fused", "published"]


def test_case_names_are_unique():
    for chosen in SETS.values():
        assert len({case.name for case in chosen}) == len(chosen)
