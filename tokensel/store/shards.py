"""What an unfinished run has done: shards of its output, which a killed process leaves and the next one goes on from.

    OUTPUT.partial/settings.json        what the results belong to
    OUTPUT.partial/part-00000.parquet   documents and their values, as in a store; a shard that is listed is done
    OUTPUT.partial/state.json           what else the run wants to remember

A shard takes its name when it is whole, so there are no torn ones. A killed process loses what waits for its shard:
at most SHARD_TOKENS tokens, and little more than SHARD_SECONDS of work.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
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

SHARD_TOKENS = 1 << 20  # 4 MiB of values
SHARD_SECONDS = 10.0
READ_TOKENS = 1 << 24  # 64 MiB of values: what `documents` holds while it brings them into another order


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
        ValueError: the shards belong to a run with other settings (names the differences), or are damaged.
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
        self._shards = sorted(self.directory.glob("part-*.parquet"))
        parts = [self._read(shard, values=False) for shard in self._shards]
        if parts:
            self.keys, self.lengths = (numpy.concatenate([part[i] for part in parts]) for i in (0, 1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                return  # what waits would meet the full disk once more
            if self.directory.is_dir():
                self._write_shard()
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
            self._write_shard()

    def _write_shard(self) -> None:
        if not self._waiting:
            return
        keys, lengths, values = (numpy.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        number = int(self._shards[-1].stem.rpartition("-")[2]) + 1 if self._shards else 0
        shard = self.directory / f"part-{number:05d}.parquet"
        with self._naming_a_full_disk(), replacing(shard) as temporary:
            table = documents_table(keys, lengths, values, store_schema("nll"))
            pq.write_table(table, temporary, compression="none", use_dictionary=False, write_page_checksum=True)
        self._shards.append(shard)
        self._waiting = []

    def _read(self, shard: Path, values: bool = True) -> tuple[numpy.ndarray, ...]:
        """(keys, lengths, values) of a shard, the last only where it is asked for."""
        try:
            columns = None if values else ["key", "length"]
            table = pq.read_table(shard, columns=columns, page_checksum_verification=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{shard} is damaged ({error}); remove {self.directory} to begin anew") from error
        return read_documents(table)

    def documents(self, order: numpy.ndarray | None = None) -> Iterator[tuple[int, numpy.ndarray]]:
        """(key, values) of all recorded documents, holding READ_TOKENS values at a time.

        Args:
            order: keys; None = as recorded.
        """
        self._write_shard()
        if order is None:
            for shard in self._shards:
                keys, lengths, values = self._read(shard)
                yield from zip(keys.tolist(), numpy.split(values, lengths.cumsum()[:-1]), strict=True)
            return
        index = [self._read(shard, values=False) for shard in self._shards]
        keys, lengths = (numpy.concatenate([part[i] for part in index]) for i in (0, 1))
        shard_of = numpy.repeat(numpy.arange(len(index)), [len(part[0]) for part in index])
        by_key = keys.argsort()
        places = by_key[numpy.searchsorted(keys, order, sorter=by_key)]  # of the documents, as recorded
        tokens = lengths[places].cumsum(dtype=numpy.int64)
        first = 0
        while first < len(places):
            done = int(tokens[first - 1]) if first else 0
            last = max(first + 1, int(numpy.searchsorted(tokens, done + READ_TOKENS, side="right")))
            yield from self._gather(order[first:last], shard_of[places[first:last]])
            first = last

    def _gather(self, wanted: numpy.ndarray, shard_of: numpy.ndarray) -> Iterator[tuple[int, numpy.ndarray]]:
        """(key, values) of some documents, in their order, from the shards that have them."""
        values_of: dict[int, numpy.ndarray] = {}
        for number in numpy.unique(shard_of):
            mine = set(wanted[shard_of == number].tolist())
            keys, lengths, values = self._read(self._shards[number])
            parts = numpy.split(values, lengths.cumsum()[:-1])
            values_of |= {key: part.copy() for key, part in zip(keys.tolist(), parts, strict=True) if key in mine}
        for key in wanted.tolist():
            yield key, values_of[key]

    def remove(self) -> None:
        """Deletes the shards, once the output is in place."""
        shutil.rmtree(self.directory)
        self._waiting = []
