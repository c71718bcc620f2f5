"""From GPU results to the table that impl="auto" reads."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from benchmarks.speed import rates, tables
from benchmarks.speed.cases import SETS
from benchmarks.speed.results import load

H200 = "NVIDIA H200"


@pytest.fixture
def results(tmp_path):
    """Writes GPU results whose ways take the given times the floor, case by case."""

    def write(ratios, gpu=H200, device="cuda"):
        records = []
        for case in SETS["gpu"]:
            ways = ratios(case)
            if ways:
                measured = {f"tokensel {impl}": {"median": 0.002 * ratio} for impl, ratio in ways.items()}
                records.append({"name": case.name, "case": dataclasses.asdict(case), "floor": 0.002, "ways": measured})
        machine = {"device": device, "gpu": gpu, "cpu": "C", "cores": 2, "threads": 2, "torch": "2", "commit": "c"}
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps({"machine": machine, "load": 0, "records": records}))
        return path

    return write


def test_rates_are_medians_over_cases_that_both_have_run(results, tmp_path, capsys):
    models = ["Llama-3.1-8B", "Llama-3.2-3B", "Qwen2.5-7B"]

    def ratios(case):
        if case.softcap or case.work == "selection_step":
            return {"fused": 9.0, "chunked": 9.0}  # of another kind
        if case.work == "pair_stats" and case.model in models:
            return {"fused": 1.05 + 0.01 * models.index(case.model), "chunked": 1.2}
        return {"fused": 5.0} if case.work in ("pair_stats", "kept_backward") else {}

    into = tmp_path / "rates.json"
    into.write_text(json.dumps({"another": {"gradient": {"fused": 1.0, "chunked": 2.0}}}))
    rates.main([str(results(ratios)), "--into", str(into)])
    assert json.loads(into.read_text()) == {
        H200: {"statistics": {"fused": 1.06, "chunked": 1.2}},
        "another": {"gradient": {"fused": 1.0, "chunked": 2.0}},
    }
    assert f"{H200}: " in capsys.readouterr().out


def test_a_chip_measured_anew_replaces_what_was_there(results, tmp_path):
    into = tmp_path / "rates.json"
    for chunked in (1.8, 1.7):
        path = results(lambda case, c=chunked: {"fused": 1.1, "chunked": c} if case.work == "kept_backward" else {})
        rates.main([str(path), "--into", str(into)])
    assert json.loads(into.read_text()) == {H200: {"gradient": {"fused": 1.1, "chunked": 1.7}}}


@pytest.mark.parametrize(
    "ratios, device, message",
    [
        (lambda case: {"fused": 1.0}, "cuda", "has no case that both fused and chunked have run"),
        (lambda case: {"fused": 1.0, "chunked": 1.0}, "cpu", "is of a cpu; auto reads the rates of GPUs"),
    ],
)
def test_results_without_rates_are_named_and_nothing_is_written(ratios, device, message, results, tmp_path, capsys):
    into = tmp_path / "rates.json"
    with pytest.raises(SystemExit):
        rates.main([str(results(ratios, device=device)), "--into", str(into)])
    assert message in capsys.readouterr().err and not into.exists()


def test_fused_stands_beside_chunked_and_each_chip_has_a_table_of_its_own(results):
    path = results(lambda case: {"chunked": 1.2, "fused": 1.1} if case.group == "pair_stats" else {})
    names = [row["case"] for row in tables.overview_rows(load([path])["nvidia_h200"])]
    assert names[:2] == [f"pair_stats/Llama-3.1-8B/8192/bfloat16 {impl}" for impl in ("chunked", "fused")]
    one = load([path])
    other = load([results(lambda case: {"fused": 1.3} if case.group == "pair_stats" else {}, gpu="NVIDIA H100 PCIe")])
    page = tables.page(one | other, "cuda", lambda key: f"[{key}]")
    assert page.count("NVIDIA H200, C") == page.count("NVIDIA H100 PCIe, C") == 1
    assert page.count("[nvidia_h200]") == page.count("[nvidia_h100_pcie]") == 1
    first, second = page.split("NVIDIA H100 PCIe, C")
    assert "| ≤ 1.1 | 1.1 |" in first and "| ≤ 1.1 | 1.3 |" in second and "1.3 |" not in first
