"""What an unfinished run has done: shards of its output, which a killed process leaves and the next one goes on from.

    OUTPUT.partial/settings.json        what the results belong to
    OUTPUT.partial/part-00000.parquet   documents and their values, as in a store; a shard that is listed is done
    OUTPUT.partial/state.json           what else the run wants to remember

A shard takes its name when it is whole and on the disk, so there are no torn ones. A killed process loses what waits
for its shard: at most SHARD_TOKENS tokens, and little more than SHARD_SECONDS or a hundredth of the time so far. What a
bad disk has damaged is done again, with all that comes behind it.

The ranks of a job write into one directory, which all of them must see; of the numbers of shards each has every
ranks-th, so that any number of ranks goes on where another has stopped. Rank 0 alone reads, cleans up and publishes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy
import pyarrow as pa
import pyarrow.parquet as pq

from tokensel.files import FULL_DISK, naming_a_full_disk, replacing
from tokensel.parallel import gather_over_ranks, on_first_rank, rank_of_ranks, wait_for_ranks
from tokensel.store.format import documents_table, read_documents, store_schema
from tokensel.store.writer import HistoryWriter

SHARD_TOKENS = 1 << 20  # 4 MiB of values
SHARD_SECONDS = 10.0


def _number(shard: Path) -> int:
    """That in a shard's name; -1 where there is none."""
    digits = shard.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else -1


def _documents_of(
    keys: numpy.ndarray, lengths: numpy.ndarray, values: numpy.ndarray
) -> Iterator[tuple[int, numpy.ndarray]]:
    return zip(keys.tolist(), numpy.split(values, lengths.cumsum()[:-1]), strict=True)


def shards_of(output: str | os.PathLike[str]) -> Path:
    """The directory of an output's shards."""
    return Path(output).with_name(f"{Path(output).name}.partial")


