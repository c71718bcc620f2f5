"""Memory against the length of a row, and of a large vocabulary: measured in steps that survive an interruption."""

from __future__ import annotations

import json

import pytest

from benchmarks.resume import RESULTS
from benchmarks.speed import large_vocabulary, long_rows


class Here:
    """A pool of processes that computes in this one."""

    def __init__(self, *arguments, **settings):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        pass

    def apply(self, function, arguments):
        return function(*arguments)


class Spawned:
    Pool = Here


def test_steps_of_a_large_vocabulary_go_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    asked = []

    def peak_of(way, shape, cache):
        asked.append((way, shape, str(cache)))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return 1000 * len(asked)

    monkeypatch.setattr(large_vocabulary.multiprocessing, "get_context", lambda kind: Spawned)
    monkeypatch.setattr(large_vocabulary, "peak_of", peak_of)
    options = ["--output", str(tmp_path / "new"), "--cache", "models"]
    with pytest.raises(KeyboardInterrupt):
        large_vocabulary.main(options)
    large_vocabulary.main(options)
    ways = list(large_vocabulary.WAYS)
    assert [way for way, *_ in asked] == [ways[0]] * 2 + [ways[1]] + [way for way in ways[1:] for _ in range(2)]
    printed = capsys.readouterr().out
    assert "| tokensel, a frozen copy | 4,000 | 5,000 |" in printed
    assert "| (logits of one model, float32) | 256 | 512 |" in printed


def test_the_table_of_a_large_vocabulary_says_whether_its_files_had_changes():
    results = json.loads((RESULTS / "large_vocabulary.json").read_text(encoding="utf-8"))
    results["machine"]["commit"] = "0123456789abcdef+changes"
    assert large_vocabulary.table(results).endswith("commit 0123456789+changes.")


def test_long_rows_go_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    asked, errors = [], {2: ValueError("no luck"), 4: KeyboardInterrupt()}

    def peak_of(way, length):
        asked.append(length)
        if error := errors.pop(len(asked), None):
            raise error
        return None if length == 32768 else float(length)

    monkeypatch.setattr(long_rows.multiprocessing, "get_context", lambda kind: Spawned)
    monkeypatch.setattr(long_rows, "peak_of", peak_of)
    options = ["--output", str(tmp_path / "new" / "folder")]
    with pytest.raises(SystemExit):
        long_rows.main(options)
    results = json.loads((tmp_path / "new/folder/long_rows.json").read_text())
    peaks = results["peak_mib"]["tokensel"]
    assert peaks == {
        "1024": 1024.0,
        "2048": {"failed": "ValueError: no luck"},
        "4096": 4096.0,
    }
    table = long_rows.table(results)
    assert "| tokensel, MiB | 1,024 | failed | 4,096 | not measured |" in table
    assert "- unfinished: 3 of 12 lengths\n- failed: tokensel, 2048: ValueError: no luck" in table
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
