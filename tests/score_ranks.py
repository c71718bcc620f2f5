"""What the processes of data/test_score_ranks.py run: `tokensel score`, in several ways, one after the other.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/score_ranks.py DIRECTORY MODEL DATA
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from recorded import arguments

import tokensel.store.shards
import tokensel.store.writer
from tokensel import recording
from tokensel.cli import main


def ways(directory, model, data, rank):
    """(name, arguments) of what is run; each rank calls all of them."""
    output = {name: directory / f"{name}.parquet" for name in ("two", "sharded", "one_row", "bad_row", "settings")}
    yield "two", arguments(model, data, output["two"])
    yield "folder", arguments(model, data, directory / "folder")
    yield "sharded", arguments(model, data, output["sharded"], fully_shard="true")
    one = directory / "one.jsonl"
    yield "one_row", arguments(model, one, output["one_row"])  # rank 1 has none
    yield "bad_row", arguments(model, directory / "bad.jsonl", output["bad_row"])
    yield "settings", arguments(model, data, output["settings"], max_length=64 - rank)
    os.makedirs(elsewhere := directory / f"disk{rank}")
    os.chdir(elsewhere)
    yield "unshared", arguments(model, data, "x.parquet")


def broken(at):
    """The rank dies, or fails, in the middle of its batches."""
    losses_of, calls = recording.losses_of, iter(range(at))

    def until(*args):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses_of(*args)

    recording.losses_of = until


if __name__ == "__main__":
    directory, model, data = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tokensel.store.shards.SHARD_TOKENS = 1  # a shard a batch
    tokensel.store.writer.ROW_GROUP_TOKENS = 50
    tokensel.store.writer.PART_TOKENS = 300
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if len(sys.argv) > 4:
        if rank == int(sys.argv[4]):
            broken(int(sys.argv[5]))
        sys.exit(main(arguments(model, data, directory / "killed.parquet")))
    shares, losses_of = {}, recording.losses_of  # documents that this rank scores, by way

    def counted(documents, batch, losses):
        shares.setdefault(name, []).extend(documents.keys[batch].tolist())
        return losses_of(documents, batch, losses)

    recording.losses_of, found = counted, {}
    for name, argv in ways(directory, model, data, rank):
        found[name] = main(argv)
    found["shares"] = shares
    (directory / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
