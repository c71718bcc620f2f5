"""One file -> its rows, each with the place where it stands. What the name ends in says how it is read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

Rows = Iterator[tuple[str, dict[str, Any]]]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# An empty cell of one of these holds nothing; of others, it is a text without letters.
_NO_TEXT = {
    *("messages", "conversations", "tools", "chat_template_kwargs"),
    *("input_ids", "labels", "attention_mask", "token_weights"),
}


def kind_of(path: Path) -> str:
    """What a file's name ends in, but for what it is packed by: ".jsonl" of `rows.jsonl.gz`."""
    packed = path.suffix.lower() in (".gz", ".zst")
    return (path.with_suffix("") if packed else path).suffix.lower()


def read_file(path: Path, columns: Collection[str] | None = None) -> Rows:
    """(place, row) of every row. A place is "FILE:LINE", or "FILE, row 7" from 0, where rows are not lines.

    A name that ends in none of `READERS` is read as JSON. Cells of CSV are text, but for a `weight`. An
    empty one is an empty text, or None where its column is of lists or objects.

    Args:
        columns: those to read, so that no other can stop it: the others are None. None = all.
    Raises:
        ValueError: "PLACE: reason" for what is no row; "FILE cannot be read: reason", unpacking among them.
    """
    try:
        for place, row in READERS.get(kind_of(path), _read_json)(path, columns):
            if columns is not None:
                row = {name: value if name in columns else None for name, value in row.items()}
            yield place, row
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked where its name ends in .gz or .zst."""
    return io.BufferedReader(pa.input_stream(str(path)))  # type: ignore[arg-type, return-value]


def _read_json(path: Path, columns: Collection[str] | None) -> Rows:
    """An object a line, or one array of objects."""
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for count, (number, line) in enumerate(lines):
            if count == 0 and line.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
                yield from _read_array(path, number, line + file.read())
                return
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # of the JSON, of the UTF-8, or too many brackets
                raise ValueError(f"{place}: {error}; expected one JSON object a line") from error
            yield place, _check_object(place, row, "one JSON object a line")


def _read_array(path: Path, first: int, text: bytes) -> Rows:
    """The objects of an array that begins in line `first`."""
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        number = first - 1 + error.lineno
        raise ValueError(f"{path}:{number}: {error.msg}; expected one JSON array of objects, or one a line") from error
    except UnicodeDecodeError as error:
        number = first + text.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{number}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {error}") from error
    for number, row in enumerate(rows):
        place = f"{path}, row {number}"
        yield place, _check_object(place, row, "an array of JSON objects")


def _check_object(place: str, row: Any, expected: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not row:
        found = "an empty object" if row == {} else type(row).__name__
        raise ValueError(f"{place}: expected {expected}, found {found}")
    return row


def _read_csv(path: Path, columns: Collection[str] | None) -> Rows:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the 128 KiB that a cell has by default
    with _open(path) as file:
        reader = csv.DictReader(_text(path, file), delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        try:
            names = list(reader.fieldnames or ())
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{path}:1: the header has {sorted(twice)[0]!r} twice")
            for row in reader:
                more = row.pop(None, [])  # type: ignore[call-overload]  # the name of cells that have none
                cells = [cell for cell in [*row.values(), *more] if cell is not None]
                inside = "".join(cells).count("\n")
                place = f"{path}:{reader.line_num - inside}"  # the line that it begins in
                if len(cells) != len(names):
                    raise ValueError(
                        f"{place}: {len(cells)} cells, but the header has {len(names)}; text with a delimiter, a "
                        "quote or a newline in it needs quotes"
                    )
                row |= {name: None for name in row if name in _NO_TEXT and not row[name]}
                yield place, row | ({"weight": _number(place, row["weight"])} if "weight" in row else {})
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: {error}") from error  # behind the last whole row


def _text(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from error


def _number(place: str, cell: str) -> float | None:
    try:
        return float(cell) if cell else None
    except ValueError as error:
        raise ValueError(f"{place}: weight must be a number; got {cell!r}") from error


def _read_parquet(path: Path, columns: Collection[str] | None) -> Rows:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        read = [name for name in names if columns is None or name in columns] or names[:1]  # or how many there are
        number = 0
        for group in range(file.num_row_groups):
            rows = datasets.Dataset(datasets.table.InMemoryTable(file.read_row_group(group, columns=read)))
            for row in rows:
                yield f"{path}, row {number}", dict.fromkeys(names) | row
                number += 1


READERS: dict[str, Callable[[Path, Collection[str] | None], Rows]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
