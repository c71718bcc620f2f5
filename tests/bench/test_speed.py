"""The benchmark suite itself: that it measures what it says, and keeps what it has."""

from __future__ import annotations

import itertools
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

from benchmarks.machine import machine
from benchmarks.speed import cases, floors, measure, peers
from benchmarks.speed.cases import SETS, Case
from benchmarks.speed.inputs import INPUTS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ONCE = {"rounds": (1, 1)}
HEADS = ["pair_stats", "kept_backward", "selection_step"]


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
@pytest.mark.slow
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


@pytest.mark.parametrize("work", ["pair_stats", "kept_backward"])
def test_every_way_that_takes_a_softcap_is_right(work, clock, monkeypatch):
    monkeypatch.setitem(peers.WAYS, work, {n: way for n, way in peers.WAYS[work].items() if "fused" not in n})
    torch.compiler.set_stance("force_eager")
    try:
        ways = measure.measure_case(small(work, softcap=1.5), CPU, clock, **ONCE)["ways"]
    finally:
        torch.compiler.set_stance("default")
    assert ways["torch"]["absent"] == "has no softcap"
    measured = {name: result for name, result in ways.items() if "absent" not in result}
    assert set(measured) - {"TRL chunked"} == {"tokensel chunked", "published", "compiled chunks"}  # TRL may be missing
    assert all(error <= 1e-4 for result in measured.values() for error in result["errors"].values())


@pytest.mark.parametrize("error", [1e-2, math.nan])
def test_a_wrong_output_is_seen(error, clock, ways):
    ways(tokensel=lambda s: {"nll": [nll + error for nll in exact_nll(s)["nll"]]}, other=exact_nll)
    results = measure.measure_case(small("pair_stats"), CPU, clock, **ONCE)["ways"]
    assert measure.wrong(results["tokensel"]) and not measure.wrong(results["other"])


@pytest.mark.parametrize(
    ("work", "way", "spoilt"),
    [
        *[("pair_stats", "tokensel chunked", f"nll {i}") for i in (0, 1)],
        *[("stats_from_logits", "tokensel chunked", f"nll {i}") for i in (0, 1)],
        *[("selection_step", "tokensel chunked", f) for f in ("loss", "hidden", "weight", "half")],
        *[("attention_mass", "tokensel chunked", f) for f in ("mass", "one row", "prompt")],
        *[("training_step", "tokensel chunked, recorded", f) for f in ("loss", "gradients", "layer", "half")],
    ],
)
def test_a_spoilt_output_is_seen(work, way, spoilt, clock, monkeypatch):
    def spoil(inputs):
        run = prepare(inputs)

        def spoilt_run():
            out = run()
            if spoilt.startswith("nll"):
                nll = list(out["nll"])
                nll[int(spoilt[-1])] = torch.full_like(nll[0], math.nan)
                return {"nll": nll}
            if spoilt in ("loss", "mass"):
                out[spoilt] = out[spoilt] * math.nan
            elif spoilt == "one row":
                out["mass"][0, -2] = math.nan
            elif spoilt == "prompt":
                out["mass"][0, 0] = 0.5
            elif spoilt in ("hidden", "weight"):
                getattr(inputs, spoilt).grad.fill_(math.nan)
            elif spoilt == "gradients":
                for weight in inputs.trained:
                    weight.grad.fill_(math.nan)
            elif spoilt == "layer":
                inputs.model.model.layers[0].mlp.down_proj.weight.grad.mul_(0.5)
            else:
                out["keep"] = out["keep"] & (torch.arange(out["keep"].shape[-1]) % 2 == 0)
            return out

        return spoilt_run

    prepare = peers.WAYS[work][way]
    monkeypatch.setitem(peers.WAYS, work, {"tokensel": prepare, "tokensel spoilt": spoil})
    results = measure.measure_case(small(work, batch=2 if work == "training_step" else 1), CPU, clock, **ONCE)["ways"]
    assert "errors" in results["tokensel spoilt"] and measure.wrong(results["tokensel spoilt"])
    assert not measure.wrong(results["tokensel"]), results["tokensel"]


