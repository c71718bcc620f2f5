"""What is made of the benchmarks' results: tables, targets, plots."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import measure, peers, plots, tables, targets
from benchmarks.speed.cases import Case
from benchmarks.speed.results import load, machine_line, ratio

CPU = torch.device("cpu")
ONCE = {"rounds": (1, 1)}


@pytest.fixture
def clock():
    return measure.Clock(CPU, flush_mib=1)


def write_results(path: Path, records=(), **machine) -> Path:
    content = {
        "machine": {"device": "cpu", "cpu": "A", "cores": 2, "threads": 2, "torch": "2", "commit": "c", **machine}
    }
    path.write_text(json.dumps(content | {"load": 0, "records": list(records)}))
    return path


def test_results_of_two_machines_are_never_mixed(tmp_path):
    here, there = write_results(tmp_path / "here.json"), write_results(tmp_path / "there.json", cpu="B")
    more = write_results(tmp_path / "more.json", [{"name": "a"}])
    assert [record["name"] for record in load([here, more])["cpu"].records] == ["a"]
    with pytest.raises(ValueError, match="more.json holds a again"):
        load([more, more])
    with pytest.raises(ValueError, match=r"there.json is of another machine.*cpu: A and B"):
        load([here, there])
    gpus = [write_results(tmp_path / f"{gpu}.json", device="cuda", gpu=gpu) for gpu in ("NVIDIA H100 80GB HBM3", "G")]
    assert set(load([here, *gpus])) == {"cpu", "nvidia_h100_80gb_hbm3", "g"}


def test_a_line_of_a_machine_says_whether_its_files_had_changes(tmp_path):
    for commit, told in (("0123456789abcdef", "0123456789"), ("0123456789abcdef+changes", "0123456789+changes")):
        results = load([write_results(tmp_path / "some.json", commit=commit)])["cpu"]
        assert machine_line(results).endswith(f"commit {told}")


def test_a_file_that_holds_no_results_is_named(tmp_path):
    for content in ("{}", "[]", "no JSON"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match="other.json holds no results"):
            load([tmp_path / "other.json"])


def test_a_file_that_is_not_there_is_a_line_not_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.main([str(tmp_path / "nope.json")])
    assert stop.value.code == 2 and "nope.json cannot be read (No such file or directory)" in capsys.readouterr().err


def test_what_was_not_measured_says_so(tmp_path):
    own = load([write_results(tmp_path / "empty.json")])["cpu"]
    rows = [target.row(own) for target in targets.TARGETS]
    assert (
        len(rows) == 20 and {row["measured"] for row in rows} == {"not measured"} and {row[""] for row in rows} == {""}
    )


def record(group="step", work="selection_step", **ways) -> dict:
    case = Case(group, work, "tiny", 40, "float32")
    return {"name": case.name, "case": dataclasses.asdict(case), "operations": 2e9, "bytes": 1e9, "ways": ways}


def test_what_did_not_run_says_why_in_every_table(tmp_path):
    ways = {"tokensel chunked": {"failed": "out of memory"}, "published": {"median": 2.0, "extra_mib": 7.0}}
    ways |= {"CCE": {"absent": "needs a GPU"}}
    results = load([write_results(tmp_path / "some.json", [record(**ways)])])["cpu"]
    ours, published, absent = tables.case_rows(results)
    assert ours["time"] == ours["extra MiB"] == published["/ ours"] == absent["time"] == "not measured"
    assert ours["errors, or why not"] == "out of memory" and absent["errors, or why not"] == "needs a GPU"
    assert published["rate"] == "1 GFLOP/s"
    (step, _) = tables.step_rows(results)
    assert step["float32: time"] == "out of memory" and step["float32: extra MiB"] == "not measured"
    (row,) = tables.overview_rows(results)
    assert row["tokensel"] == "out of memory" and row["fastest peer"] == "published" and row["of that peer"] == "7"
    assert "Not run there: CCE (needs a GPU)." in tables.page({"cpu": results}, "cpu")


def test_a_ratio_to_no_memory_at_all_is_no_ratio():
    measured = record(ours={"extra_mib": 0.0}, other={"extra_mib": 5.0})
    assert ratio(measured, "other", "ours", "extra_mib") is None
    assert ratio(measured, "ours", "other", "extra_mib") == 0


def test_the_attention_itself_is_no_peer_of_its_mass(tmp_path):
    ways = {name: {"median": s} for name, s in (("tokensel chunked", 4.0), ("flash forward", 1.0), ("SDPA", 2.0))}
    results = load([write_results(tmp_path / "some.json", [record(work="attention_mass", **ways)])])["cpu"]
    (row,) = tables.overview_rows(results)
    assert row["fastest peer"] == "SDPA" and row["its time / ours"] == "0.50"


def test_growth_is_the_slope_over_all_lengths(tmp_path):
    def at(tokens, mib):
        case = dataclasses.asdict(Case("attention_mass", "attention_mass", "CPU-sized", tokens, "float32"))
        return {"name": str(tokens), "case": case, "ways": {"tokensel chunked": {"extra_mib": mib}}}

    for mib, slope in (([1.0, 2.0, 4.0], 1), ([1.0, 4.0, 16.0], 2), ([1.0, 4.0, 4.0], 1)):
        records = [at(512 * 2**i, value) for i, value in enumerate(mib)]
        results = load([write_results(tmp_path / "some.json", records)])["cpu"]
        assert targets._mass_growth(results) == [pytest.approx(slope)]


def test_a_target_is_met_by_its_worst_case_alone(tmp_path):
    results = load([write_results(tmp_path / "some.json")])["cpu"]
    target = targets.Target("cpu", "t", True, 1.15, lambda _: [1.0, None, 1.2])
    assert target.row(results)[""] == "**not met**" and target.row(results)["measured"] == "1.2"
    assert targets.Target("cpu", "t", False, 1.0, lambda _: [1.0, 1.2]).row(results)[""] == "met"


def test_the_command_prints_tables_and_writes_plots(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    only = {name: peers.WAYS["selection_step"][name] for name in ("tokensel chunked", "published")}
    monkeypatch.setitem(peers.WAYS, "selection_step", only)
    case = Case("step", "selection_step", "tiny", 40, "float32")
    path = write_results(Path("cpu.json"))
    content = json.loads(path.read_text())
    content["records"] = [measure.measure_case(case, CPU, clock, **ONCE)]
    path.write_text(json.dumps(content))
    tables.main([str(path)])
    printed = capsys.readouterr().out
    assert "/ floor" in printed
    text = tables.page(load([path]), "cpu", lambda key: f"![picture]({key}_time.svg)")
    assert "| published |" in text and "not measured" in text and "![picture](cpu_time.svg)" in text
    assert {f.name for f in Path().glob("cpu_*.*g")} == {f"cpu_{name}.svg" for name in plots.PICTURES}
    assert all(load([path])["cpu"].digest in f.read_text() for f in Path().glob("cpu_*.svg"))


def test_of_a_device_without_results_the_targets_are_shown():
    text = tables.page({}, "cuda")
    assert text.startswith("Nothing has been measured yet (`make bench-gpu`)") and text.count("not measured") == 8
