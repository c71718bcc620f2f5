"""The journal of an unfinished run: results that a killed process leaves behind and the next one goes on from.

    OUTPUT.partial/settings.json   what the results belong to
    OUTPUT.partial/rows            a record for each batch of documents, only ever appended to
    OUTPUT.partial/state.json      what else the run wants to remember

A record is complete or it does not count: a checksum finds the torn end that a kill or a full disk leaves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_HEADER = struct.Struct("<4sIQI")  # magic, documents, tokens, CRC-32 of the body
_MAGIC = b"tsj1"
_HEAD_BYTES = 12  # a document's key (int64) and length (int32)


@contextlib.contextmanager
def naming_a_full_disk(path: str | os.PathLike, what: str, advice: str) -> Iterator[None]:
    """An OSError for a full disk keeps its errno and says what was being written and what to do; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)} while writing {what}; {advice}", str(path)) from error


class Journal:
    """Appends documents and their values beside an output file; a context manager.

    Args:
        output: the file that the run will make; the journal is the directory `output` + ".partial".
        settings: JSON values that identify the results. A journal of other settings is refused.

    Attributes:
        directory: where it is.
        keys: (n,) int64, the documents recorded so far, in the order of recording.
        lengths: (n,) int32, their tokens.
        state: dict that survives as well, after `save_state`.

    Raises:
        ValueError: the journal belongs to a run with other settings; names the differences.
        BlockingIOError: another process is writing it.
    """

    def __init__(self, output: str | os.PathLike, settings: dict):
        self.directory = Path(f"{output}.partial")
        self.settings = settings
        self.state: dict = {}
        self.keys, self.lengths = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.int32)
        self._starts = numpy.empty(0, numpy.int64)  # (n,) byte in the file where a document's values begin
        self._new: list[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]] = []  # appended since `_join`
        self._file = None

    @property
    def advice(self) -> str:
        """What to do after a full disk."""
        return f"what was done is kept in {self.directory}. Free some space and run the same command again to go on"

    def __enter__(self) -> Journal:
        with naming_a_full_disk(self.directory, "the journal of the run", self.advice):
            self.directory.mkdir(parents=True, exist_ok=True)
            known = self.directory / "settings.json"
            self._file = open(self.directory / "rows", "a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file.close()
                message = "another process is writing this output; wait for it or choose another name"
                raise BlockingIOError(error.errno, message, str(self.directory)) from error
            if known.is_file():
                self._check_settings(json.loads(known.read_text(encoding="utf-8")))
                state = self.directory / "state.json"
                self.state = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
                self._read_records()
            else:
                self._file.truncate(0)
                self._replace("settings.json", self.settings)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._file.close()
        except OSError as again:  # what a full disk refused is flushed once more; that error has been raised
            if error is None or again.errno not in FULL_DISK:
                raise
        if error is not None and not len(self.keys) and not self._new and not self.state:
            self.remove()  # there is nothing to go on from

    def _check_settings(self, found: dict) -> None:
        differences = [
            f"{name} was {found.get(name)!r} and is {self.settings.get(name)!r}"
            for name in dict.fromkeys([*found, *self.settings])
            if found.get(name) != self.settings.get(name)
        ]
        if differences:
            self._file.close()
            raise ValueError(
                f"{self.directory} belongs to an unfinished run with other settings: {'; '.join(differences)}. Give "
                "the same settings to go on with it, or remove it to begin anew"
            )

    def _replace(self, name: str, value: dict) -> None:
        temporary = self.directory / f".{name}"
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.directory / name)

    def save_state(self) -> None:
        """Writes `state`, which the next run finds."""
        with naming_a_full_disk(self.directory, "the journal of the run", self.advice):
            self._replace("state.json", self.state)

    def _read_records(self) -> None:
        """Finds all complete records and cuts off what comes behind them."""
        end = 0
        self._file.seek(0)
        while len(header := self._file.read(_HEADER.size)) == _HEADER.size:
            magic, documents, tokens, checksum = _HEADER.unpack(header)
            size = documents * _HEAD_BYTES + 4 * tokens
            # a torn header could ask for any size; never read more than the file has
            if magic != _MAGIC or size > os.fstat(self._file.fileno()).st_size - self._file.tell():
                break
            body = self._file.read(size)
            if zlib.crc32(body) != checksum:
                break
            keys = numpy.frombuffer(body, numpy.int64, documents)
            lengths = numpy.frombuffer(body, numpy.int32, documents, offset=8 * documents)
            self._remember(keys.copy(), lengths.copy(), end)
            end = self._file.tell()
        self._file.truncate(end)
        self._join()

    def _remember(self, keys: numpy.ndarray, lengths: numpy.ndarray, record_start: int) -> None:
        first = record_start + _HEADER.size + len(keys) * _HEAD_BYTES
        self._new.append((keys, lengths, first + 4 * (lengths.cumsum(dtype=numpy.int64) - lengths)))

    def _join(self) -> None:
        if self._new:
            parts = zip((self.keys, self.lengths, self._starts), *self._new, strict=True)
            self.keys, self.lengths, self._starts = (numpy.concatenate(part) for part in parts)
            self._new = []

    def append(self, keys: numpy.ndarray, lengths: numpy.ndarray, values: numpy.ndarray) -> None:
        """Records documents: keys (n,) int64, lengths (n,) int32, values (Σ lengths,) float32, NaN = no value."""
        body = b"".join((keys.tobytes(), lengths.tobytes(), values.tobytes()))
        with naming_a_full_disk(self.directory, "the journal of the run", self.advice):
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(_HEADER.pack(_MAGIC, len(keys), len(values), zlib.crc32(body)))
            self._file.write(body)
            self._file.flush()  # the kernel has it: a killed process loses nothing
        self._remember(keys.copy(), lengths.copy(), start)  # views would keep what they were cut from alive

    def documents(self, order: numpy.ndarray | None = None) -> Iterator[tuple[int, numpy.ndarray]]:
        """(key, values) of recorded documents, read one at a time. order: keys; None = as recorded."""
        self._join()
        if order is None:
            places = range(len(self.keys))
        else:
            by_key = self.keys.argsort()
            places = by_key[numpy.searchsorted(self.keys, order, sorter=by_key)]
        for place in places:
            self._file.seek(int(self._starts[place]))
            values = numpy.frombuffer(self._file.read(4 * int(self.lengths[place])), numpy.float32)
            yield int(self.keys[place]), values

    def remove(self) -> None:
        """Deletes the journal, once the output is in place."""
        shutil.rmtree(self.directory)
