"""SmolLM2 on a CPU: measurements that survive an interruption, and the tables of what is there, missing or failed."""

from __future__ import annotations

import json
import os

import numpy
import pytest

from benchmarks.resume import in_new_process
from benchmarks.speed import smollm2
from benchmarks.speed.cases import Case
from benchmarks.speed.tables import arithmetic

NAMES = list(smollm2.BATCHES)
FIRST = [*NAMES, *(("tokensel", length) for length in smollm2.LENGTHS)]
ALL = [*FIRST, *(("as published", length) for length in smollm2.LENGTHS)]


def scored(*seconds):
    """Of two batches: seconds of tokensel, the bare forward and the backbone."""
    ways = (smollm2.SCORE, smollm2.BARE, smollm2.BACKBONE)
    return {
        "data": {"chats": 2500, "tokens": 10000, "responses": 4600},
        "batches": 30,
        "padding": 0.125,
        "tokens": 1000,
        "seconds": dict(zip(ways, seconds, strict=True)),
        "peak_mib": dict(zip(ways, (300.0, 1900.0, 290.0), strict=True)),
    }


@pytest.fixture
def measurements(tmp_path, monkeypatch):
    """`measurements(*options)` measures what takes no time; `.asked` is what ran, each in a process of its own."""

    def in_new_process(function, *arguments):
        if function is smollm2.unpack:
            measurements.asked.append("unpack")
            return measurements.unpacked
        what, *given, _ = arguments
        measurements.asked.append(given[0] if what is smollm2.scoring else tuple(given))
        result = measurements.results.pop(measurements.asked[-1], {"seconds": 2.0, "peak_mib": 3000.0})
        if isinstance(result, KeyboardInterrupt):
            raise result
        return scored([10.0, 10.0], [9.5, 10.5], [8.0, 8.0]) if what is smollm2.scoring and result else result

    def measurements(*options):
        measurements.asked = []
        smollm2.main(["--output", str(tmp_path / "new"), *options])

    measurements.results, measurements.unpacked, measurements.path = {}, None, tmp_path / "new/smollm2.json"
    monkeypatch.setattr(smollm2, "in_new_process", in_new_process)
    return measurements


def test_an_interrupted_run_goes_on_and_running_out_of_memory_is_a_result(measurements, capsys):
    measurements.results = {("as published", 8192): None, ("as published", 2048): KeyboardInterrupt()}
    with pytest.raises(SystemExit) as stopped:
        measurements()
    # the first process of all unpacks the model
    assert stopped.value.code == 130 and measurements.asked == ["unpack", *ALL[:9]]
    tables = smollm2.tables(json.loads(measurements.path.read_text()))
    assert "| as published, s | 2.0 | not measured | not measured | not measured |" in tables
    measurements()
    assert measurements.asked == ["unpack", *ALL[8:]]
    assert "| as published, MiB | 3,000 | 3,000 | 3,000 | out of memory |" in capsys.readouterr().out
    measurements()
    assert not measurements.asked
    measurements("--fresh")
    assert measurements.asked == ["unpack", *ALL]


def test_a_measurement_that_is_killed_is_told_and_tried_again(measurements, capsys):
    killed = in_new_process(os._exit, 9)
    measurements.results = {("tokensel", 4096): killed}
    measurements()
    out = capsys.readouterr().out
    assert "| tokensel, s | 2.0 | 2.0 | failed | 2.0 |" in out
    assert "- failed: tokensel, 4096 tokens: killed; out of memory?" in out
    measurements()
    assert measurements.asked == ["unpack", ("tokensel", 4096)] and "failed" not in capsys.readouterr().out


def test_figures_of_another_machine_are_not_kept(measurements, capsys):
    measurements()
    results = json.loads(measurements.path.read_text())
    results["machine"] |= {"cpu": "another"}
    measurements.path.write_text(json.dumps(results))
    measurements()
    assert measurements.asked == ["unpack", *ALL]
    assert "everything is measured, and replaces it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    ["[]", '{"load": 0, "scoring": []}', '{"load": 0, "scoring": {}, "steps": {"tokensel": {"1024": 3}}}'],
)
def test_a_file_of_something_else_is_named(measurements, capsys, content):
    measurements.path.parent.mkdir()
    measurements.path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        measurements()
    assert stopped.value.code == 2 and not measurements.asked and measurements.path.read_text() == content
    assert "smollm2.json is not of this study; --fresh replaces it" in capsys.readouterr().err


def test_without_its_model_nothing_is_measured(measurements, capsys):
    measurements.unpacked = {"failed": "pip install this"}
    with pytest.raises(SystemExit):
        measurements()
    assert "the model could not be unpacked: pip install this" in capsys.readouterr().err
    assert measurements.asked == ["unpack"] and not measurements.path.exists()


def test_a_share_below_what_is_wanted_is_told():
    # the median of 2, 0.85, 0.85 is below it, though the totals are not
    row = smollm2.scoring_row("", scored([10.0, 10.0, 10.0], [20.0, 8.5, 8.5], [5.0, 5.0, 5.0]))
    assert row["of the bare forward"] == "0.85" and row["in total"] == "1.23" and row["wanted ≥ 0.9"] == "**not met**"
    row = smollm2.scoring_row("", scored([10.0, 10.0], [9.0, 9.2], [5.0, 5.0]))
    assert row["wanted ≥ 0.9"] == "met" and row["tokensel, tokens/s"] == "50" and row["run"] == "2 of 30"


def test_tables_of_nothing_and_of_a_failure_hold_no_figures():
    results = {"machine": machine(), "load": 1.5, "scoring": {NAMES[1]: {"failed": "why"}}, "steps": {}}
    lines = smollm2.tables(results).splitlines()
    assert lines[4].count("not measured") == 10 and lines[5].count("failed") == 10 and "met" not in lines[5]
    assert f"- failed: {NAMES[1]}: why" in lines
    assert lines[-1].endswith("commit 0123456789+changes; load average 1.5 at the start, so others ran.")


def machine():
    return {"device": "cpu", "cpu": "C", "cores": 2, "threads": 2, "torch": "2", "commit": "0123456789abc+changes"}


@pytest.mark.parametrize("name", NAMES)
def test_batches_hold_every_document_once_and_their_sample_is_even(name):
    lengths = numpy.random.default_rng(0).integers(20, 180, 2500)
    batches = smollm2.BATCHES[name](lengths)
    assert sorted(numpy.concatenate(batches)) == list(range(2500))
    sample, padding = smollm2.sample_of(batches, lengths)
    ran = sum(len(batch) * lengths[batch].max() for batch in sample)
    assert 0.8 < ran / smollm2.SAMPLED < 1.2 and len(sample) > 2
    assert padding > 0.3 if "order of the data" in name else padding < 0.05


def test_arithmetic_of_a_long_row_is_that_of_the_estimates():
    case = Case("step", "training_step", "Llama-3.1-8B", 131072)
    table = arithmetic(case)
    lines = [line for line in table.splitlines() if "not measured" in line]
    assert len(lines) == len(case.costs) == 6
    assert "| logits 131,072 × 128,256, bfloat16 | 31.3 |" in table
    assert "| of all 32 layers, as `output_attentions` gives it | 32,768.0 |" in table
