"""Files and named datasets -> rows: a `datasets.Dataset` with a column for every field."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst"}

# What pyarrow raises for values that it has no column for: mixed types, huge integers, halves of surrogate pairs.
_NOT_ARROW = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


class RowError(ValueError):
    """A row that cannot be encoded. `row` is its number, from 0."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


def load_rows(name_or_path: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """Reads a JSONL file, or loads a dataset by its Hugging Face name (which may download it).

    Args:
        name_or_path: a file with one JSON object a line, UTF-8, blank lines skipped. Anything that is not a
            file and does not look like one goes to `datasets.load_dataset`.
        split: the split of a named dataset; a file has none.
    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        ValueError: "FILE:LINE: reason" for a line that is not a JSON object or whose fields differ in type
            from earlier lines; a file without rows.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _read_jsonl(path)
    # A dataset's name is "name" or "owner/name"; a directory that exists is also load_dataset's to read.
    looks_like_path = (
        isinstance(name_or_path, os.PathLike)
        or path.suffix in DATA_SUFFIXES
        or path.is_absolute()
        or len(path.parts) > 2
        or str(name_or_path).startswith((".", "~"))
    )
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "no such file; give a JSONL file or the name of a Hugging Face dataset", str(path)
        )
    return datasets.load_dataset(str(name_or_path), split=split)


def _read_jsonl(path: Path) -> datasets.Dataset:
    rows, names = [], []
    with open(path, "rb") as file:
        for number, line in _lines_of_rows(file):
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # of the JSON, of the UTF-8, or too many brackets
                raise ValueError(f"{path}:{number}: {error}; expected one JSON object a line") from error
            if not isinstance(row, dict) or not row:
                found = "an empty object" if row == {} else type(row).__name__
                raise ValueError(f"{path}:{number}: expected one JSON object a line, found {found}")
            rows.append(row)
            names.append(f"{path}:{number}")
    if not rows:
        raise ValueError(f"{path} has no rows; expected one JSON object a line")
    return as_dataset(rows, names)


def _lines_of_rows(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are rows: all but blank ones."""
    return ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def place_of_row(name_or_path: str | os.PathLike, row: int) -> str:
    """Where a row of what `load_rows` read stands, for errors: "FILE:LINE", or "NAME, row 7" of a named dataset."""
    if not Path(name_or_path).is_file():
        return f"{name_or_path}, row {row}"
    with open(name_or_path, "rb") as file:
        number, _ = next(itertools.islice(_lines_of_rows(file), row, None))
    return f"{name_or_path}:{number}"


def as_dataset(rows: list[dict], names: Sequence[str]) -> datasets.Dataset:
    """A column for every field of any row. `names[i]` says where row i is, for errors."""
    fields = dict.fromkeys(field for row in rows for field in row)
    try:
        return datasets.Dataset.from_dict({field: [row.get(field) for row in rows] for field in fields})
    except _NOT_ARROW as error:
        for field in fields:
            first = None
            for row, name in zip(rows, names, strict=True):
                kind = type(row.get(field)).__name__
                if row.get(field) is not None and kind != (first := first or kind):
                    raise ValueError(
                        f"{name}: field {field!r} is {kind} here and {first} before; a field has one type"
                    ) from error
                try:
                    pa.array([row.get(field)])
                except _NOT_ARROW as reason:
                    raise ValueError(f"{name}: field {field!r} cannot be stored: {reason}") from error
        raise ValueError(f"{names[0]} and later rows: a field has more than one type ({error})") from error