def test_what_a_way_forgets_to_write_is_nan(clock, ways):
    ways(forgetful=lambda s: {"nll": [torch.empty(100), s.exact[2]]})
    assert math.isnan(
        measure.measure_case(small("pair_stats"), CPU, clock, **ONCE)["ways"]["forgetful"]["errors"]["nll"]
    )


def test_memory_of_one_way_runs_out_and_the_others_go_on(clock, ways):
    ways(huge=lambda s: torch.ones(2**45), small=exact_nll)
    results = measure.measure_case(small("pair_stats"), CPU, clock, **ONCE)["ways"]
    assert results["huge"] == {"failed": "out of memory"}
    assert results["small"]["median"] > 0


def test_inputs_that_do_not_fit_are_recorded_and_tried_once(clock, monkeypatch):
    tried = []

    def inputs(case, device):
        tried.append(case)
        torch.ones(2**45)

    monkeypatch.setitem(measure.INPUTS, "pair_stats", inputs)
    record = measure.measure_case(small("pair_stats"), CPU, clock)
    assert record["floor"] is None and len(tried) == 1
    assert record["ways"] == {way: {"failed": "out of memory"} for way in peers.WAYS["pair_stats"]}


def test_memory_runs_out_in_a_round_or_in_the_floor_and_the_others_go_on(clock, ways, monkeypatch):
    calls = []

    def later(s):
        calls.append(1)
        return torch.ones(2**45) if len(calls) == 4 else exact_nll(s)  # first run, its memory, two rounds

    ways(later=later, small=exact_nll)
    monkeypatch.setitem(floors.FLOORS, "pair_stats", lambda s: torch.ones(2**45))
    record = measure.measure_case(small("pair_stats"), CPU, clock, rounds=(3, 3))
    later, finished = (record["ways"][way] for way in ("later", "small"))
    assert later["failed"] == "out of memory" and len(later["seconds"]) == 1 and "median" not in later
    assert len(finished["seconds"]) == 3 and finished["median"] > 0
    assert record["floor"] is None and record["native_floor"] is None


@pytest.mark.parametrize(("first", "counted"), [(5, [4] * 3), (20, [4] * 2), (60, [60])])
def test_first_runs_count_where_there_is_no_other_and_slow_ways_run_less_often(
    first, counted, clock, ways, monkeypatch
):
    ways(slow=lambda s: s.mark("part"))
    times = itertools.chain([first], itertools.repeat(4))
    monkeypatch.setattr(clock, "time", lambda run: (run(), next(times), {}, None)[1:])
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    slow = measure.measure_case(small("pair_stats"), CPU, clock)["ways"]["slow"]
    assert slow["seconds"] == counted and slow["median"] == counted[0]


def test_rounds_have_new_values_that_are_the_same_for_all_ways(clock, ways):
    seen = {"a": [], "b": []}

    def look(way):
        return lambda s: seen[way].append([float(t.sum()) for t in (s.hidden.detach(), s.history_hidden, s.labels)])

    ways(a=look("a"), b=look("b"))
    for _ in range(2):
        measure.measure_case(small("pair_stats"), CPU, clock, rounds=(3, 3))
    assert seen["a"] == seen["b"] and seen["a"][:5] == seen["a"][5:]  # seeded
    first, again, *rounds = seen["a"][:5]
    assert first == again and len({values for round in (first, *rounds) for values in round}) == 4 * 3


@pytest.mark.parametrize("work", ["attention_mass", "selection_step", "stats_from_logits", "training_step"])
def test_outputs_are_right_for_new_values_too(work):
    inputs = INPUTS[work](small(work), CPU)
    runs = {way: prepare(inputs) for way, prepare in peers.WAYS[work].items() if way.startswith("tokensel chunked")}
    for run in runs.values():
        run()
        inputs.clear()
    inputs.redraw()
    for way, run in runs.items():
        errors = inputs.errors(run())
        errors.pop("kept_share", None)
        inputs.clear()
        assert not measure.wrong({"errors": errors}), (way, errors)


