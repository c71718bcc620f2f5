"""What an unfinished run has done: shards of its output, which a killed process leaves and the next one goes on from.

    OUTPUT.partial/settings.json        what the results belong to
    OUTPUT.partial/part-00000.parquet   documents and their values, as in a store; a shard that is listed is done
    OUTPUT.partial/state.json           what else the run wants to remember

A shard takes its name when it is whole and on the disk, so there are no torn ones. A killed process loses what waits
for its shard: at most SHARD_TOKENS tokens, and little more than SHARD_SECONDS of work. What a bad disk has damaged is
done again, with all that comes behind it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy
import pyarrow as pa
import pyarrow.parquet as pq

from tokensel.files import FULL_DISK, naming_a_full_disk, replacing
from tokensel.store.format import documents_table, read_documents, store_schema
from tokensel.store.writer import HistoryWriter

SHARD_TOKENS = 1 << 20  # 4 MiB of values
SHARD_SECONDS = 10.0


def _number(shard: Path) -> int:
    return int(shard.stem.rpartition("-")[2])


def _documents_of(
    keys: numpy.ndarray, lengths: numpy.ndarray, values: numpy.ndarray
) -> Iterator[tuple[int, numpy.ndarray]]:
    return zip(keys.tolist(), numpy.split(values, lengths.cumsum()[:-1]), strict=True)


class Shards:
    """Documents and their values beside an output file, in shards; a context manager.

    Args:
        output: the file that the run will make; the shards are in the directory `output` + ".partial".
        settings: JSON values that identify the results. Shards of other settings are refused.

    Attributes:
        directory: where they are.
        keys: (n,) int64, the documents that were there at the start, in the order of recording.
        lengths: (n,) int32, their tokens.
        state: dict that survives as well, after `save_state`.

    Raises:
        ValueError: the shards belong to a run with other settings; names the differences.
        BlockingIOError: another process is writing them.
    """

    def __init__(self, output: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.directory = Path(f"{output}.partial")
        self.settings = settings
        self.state: dict[str, Any] = {}
        self.keys, self.lengths = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.int32)
        self._shards: list[Path] = []
        self._waiting: list[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]] = []
        self._since = 0.0  # when the first of them came
        self._lock: BinaryIO | None = None

    @property
    def advice(self) -> str:
        """What to do after a full disk."""
        if not self._shards and not self.state:
            return "nothing of this run was kept. Free some space and run the same command again"
        return f"what was done is kept in {self.directory}. Free some space and run the same command again to go on"

    def __enter__(self) -> Shards:
        with self._naming_a_full_disk():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / "lock", "wb")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lock.close()
                message = "another process is writing this output; wait for it or choose another name"
                raise BlockingIOError(error.errno, message, str(self.directory)) from error
            try:
                self._open()
            except BaseException:
                self._lock.close()
                raise
        return self

    def _open(self) -> None:
        if (self.directory / "rows").is_file():
            raise ValueError(
                f"{self.directory} was left by tokensel 0.1, which kept unfinished results in another form; finish it "
                "with that version, or remove it to begin anew"
            )
        for torn in self.directory.glob(".*.tmp"):
            torn.unlink()
        settings = self.directory / "settings.json"
        if not settings.is_file():
            self._write_json("settings.json", self.settings)
            return
        self._refuse_other_settings(json.loads(settings.read_text(encoding="utf-8")))
        state = self.directory / "state.json"
        self.state = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
        shards = sorted(self.directory.glob("part-*.parquet"), key=_number)
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
        self.keys, self.lengths = numpy.concatenate(keys), numpy.concatenate(lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                return  # what waits would meet the full disk once more
            if self.directory.is_dir():
                self.flush()
        finally:
            if self._lock is not None:
                self._lock.close()
            if error is not None and not self._shards and not self.state:
                self.remove()  # there is nothing to go on from

    def _refuse_other_settings(self, theirs: dict[str, Any]) -> None:
        differences = [
            f"{name} was {theirs.get(name)!r} and is {self.settings.get(name)!r}"
            for name in dict.fromkeys([*theirs, *self.settings])
            if theirs.get(name) != self.settings.get(name)
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

    def save_state(self) -> None:
        """Writes `state`, which the next run finds."""
        with self._naming_a_full_disk():
            self._write_json("state.json", self.state)

    def append(self, keys: numpy.ndarray, lengths: numpy.ndarray, values: numpy.ndarray) -> None:
        """Records documents: keys (n,) int64, lengths (n,) int32, values (Σ lengths,) float32, NaN = no value."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append((keys.copy(), lengths.copy(), values.copy()))  # views would keep what they were cut from
        tokens = sum(len(part) for _, _, part in self._waiting)
        if tokens >= SHARD_TOKENS or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits for its shard."""
        if not self._waiting:
            return
        keys, lengths, values = (numpy.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        number = _number(self._shards[-1]) + 1 if self._shards else 0
        shard = self.directory / f"part-{number:05d}.parquet"
        with self._naming_a_full_disk(), replacing(shard) as temporary:
            table = documents_table(keys, lengths, values, store_schema("nll"))
            pq.write_table(table, temporary, compression="none", use_dictionary=False, write_page_checksum=True)
        self._shards.append(shard)
        self._waiting = []

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

    def tell(self) -> None:
        """Says what is done already, where something is."""
        if len(self.keys):
            print(f"going on with {self.directory}: {len(self.keys):,} documents are done", flush=True)

    def remove(self) -> None:
        """Deletes the shards, once the output is in place."""
        shutil.rmtree(self.directory)
        self._waiting = []


def publish(shards: Shards, writer: HistoryWriter, order: numpy.ndarray | None = None) -> tuple[int, float]:
    """Turns shards into the store that `writer` makes and removes them -> (values, their sum).

    Args:
        order: keys in the order of the store; None = as recorded.
    """
    count, total = 0, 0.0
    with writer:
        for key, values in shards.documents(order):
            writer.append(key, values)
            responses = values[~numpy.isnan(values)]
            count, total = count + len(responses), total + float(responses.sum(dtype=numpy.float64))
    shards.remove()
    return count, total
