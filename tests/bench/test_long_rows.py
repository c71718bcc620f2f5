"""Memory against the length of a row, and of a large vocabulary: measured in steps that survive an interruption."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks.resume import RESULTS, in_new_process
from benchmarks.speed import large_vocabulary, long_rows


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """`steps(*options)` measures steps that take no time; `steps.asked` is what ran, each in a process of its own."""

    def in_new_process(function, *arguments):
        steps.asked.append(arguments[1] if len(arguments) > 1 else function.__name__)
        if error := steps.errors.pop(len(steps.asked), None):
            raise error
        return None if function is large_vocabulary.unpack else steps.peaks.get(len(steps.asked), len(steps.asked))

    def steps(*options):
        steps.asked = []
        large_vocabulary.main(["--output", str(tmp_path / "new"), *options])

    steps.errors, steps.peaks, steps.path = {}, {}, tmp_path / "new/large_vocabulary.json"
    monkeypatch.setattr(large_vocabulary, "in_new_process", in_new_process)
    return steps


def test_steps_of_a_large_vocabulary_go_on_after_an_interruption(steps, capsys):
    ways = list(large_vocabulary.WAYS)
    steps.errors = {4: KeyboardInterrupt()}
    with pytest.raises(SystemExit) as stopped:
        steps()
    # the first process of all unpacks the model: what that takes is in no step's peak
    assert stopped.value.code == 130 and steps.asked == ["unpack", ways[0], ways[0], ways[1]]
    steps()
    assert steps.asked == ["unpack", *(way for way in ways[1:] for _ in range(2))]
    printed = capsys.readouterr().out
    assert "| tokensel, adapters off | 2 | 3 |" in printed and "| tokensel, a frozen copy | 2 | 3 |" in printed
    assert "| (logits of one model, float32) | 256 | 512 |" in printed
    steps()
    assert not steps.asked
    steps("--fresh")
    assert len(steps.asked) == 7


def test_a_way_that_a_file_lacks_is_measured_and_other_figures_of_another_machine_are_not_kept(steps, capsys):
    steps()
    results = json.loads(steps.path.read_text())
    del results["peak_mib"]["as published"]
    assert "| as published | not measured | not measured |" in large_vocabulary.table(results)
    steps.path.write_text(json.dumps(results))
    steps()
    assert steps.asked == ["unpack", "as published", "as published"]
    results["machine"] |= {"cpu": "another"}
    steps.path.write_text(json.dumps(results))
    steps()
    assert len(steps.asked) == 7 and "everything is measured, and replaces it" in capsys.readouterr().out
    assert json.loads(steps.path.read_text())["machine"]["cpu"] != "another"


def test_a_step_that_is_killed_is_told_and_tried_again(steps, capsys):
    steps.peaks = {3: in_new_process(os._exit, 9)}
    assert steps.peaks[3] == {"failed": "killed; out of memory?"}
    steps()
    lines = capsys.readouterr().out.splitlines()
    assert "| tokensel, adapters off | 2 | failed |" in lines
    assert "- failed: tokensel, adapters off, 1x512: killed; out of memory?" in lines
    steps()
    assert steps.asked == ["unpack", "tokensel, adapters off"]
    assert in_new_process(abs, -3) == 3


@pytest.mark.parametrize("content", ["[]", "null", '{"peak_mib": []}', '{"peak_mib": {"as published": {"1x512": []}}}'])
def test_a_file_of_something_else_is_named(steps, capsys, content):
    steps.path.parent.mkdir()
    steps.path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        steps()
    assert stopped.value.code == 2 and not steps.asked and steps.path.read_text() == content
    assert "large_vocabulary.json is not of this study; --fresh replaces it" in capsys.readouterr().err
    steps("--fresh")
    assert len(steps.asked) == 7


@pytest.mark.parametrize(
    ("error", "instead", "reason"),
    [
        (ModuleNotFoundError("pip install this"), None, "pip install this"),
        (None, {"failed": "killed"}, "the model could not be unpacked: killed"),
    ],
)
def test_without_its_model_nothing_is_measured(steps, capsys, monkeypatch, error, instead, reason):
    steps.errors = {1: error} if error else {}
    if instead:
        monkeypatch.setattr(large_vocabulary, "in_new_process", lambda *arguments: instead)
    with pytest.raises(SystemExit):
        steps()
    assert reason in capsys.readouterr().err and not steps.path.exists()


def test_the_table_of_a_large_vocabulary_says_whether_its_files_had_changes():
    results = json.loads((RESULTS / "large_vocabulary.json").read_text(encoding="utf-8"))
    results["machine"]["commit"] = "0123456789abcdef+changes"
    assert large_vocabulary.table(results).endswith("commit 0123456789+changes.")


def test_long_rows_go_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    asked, errors, dead = [], {2: ValueError("no luck"), 4: KeyboardInterrupt()}, {1024: in_new_process(os._exit, 9)}

    def peak_of(way, length):
        asked.append(length)
        if error := errors.pop(len(asked), None):
            raise error
        return None if length == 32768 else float(length)

    here = lambda function, *arguments: dead.pop(arguments[-1], None) or function(*arguments)  # noqa: E731
    monkeypatch.setattr(long_rows, "in_new_process", here)
    monkeypatch.setattr(long_rows, "peak_of", peak_of)
    options = ["--output", str(tmp_path / "new" / "folder")]
    with pytest.raises(SystemExit):
        long_rows.main(options)
    results = json.loads((tmp_path / "new/folder/long_rows.json").read_text())
    peaks = results["peak_mib"]["tokensel"]
    assert peaks == {
        "1024": {"failed": "killed; out of memory?"},
        "2048": 2048.0,
        "4096": {"failed": "ValueError: no luck"},
        "8192": 8192.0,
    }
    table = long_rows.table(results)
    assert "| tokensel, MiB | failed | 2,048 | failed | 8,192 | not measured |" in table
    assert "- unfinished: 4 of 12 lengths\n- failed: tokensel, 1024: killed; out of memory?" in table
    assert "- failed: tokensel, 4096: ValueError: no luck" in table
    long_rows.main(options)
    assert len(asked) == 4 + 10 and "out of memory" in (out := capsys.readouterr().out) and "failed" not in out
    long_rows.plot(json.loads((tmp_path / "new/folder/long_rows.json").read_text()), tmp_path / "plot.png")
    long_rows.main(options)
    assert len(asked) == 14
    long_rows.main([*options, "--fresh"])
    assert len(asked) == 26


def test_committed_memory_is_linear_in_the_row():
    peaks = json.loads((RESULTS / "long_rows.json").read_text(encoding="utf-8"))["peak_mib"]["tokensel"]
    assert peaks["32768"] < 2.3 * peaks["16384"]  # twice, not four times


def test_the_published_way_holds_what_ours_does_not():
    ours, theirs = (long_rows.peak_of(way, 1024) for way in ("tokensel", "as published"))
    logits = 1024 * 32000 * 4 / 2**20
    assert ours < 1.5 * logits < 3 * logits < theirs
