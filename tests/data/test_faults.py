"""Commands that are killed at any of their accesses to files, and gone on with: nothing lost, the same bytes.

    make faults     # twenty kills of each; the seed is printed, and --seed takes it

A process is forked for each run, so that imports cost nothing; an audit hook kills it at the n-th event.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from recorded import ROWS, arguments

import tokensel.store.shards as shards_module
import tokensel.store.writer as writer_module
from tokensel.cli import main

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
LONGEST = 60  # seconds that a rank may outlive another


def forked(argv, folder, kill_at=None, log="log", environment=()):
    """Starts a command in a process of its own, which dies at its `kill_at`-th event in the folder -> its number."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.environ.update(environment)
        sys.stdout = sys.stderr = open(folder.parent / log, "w", buffering=1, encoding="utf-8")
        seen = 0

        def hook(event, args):
            nonlocal seen
            if event in EVENTS and isinstance(args[0], str | Path) and str(args[0]).startswith(str(folder)):
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        torch.set_num_threads(1)
        status = main([str(part) for part in argv])
        (folder.parent / f"{log}.events").write_text(str(seen))
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(pid, within=240.0):
    """The exit status of a process, negative for a signal; fails where it goes on for longer."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"the process went on for {within} s")


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


class Job:
    """A command that makes `folder/output`, and what its ranks do."""

    def __init__(self, folder, argv, resume=(), ranks=1):
        self.folder, self.argv, self.resume, self.ranks = folder, argv, resume, ranks

    def run(self, kill=None, resume=False):
        """kill: (rank, event) -> exit statuses of the ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        port, pids = free_port(), []
        for rank in range(self.ranks):
            environment = {}
            if self.ranks > 1:
                environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.ranks)}
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            kill_at = kill[1] if kill and kill[0] == rank else None
            argv = [*self.argv, *(self.resume if resume else ())]
            pids.append(forked(argv, self.folder, kill_at, f"log{rank}", environment))
        first = ended(pids[0] if not kill else pids[kill[0]])
        return [first, *(ended(pid, LONGEST) for i, pid in enumerate(pids) if i != (kill[0] if kill else 0))]

    def told(self):
        return "\n".join((self.folder.parent / f"log{rank}").read_text()[-2000:] for rank in range(self.ranks))

    def events(self):
        return [int((self.folder.parent / f"log{rank}.events").read_text()) for rank in range(self.ranks)]


TIMED = {"trainer_state.json", "training_args.bin", "all_results.json", "train_results.json", "README.md"}


def content(folder):
    """The bytes of what a job has made, but for what logs time, checkpoints and what is left of unfinished work."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMED)
    names = {str(path.relative_to(folder)): path for path in files}
    done = (name for name in names if not any(part in name for part in (".partial", "checkpoint-", ".tmp")))
    return {name: names[name].read_bytes() for name in done}


@pytest.fixture
def job(request, tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 1)
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 50)
    monkeypatch.setattr(writer_module, "PART_TOKENS", 300)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]), encoding="utf-8")
    folder, kind = tmp_path / "made", request.param
    score = arguments(model_dir, data, folder / "output", batch_size=2)
    if kind == "score into a file":
        return Job(folder, arguments(model_dir, data, folder / "output.parquet", batch_size=2))
    if kind == "score":
        return Job(folder, score)
    if kind == "score on two ranks":
        return Job(folder, score, ranks=2)
    stores = {"base": tmp_path / "base.parquet", "reference": tmp_path / "reference"}
    if kind == "select":
        for store in stores.values():
            assert ended(forked(arguments(model_dir, data, store), folder.parent / "none")) == 0
        recorded = ",".join(f"{name}={path}" for name, path in stores.items())
        argv = ["select", "--method", "token_cleaning", "--recorded", recorded, "--output", folder / "output"]
        return Job(folder, argv)
    argv = ["train", "--model_name_or_path", model_dir, "--dataset_name", data, "--max_length", 64, "--use_cpu", "true"]
    argv += ["--method", "history_excess", "--history", "last_seen", "--per_device_train_batch_size", 3]
    argv += ["--num_train_epochs", 2, "--save_steps", 2, "--report_to", "none", "--output_dir", folder / "output"]
    return Job(folder, argv, ["--resume_from_checkpoint", "last"])


JOBS = ["score into a file", "score", "score on two ranks", "select", "train"]


@pytest.mark.parametrize("job", JOBS, indirect=True)
def test_whenever_a_process_is_killed_the_next_one_ends_with_the_same_bytes(job, request, pytestconfig):
    kills, seed = pytestconfig.getoption("--kills"), pytestconfig.getoption("--seed")
    draw = random.Random(f"{seed} {request.node.name}")
    assert job.run() == [0] * job.ranks, job.told()
    whole, events = content(job.folder), job.events()
    assert whole and min(events) > 5
    for number in range(kills):
        shutil.rmtree(job.folder)
        rank = draw.randrange(job.ranks)
        at = draw.randrange(events[rank])
        what = f"seed {seed}, kill {number}: rank {rank} at event {at} of {events[rank]}"
        first, *others = job.run((rank, at))
        print(what)
        assert first == -signal.SIGKILL or job.ranks > 1, what  # ranks may do a little more or less in each run
        assert all(status in (0, 2) for status in others), f"{what}\n{job.told()}"
        if content(job.folder) != whole:
            complete = any(job.folder.glob("output/checkpoint-*/trainer_state.json"))
            if job.resume and not complete:  # which the command would say
                shutil.rmtree(job.folder / "output", ignore_errors=True)
            assert job.run(resume=complete) == [0] * job.ranks, f"{what}\n{job.told()}"
        assert content(job.folder) == whole, what