def test_rounds_are_interleaved_and_medians_taken(clock, ways):
    calls = []
    ways(a=lambda s: calls.append("a"), b=lambda s: calls.append("b"))
    results = measure.measure_case(small("pair_stats"), CPU, clock, rounds=(3, 3))["ways"]
    assert "".join(calls) == "aabb" + "ab" * 3  # first runs and their memory, then rounds
    assert all(
        len(result["seconds"]) == 3 and sorted(result["seconds"])[1] == result["median"] for result in results.values()
    )


@pytest.mark.parametrize(
    ("work", "way"),
    [
        *[(work, way) for work in HEADS for way in ("tokensel chunked", "floor", "native floor")],
        ("attention_mass", "tokensel chunked"),
        ("training_step", "tokensel chunked, recorded"),
    ],
)
def test_operations_are_those_that_are_declared(work, way):
    def in_place(out, a, b, **_):  # PyTorch's counter knows addmm only out of place, and no attention of a CPU
        return 2 * a[0] * a[1] * b[1]

    def attention(q, *_, **__):
        return 2 * math.prod(q) * q[2]  # two products, half of each by causality

    def attention_backward(out, *_, **__):
        return 2 * attention(out)  # the scores, computed again, are not counted

    aten = torch.ops.aten
    mapping = {
        aten.addmm_: in_place,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    case = small(work, "bfloat16" if way == "native floor" else "float32", tokens=1280)
    inputs = INPUTS[work](case, CPU)
    made = {"floor": floors.FLOORS[work], "native floor": floors.native_floor}
    run = made[way](inputs) if way in made else peers.WAYS[work][way](inputs)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    # ceil(rho n) of each sample are kept; the mass computes the blocks on the diagonal whole
    error = 0.15 if work == "attention_mass" else 1e-2
    assert counter.get_total_flops() == pytest.approx(case.operations, rel=error)


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


@pytest.mark.slow
def test_gradients_are_not_counted_as_a_ways_memory():
    logits = 64 * 32000 * 4 / 2**20
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        extra, gradients = fresh.apply(_extra_memory, ("selection_step", "published"))
        assert 2 * logits < extra < 6 * logits < 3 * logits + gradients
        extra, _ = fresh.apply(_extra_memory, ("pair_stats", "published"))
        assert logits < extra  # no gradient is left, none is taken off


@pytest.mark.slow
def test_an_interrupted_run_goes_on_unless_it_is_of_another_state(tmp_path):
    output = tmp_path / "results.json"
    smoke = ("--set", "smoke", "--results", output, "--benchmark-disable")
    case = "stats_from_logits/tiny/24/float32"

    def run(*arguments):
        done = pytest_benchmarks(*smoke, *arguments, TRITON_INTERPRET="1", TOKENSEL_COMMIT="abc")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(output.read_text()), done.stdout

    first, _ = run("--case", case)
    assert first["machine"]["commit"] == "abc" and [r["name"] for r in first["records"]] == [case]
    both, said = run("--case", case, "--case", "memory/*")
    assert both["records"][0] == first["records"][0] and len(both["records"]) == 2 and "1 cases are kept" in said
    anew, said = run("--case", case, "--fresh")
    assert len(anew["records"]) == 1 and anew["records"] != first["records"] and "kept" not in said
    output.write_text(json.dumps(anew | {"machine": anew["machine"] | {"commit": "older"}}))
    other, said = run("--case", "memory/*")
    assert [r["case"]["group"] for r in other["records"]] == ["memory"] and "another machine, commit" in said


def test_the_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine(CPU)["commit"] == "unknown"


@pytest.mark.slow
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
