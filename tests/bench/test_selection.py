"""The benchmark of `tokensel select`, and that its memory does not grow with the tokens."""

from __future__ import annotations

import json

import pytest

import tokensel.store.writer as writer_module
from benchmarks.speed import selection


@pytest.fixture
def here(monkeypatch):
    """Runs are in this process, of few tokens."""
    monkeypatch.setattr(selection, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(selection, "TOKENS", (3000, 5000))


def test_it_measures_what_is_missing_and_says_what_failed(tmp_path, here, monkeypatch, capsys):
    argv = ["--output", str(tmp_path / "results"), "--folder", str(tmp_path)]
    run, asked = selection.run, []

    def failing(tokens, form, folder):
        asked.append((tokens, form))
        if (tokens, form) == (5000, "a directory"):
            raise OSError("no room")
        return run(tokens, form, folder)

    monkeypatch.setattr(selection, "run", failing)
    selection.main(argv)
    table = capsys.readouterr().out
    assert "- failed: a directory, 5000: OSError: no room" in table and "| failed |" in table
    results = json.loads((tmp_path / "results" / "selection.json").read_text())
    assert results["runs"]["a file"]["3000"]["seconds"] > 0 and len(asked) == 4
    monkeypatch.setattr(selection, "run", run)
    asked.clear()
    selection.main(argv)
    assert "failed" not in capsys.readouterr().out and not asked
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results"]


def test_memory_does_not_grow_with_the_tokens(tmp_path, monkeypatch):
    """Of ten and twenty row groups a side; what Python and NumPy hold at most."""
    import tracemalloc

    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 20_000)
    monkeypatch.setattr("tokensel.store.shards.SHARD_TOKENS", 20_000)
    monkeypatch.setattr(selection, "in_new_process", lambda function, *arguments: function(*arguments))
    peaks = []
    selection.run(20_000, "a directory", tmp_path)  # imports
    for tokens in (200_000, 400_000):
        tracemalloc.start()
        selection.run(tokens, "a directory", tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    values = 4 * 400_000  # bytes
    assert peaks[1] - peaks[0] < values / 4, peaks  # keys and lengths of more documents