class Shards:
    """Documents and their values beside an output, in shards; a context manager. All ranks of a job enter it together.

    Args:
        output: what the run will make; the shards are in the directory `output` + ".partial", which is this job's alone
            inside the block.

    Attributes:
        directory: where they are.
        keys: (n,) int64, the documents that `begin` found, in the order of recording.
        lengths: (n,) int32, their tokens.
        state: dict that survives as well, after `save_state`.

    Raises:
        BlockingIOError: another job is writing them.
        FileNotFoundError: a rank does not see what rank 0 writes.
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self.directory = shards_of(output)
        self.state: dict[str, Any] = {}
        self.keys, self.lengths = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.int32)
        self._rank, self._ranks = rank_of_ranks()
        self._next = self._rank  # number of the next shard
        self._shards: list[Path] = []
        self._waiting: list[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]] = []
        self._waiting_tokens = 0
        self._since = 0.0  # when the first of them came
        self._started = time.monotonic()
        self._lock: BinaryIO | None = None

    @property
    def advice(self) -> str:
        """What to do after a full disk."""
        if not self._shards and not self.state:
            return "nothing of this run was kept. Free some space and run the same command again"
        return f"what was done is kept in {self.directory}. Free some space and run the same command again to go on"

    def __enter__(self) -> Shards:
        with self._naming_a_full_disk():
            job = on_first_rank(self._lock_directory)
            try:
                self._join(job)
            except BaseException:
                self._unlock()
                raise
        return self

    def _lock_directory(self) -> str:
        """Makes sure that no other job is at work here, down to the last of its ranks -> a name for this job."""
        if self.directory.is_symlink():
            raise ValueError(f"{self.directory} is a link; remove it, or choose another output")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock = self._open_lock()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            message = "another process is writing this output; wait for it or choose another name"
            raise BlockingIOError(error.errno, message, str(self.directory)) from error
        job = uuid.uuid4().hex.encode()
        lock.truncate(0)
        lock.write(job)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_SH)
        return job.decode()

    def _join(self, job: str) -> None:
        """Locks the directory for this rank, too, if all of them see it."""
        if self._lock is None and (self.directory / "lock").is_file():
            self._lock = self._open_lock()
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        seen = False
        if self._lock is not None:
            self._lock.seek(0)
            seen = self._lock.read() == job.encode()
        if blind := [rank for rank, theirs in enumerate(gather_over_ranks([seen])) if not theirs]:
            raise FileNotFoundError(
                errno.ENOENT,
                f"rank {blind[0]} does not see what rank 0 writes; put the output on a disk that all ranks share",
                str(self.directory),
            )

    def _open_lock(self) -> BinaryIO:
        follow_no_link = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        return open(follow_no_link, "rb+")

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def begin(self, settings: dict[str, Any]) -> None:
        """Reads what an earlier run has left, and says so.

        Args:
            settings: JSON values that identify the results.
        Raises:
            ValueError: the shards belong to a run with other settings; names the differences.
        """
        with self._naming_a_full_disk():
            self.keys, self.lengths, self.state, first = on_first_rank(lambda: self._read_all(settings))
        self._next = first + self._rank
        if len(self.keys) and self._rank == 0:
            print(f"going on with {self.directory}: {len(self.keys):,} documents are done", flush=True)

    def _read_all(self, settings: dict[str, Any]) -> tuple[numpy.ndarray, numpy.ndarray, dict[str, Any], int]:
        """(keys, lengths, state, number of the next shard)"""
        if (self.directory / "rows").is_file():
            raise ValueError(
                f"{self.directory} was left by tokensel 0.1, which kept unfinished results in another form; finish it "
                "with that version, or remove it to begin anew"
            )
        for torn in self.directory.glob(".*.tmp"):
            torn.unlink()
        if not (self.directory / "settings.json").is_file():
            self._write_json("settings.json", settings)
            return self.keys, self.lengths, {}, 0
        self._refuse_other_settings(self._read_json("settings.json"), settings)
        state = self._read_json("state.json") if (self.directory / "state.json").is_file() else {}
        shards = self._all_shards()
        keys, lengths = [self.keys], [self.lengths]
        for i, shard in enumerate(shards):
            try:
                shard_keys, shard_lengths, _ = self._read(shard)  # the checksums, too
            except ValueError as error:
                print(f"{error}; it and the {len(shards) - i - 1} shards behind it are done again", flush=True)
                for damaged in shards[i:]:
                    damaged.unlink()
                break
            self._shards.append(shard)
            keys.append(shard_keys)
            lengths.append(shard_lengths)
        first = _number(self._shards[-1]) + 1 if self._shards else 0
        return numpy.concatenate(keys), numpy.concatenate(lengths), state, first

    def _all_shards(self) -> list[Path]:
        return sorted((p for p in self.directory.glob("part-*.parquet") if _number(p) >= 0), key=_number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                return  # what waits would meet the full disk once more
            if self.directory.is_dir():
                self.flush()
        finally:
            self._unlock()
            # other ranks may be at work in it still
            if error is not None and self._ranks == 1 and self.directory.is_dir() and not self._to_go_on_from():
                self.remove()

    def _to_go_on_from(self) -> bool:
        """Whether there is anything of this run, or of an earlier one."""
        return bool(self.state or self._all_shards() or (self.directory / "rows").is_file())

    def _refuse_other_settings(self, theirs: dict[str, Any], settings: dict[str, Any]) -> None:
        differences = [
            f"{name} was {theirs.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys([*theirs, *settings])
            if theirs.get(name) != settings.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.directory} belongs to an unfinished run with other settings: {'; '.join(differences)}. Give "
                "the same settings to go on with it, or remove it to begin anew"
            )

    def _naming_a_full_disk(self) -> AbstractContextManager[None]:
        return naming_a_full_disk(self.directory, "the shards of the run", self.advice)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        with replacing(self.directory / name) as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove the directory to begin anew") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds no object; remove the directory to begin anew")
        return value

    def save_state(self) -> None:
        """Writes `state`, which the next run finds."""
        with self._naming_a_full_disk():
            self._write_json("state.json", self.state)

    def append(self, keys: numpy.ndarray, lengths: numpy.ndarray, values: numpy.ndarray) -> None:
        """Records documents: keys (n,) int64, lengths (n,) int32, values (Σ lengths,) float32, NaN = no value."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append((keys.copy(), lengths.copy(), values.copy()))  # views would keep what they were cut from
        self._waiting_tokens += len(values)
        now = time.monotonic()
        seconds = max(SHARD_SECONDS, (now - self._started) / 100)  # or days would make a million files
        if self._waiting_tokens >= SHARD_TOKENS or now - self._since >= seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what waits for its shard."""
        if not self._waiting:
            return
        keys, lengths, values = (numpy.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        shard = self.directory / f"part-{self._next:05d}.parquet"
        with self._naming_a_full_disk(), replacing(shard) as temporary:
            table = documents_table(keys, lengths, values, store_schema("nll"))
            pq.write_table(table, temporary, compression="none", use_dictionary=False, write_page_checksum=True)
        self._shards.append(shard)
        self._next += self._ranks
        self._waiting, self._waiting_tokens = [], 0

    def gather(self) -> None:
        """Waits until all ranks have written their shards; those of all are then read on rank 0."""
        self.flush()
        wait_for_ranks()
        self._shards = self._all_shards()

    def _read(self, shard: Path) -> tuple[numpy.ndarray, ...]:
        """(keys, lengths, values) of a shard."""
        try:
            return read_documents(pq.read_table(shard, page_checksum_verification=True))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{shard} is damaged ({error})") from error

    def documents(self, order: numpy.ndarray | None = None) -> Iterator[tuple[int, numpy.ndarray]]:
        """(key, values) of all recorded documents, holding a shard at a time.

        Args:
            order: keys, of all of them; None = as recorded. They are brought into it in a file without a name.
        """
        self.flush()
        if order is None:
            for shard in self._shards:
                yield from _documents_of(*self._read(shard))
            return
        by_key = order.argsort()
        with self._naming_a_full_disk(), tempfile.TemporaryFile(dir=self.directory) as ordered:
            lengths = self._lengths_in(order, by_key)
            starts = 4 * (lengths.cumsum() - lengths)  # bytes
            for shard in self._shards:
                for key, values in _documents_of(*self._read(shard)):
                    place = by_key[numpy.searchsorted(order, key, sorter=by_key)]
                    os.pwrite(ordered.fileno(), values.tobytes(), int(starts[place]))
            for key, length in zip(order.tolist(), lengths.tolist(), strict=True):
                yield key, numpy.frombuffer(ordered.read(4 * length), numpy.float32)

    def _lengths_in(self, order: numpy.ndarray, by_key: numpy.ndarray) -> numpy.ndarray:
        """The lengths of all documents in an order of their keys, int64."""
        lengths = numpy.zeros(len(order), numpy.int64)
        for shard in self._shards:
            keys, shard_lengths = read_documents(pq.read_table(shard, columns=["key", "length"]))
            lengths[by_key[numpy.searchsorted(order, keys, sorter=by_key)]] = shard_lengths
        return lengths

    def remove(self) -> None:
        """Deletes the shards, once the output is in place."""
        shutil.rmtree(self.directory)
        self._waiting = []


def publish(shards: Shards, writer: HistoryWriter, order: numpy.ndarray | None = None) -> tuple[int, float]:
    """Turns the shards of all ranks into the store that `writer` makes and removes them -> (values, their sum).

    Args:
        order: keys in the order of the store; None = as recorded.
    """
    shards.gather()
    return on_first_rank(lambda: _publish(shards, writer, order))


def _publish(shards: Shards, writer: HistoryWriter, order: numpy.ndarray | None) -> tuple[int, float]:
    count, total = 0, 0.0
    with writer:
        for key, values in shards.documents(order):
            writer.append(key, values)
            responses = values[~numpy.isnan(values)]
            count, total = count + len(responses), total + float(responses.sum(dtype=numpy.float64))
    shards.remove()
    return count, total
