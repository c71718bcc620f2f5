"""What is made of the benchmarks' results: tables, targets, plots, and README, which shows the committed ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import measure, peers, report
from benchmarks.speed.cases import Case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("[cg]pu.json"))
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
    assert [record["name"] for record in report.load([here, more])["cpu"].records] == ["a"]
    with pytest.raises(ValueError, match="more.json holds a again"):
        report.load([more, more])
    with pytest.raises(ValueError, match=r"there.json is of another machine.*cpu: A and B"):
        report.load([here, there])
    assert set(report.load([here, write_results(tmp_path / "gpu.json", device="cuda", gpu="G")])) == {"cpu", "cuda"}


def test_a_file_that_holds_no_results_is_named(tmp_path):
    for content in ("{}", "[]", "no JSON"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match="other.json holds no results"):
            report.load([tmp_path / "other.json"])


def test_a_file_that_is_not_there_is_a_line_not_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "nope.json")])
    assert stop.value.code == 2 and "nope.json cannot be read (No such file or directory)" in capsys.readouterr().err


def test_what_was_not_measured_says_so(tmp_path):
    results = report.load([write_results(tmp_path / "empty.json")])
    rows = [target.row(results) for target in report.TARGETS]
    assert (
        len(rows) == 18 and {row["measured"] for row in rows} == {"not measured"} and {row[""] for row in rows} == {""}
    )


def record(group="step", work="selection_step", **ways) -> dict:
    case = Case(group, work, "tiny", 40, "float32")
    return {"name": case.name, "case": dataclasses.asdict(case), "operations": 2e9, "bytes": 1e9, "ways": ways}


def test_what_did_not_run_says_why_in_every_table(tmp_path):
    ways = {"tokensel chunked": {"failed": "out of memory"}, "published": {"median": 2.0, "extra_mib": 7.0}}
    ways |= {"CCE": {"absent": "needs a GPU"}}
    results = report.load([write_results(tmp_path / "some.json", [record(**ways)])])["cpu"]
    ours, published, absent = report.case_rows(results)
    assert ours["time"] == ours["extra MiB"] == published["/ ours"] == absent["time"] == "not measured"
    assert ours["errors, or why not"] == "out of memory" and absent["errors, or why not"] == "needs a GPU"
    assert published["rate"] == "1 GFLOP/s"
    (step, _) = report.step_rows(results)
    assert step["float32: time"] == "out of memory" and step["float32: extra MiB"] == "not measured"
    (row,) = report.overview_rows(results)
    assert row["tokensel"] == "out of memory" and row["fastest peer"] == "published" and row["of that peer"] == "7"
    assert "Not run there: CCE (needs a GPU)." in report.readme_block({"cpu": results})


def test_a_ratio_to_no_memory_at_all_is_no_ratio():
    measured = record(ours={"extra_mib": 0.0}, other={"extra_mib": 5.0})
    assert report.ratio(measured, "other", "ours", "extra_mib") is None
    assert report.ratio(measured, "ours", "other", "extra_mib") == 0


def test_the_attention_itself_is_no_peer_of_its_mass(tmp_path):
    ways = {name: {"median": s} for name, s in (("tokensel chunked", 4.0), ("flash forward", 1.0), ("SDPA", 2.0))}
    results = report.load([write_results(tmp_path / "some.json", [record(work="attention_mass", **ways)])])["cpu"]
    (row,) = report.overview_rows(results)
    assert row["fastest peer"] == "SDPA" and row["its time / ours"] == "0.50"


def test_growth_is_the_slope_over_all_lengths(tmp_path):
    def at(tokens, mib):
        case = dataclasses.asdict(Case("attention_mass", "attention_mass", "CPU-sized", tokens, "float32"))
        return {"name": str(tokens), "case": case, "ways": {"tokensel chunked": {"extra_mib": mib}}}

    for mib, slope in (([1.0, 2.0, 4.0], 1), ([1.0, 4.0, 16.0], 2), ([1.0, 4.0, 4.0], 1)):
        records = [at(512 * 2**i, value) for i, value in enumerate(mib)]
        found = report.load([write_results(tmp_path / "some.json", records)])["cpu"]
        assert report._mass_growth(found) == [pytest.approx(slope)]


def test_a_target_is_met_by_its_worst_case_alone(tmp_path):
    results = report.load([write_results(tmp_path / "some.json")])
    target = report.Target("cpu", "t", True, 1.15, lambda _: [1.0, None, 1.2])
    assert target.row(results)[""] == "**not met**" and target.row(results)["measured"] == "1.2"
    assert report.Target("cpu", "t", False, 1.0, lambda _: [1.0, 1.2]).row(results)[""] == "met"


def test_the_report_writes_plots_and_rewrites_the_readme(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    only = {name: peers.WAYS["selection_step"][name] for name in ("tokensel chunked", "published")}
    monkeypatch.setitem(peers.WAYS, "selection_step", only)
    case = Case("step", "selection_step", "tiny", 40, "float32")
    path = write_results(Path("cpu.json"))
    content = json.loads(path.read_text())
    content["records"] = [measure.measure_case(case, CPU, clock, **ONCE)]
    path.write_text(json.dumps(content))
    readme = Path("README.md")
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([str(path), "--readme", str(readme)])
    text, printed = readme.read_text(), capsys.readouterr().out
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| published |" in text and "not measured" in text and "/ floor" in printed
    assert {f.name for f in Path().glob("cpu_*.*g")} == {
        f"cpu_{n}.{t}" for n in report.PICTURES for t in ("png", "svg")
    }
    with pytest.raises(ValueError, match="no lines <!-- benchmarks"):
        report.rewritten("nothing", "block")


def test_readme_and_pictures_show_the_committed_results():
    assert RESULTS, "run `make bench`"
    results = report.load([path.relative_to(ROOT) for path in RESULTS])
    for found in results.values():
        for name in (f"{found.machine['device']}_{picture}" for picture in report.PICTURES):
            for picture in (ROOT / found.folder / f"{name}{suffix}" for suffix in (".png", ".svg")):
                assert found.digest.encode() in picture.read_bytes(), f"{picture.name} shows other results: make bench"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.readme_block(results) in text, (
        "run python -m benchmarks.speed.tables benchmarks/results/[cg]pu.json --readme README.md"
    )
