"""`tokensel score` in two processes, on a CPU with gloo: `score_ranks.py` is what they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recorded
import score_ranks

import tokensel
import tokensel.store.writer as writer_module
from tokensel import parallel
from tokensel.cli import main
from tokensel.store import HistoryStore

pytestmark = pytest.mark.usefixtures("small_row_groups")


def launch(*argv):
    here = Path(score_ranks.__file__)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(Path(tokensel.__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(here)]
    return subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def one(tmp_path_factory, model_dir):
    """(directory, rows, bytes of the store that one process makes of them)."""
    directory = tmp_path_factory.mktemp("ranks")
    data = directory / "rows.jsonl"
    rows = [*recorded.ROWS[:26], *recorded.ROWS[:5]]  # seven batches of four, so that the last has no other beside it
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "one.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    (directory / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n" + '{"prompt": 3}\n', encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "ROW_GROUP_TOKENS", 50)
        assert main(recorded.arguments(model_dir, data, directory / "whole.parquet")) == 0
    return directory, str(data), (directory / "whole.parquet").read_bytes()


@pytest.fixture(scope="module")
def found(one, model_dir):
    directory, data, _ = one
    done = launch(str(directory), model_dir, data)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((directory / f"found-{rank}.json").read_text()) for rank in range(2)]
    return directory, results, done.stdout, done.stderr


@pytest.mark.parametrize("way", ["two", "sharded"])
def test_two_ranks_write_the_bytes_of_one(one, found, way):
    directory, results, *_ = found
    assert [r[way] for r in results] == [0, 0]
    assert (directory / f"{way}.parquet").read_bytes() == one[2]
    assert not (directory / f"{way}.parquet.partial").exists()


@pytest.mark.parametrize("way", ["two", "folder", "sharded"])
def test_each_document_is_scored_by_one_rank(found, way):
    first, second = (set(r["shares"][way]) for r in found[1])
    assert not first & second and len(first | second) == 26 and (len(first), len(second)) in ((14, 12), (16, 10))
    assert all(len(r["shares"][way]) == len(set(r["shares"][way])) for r in found[1])


def test_one_rank_speaks_and_counts_the_tokens_of_all(found):
    told = [line for line in found[2].splitlines() if "two.parquet: 31 rows" in line]
    assert len(told) == 1 and "tokens/s of 2 ranks" in told[0]


def test_a_directory_holds_the_same_documents(one, found):
    store, whole = HistoryStore.open(found[0] / "folder"), HistoryStore.open(one[0] / "whole.parquet")
    assert len(list((found[0] / "folder").glob("part-*.parquet"))) > 2
    assert store.fingerprint() == whole.fingerprint()


def test_a_rank_may_have_no_rows(found):
    assert [r["one_row"] for r in found[1]] == [0, 0]
    assert len(HistoryStore.open(found[0] / "one_row.parquet")) == 1


@pytest.mark.parametrize(
    "way, message",
    [
        ("bad_row", "tokensel: error: .*bad.jsonl:2: "),
        ("settings", "max_length must be the same on every rank; rank 0 has 64 but rank 1 has 63"),
        ("unshared", "rank 1 does not see what rank 0 writes; put the output on a disk that all ranks share"),
    ],
)
def test_every_rank_ends_with_the_cause(found, way, message):
    import re

    assert [r[way] for r in found[1]] == [2, 2]
    assert re.search(message, found[3]), found[3][-3000:]


def test_the_command_that_the_docs_have(one, model_dir, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tokensel"]
    command += recorded.arguments(model_dir, one[1], tmp_path / "h.parquet")
    environment = os.environ | {"PYTHONPATH": str(Path(tokensel.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "of 2 ranks" in done.stdout, done.stderr[-3000:]
    two, whole = (HistoryStore.open(path) for path in (tmp_path / "h.parquet", one[0] / "whole.parquet"))
    assert two.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    "environment, message",
    [({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"), ({"WORLD_SIZE": "x"}, "x, which is no number")],
)
def test_half_of_a_launcher_s_variables_are_named(monkeypatch, environment, message):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{message}; start the ranks by torchrun, or unset WORLD_SIZE"):
        parallel.launched_ranks()


@pytest.mark.slow  # under torchrun; `test_faults.py` kills quicker
@pytest.mark.parametrize("rank, at", [(0, 2), (1, 1)])
def test_after_a_rank_was_killed_one_process_goes_on_to_the_same_bytes(one, model_dir, capsys, rank, at):
    directory, data, whole = one
    started = time.monotonic()
    done = launch(str(directory), model_dir, data, str(rank), str(at))
    assert done.returncode and time.monotonic() - started < 60
    output = directory / "killed.parquet"
    assert not output.exists()
    capsys.readouterr()
    assert main(recorded.arguments(model_dir, data, output)) == 0
    assert "documents are done" in capsys.readouterr().out
    assert output.read_bytes() == whole
    output.unlink()
