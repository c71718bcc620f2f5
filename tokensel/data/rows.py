"""Files and named datasets -> rows: a `datasets.Dataset` with a column for every field."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.data_files import DataFilesList, get_data_patterns
from huggingface_hub import DatasetCard

from tokensel.data.readers import READERS, kind_of, read_file

DATA_SUFFIXES = {*READERS, *".txt .arrow .gz .zst .bz2 .xz .lz4 .zip .tar".split()}
Names = str | os.PathLike | Sequence[str | os.PathLike]

# What pyarrow raises for values that it has no column for: mixed types, huge integers, halves of surrogate pairs.
_NOT_ARROW = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


class RowError(ValueError):
    """A row that cannot be encoded. `row` is its number, from 0."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


def load_rows(
    name_or_path: Names, split: str = "train", *, streaming: bool = False, columns: Collection[str] | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Reads files, or loads a dataset by its Hugging Face name (which may download it).

    JSON (an object a line, or one array of them), CSV and TSV may be packed as .gz or .zst; Parquet is read, too. Rows
    and files may differ in their fields and in the types of these. Whatever holds objects, or has no one type, becomes
    a `Json` column. Blank lines are skipped.

    Args:
        name_or_path: a file, a list of files, a directory of files whose names tell their splits (or are all of
            "train"), one that `save_to_disk` wrote, or what `datasets.load_dataset` takes.
        split: files that are named one by one are all of "train".
        streaming: an `IterableDataset`, which reads as it goes. Of files its rows have `columns`; else the fields of
            each file's first row, and their own.
        columns: those that are read from files; the others are None, and cannot stop the reading. None = all.
    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        ValueError: "FILE:LINE: reason" for what is no row, "FILE, row 7: reason" where rows are not lines; files
            without rows; a split that is not there.
    """
    files = files_of(name_or_path, split)
    if files is None:
        return _load_named(told(name_or_path), split, streaming)
    if streaming:
        first = columns or dict.fromkeys(name for file in files for name in next(_rows_of([file], None, ()), ()))
        return datasets.IterableDataset.from_generator(
            _rows_of, gen_kwargs={"files": files, "columns": columns and tuple(columns), "fields": tuple(first)}
        )
    names, rows = [], []
    for file in files:
        for name, row in read_file(file, columns):
            names.append(name)
            rows.append(row)
    if not rows:
        raise ValueError(f"{told(files)} has no rows; expected one JSON object a line")
    return as_dataset(rows, names)


def place_of_row(name_or_path: Names, row: int, split: str = "train") -> str:
    """Where a row of what `load_rows` read stands, for errors: "FILE:LINE", or "NAME, row 7" of a named dataset."""
    files = files_of(name_or_path, split)
    if files is None:
        return f"{told(name_or_path)}, row {row}"
    every = itertools.chain.from_iterable(read_file(file, ()) for file in files)
    place, _ = next(itertools.islice(every, row, None))
    return place


def files_of(name_or_path: Names, split: str) -> list[Path] | None:
    """The files that `load_rows` reads; None where it asks `datasets`.

    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        ValueError: no name, a split other than "train" of files that are named one by one, or a directory with data
            of kinds that are read and of others.
    """
    names = [name_or_path] if isinstance(name_or_path, (str, os.PathLike)) else list(name_or_path)
    if not names:
        raise ValueError("the list of files is empty; name at least one")
    paths = [Path(name).expanduser() for name in names]
    if len(names) == 1 and paths[0].is_dir():
        return _files_of_split(paths[0], split)
    for path in paths:
        if not path.is_file():
            if len(names) == 1 and not _looks_like_path(names[0]):
                return None
            raise FileNotFoundError(
                errno.ENOENT,
                "no such file; give a file, a list of files, a directory or the name of a Hugging Face dataset",
                str(path),
            )
    if split != "train":
        raise ValueError(
            f"{paths[0]} is a file, whose rows are all of the split 'train'; got {split!r}. Name the file of that "
            "split, or the directory of files whose names begin with their splits"
        )
    return paths


def are_files(name_or_path: Names) -> bool:
    """Whether it names files one by one."""
    names = [name_or_path] if isinstance(name_or_path, (str, os.PathLike)) else name_or_path
    return all(Path(name).expanduser().is_file() for name in names)


def shared(one: tuple[Names, str], other: tuple[Names, str]) -> str | None:
    """What two (name, split) both read rows from, for errors; None where they cannot have a row in common.

    Slices of one split have none where one ends before the other begins: "train[:90%]", "train[90%:]".
    """
    if "all" in (one[1], other[1]) and _place(one[0]) == _place(other[0]):
        return f"{told(one[0])} (all)"
    for (files, slice_), (others, other_slice) in itertools.product(_sources(*one), _sources(*other)):
        both = {*files} & {*others}
        apart = _ends_before(slice_, other_slice) or _ends_before(other_slice, slice_)
        if both and not (files == others and apart):
            return min(both)
    return None


def _sources(name_or_path: Names, split: str) -> Iterator[tuple[list[str], Any]]:
    """(what a split is read from, the slice of that) of each split of a sum of splits."""
    files = files_of(name_or_path, split)
    try:
        slices = datasets.ReadInstruction.from_spec(split)._relative_instructions
    except ValueError:  # no name that `datasets` gives a split
        slices = datasets.ReadInstruction(split)._relative_instructions
    for slice_ in slices:
        found = files_of(name_or_path, slice_.splitname) if files is None else files
        named = [f"{_place(name_or_path)} ({slice_.splitname})"]
        yield (named if found is None else [str(file.resolve()) for file in found]), slice_


def _place(name_or_path: Names) -> str:
    name = told(name_or_path)
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


def _ends_before(one: Any, other: Any) -> bool:
    """Whether it does so for every length of the split. Percents of the start and of the end round differently."""
    end, begin = one.to, other.from_
    if end is None or begin is None or (one.unit, one.rounding) != (other.unit, other.rounding):
        return False
    return (end < 0) == (begin < 0) and end <= begin


def told(name_or_path: Names) -> str:
    """As it is printed."""
    return str(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else ", ".join(map(str, name_or_path))


def _looks_like_path(name: str | os.PathLike) -> bool:
    """A dataset's name is "name" or "owner/name"."""
    path = Path(name)
    return (
        isinstance(name, os.PathLike)
        or path.suffix in DATA_SUFFIXES
        or path.is_absolute()
        or len(path.parts) > 2
        or str(name).startswith((".", "~"))
    )


def _files_of_split(directory: Path, split: str) -> list[Path] | None:
    """None where `datasets` knows better: saved by it, configured in README.md, slices of splits, other files alone."""
    card = directory / "README.md"
    described = card.is_file() and card.read_bytes().startswith(b"---")
    if _is_saved(directory) or (described and DatasetCard.load(card).data.get("configs")):
        return None
    patterns = {str(name): found for name, found in get_data_patterns(str(directory)).items()}
    files = [Path(file) for file in DataFilesList.from_patterns(patterns.get(split, []), str(directory))]
    read = [file for file in files if kind_of(file) in READERS]
    others = [file.name for file in files if kind_of(file) not in READERS and DATA_SUFFIXES & {*file.suffixes}]
    if read and others:
        raise ValueError(
            f"{directory} has files of the split {split!r} that are not read, beside {read[0].name} and others that "
            f"are: {', '.join(others)}. Unpack or convert them, or give the list of files to read"
        )
    return read or None


def _is_saved(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_named(name: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    directory = Path(name).expanduser()
    if not _is_saved(directory):
        name = str(directory) if directory.is_dir() else name
        return datasets.load_dataset(name, split=split, **({"streaming": True} if streaming else {}))
    saved = datasets.load_from_disk(str(directory))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; there are {', '.join(splits)}")
    return splits[split].to_iterable_dataset() if streaming else splits[split]


def _rows_of(files: list[Path], columns: Collection[str] | None, fields: Collection[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        for _, row in read_file(file, columns):
            yield dict.fromkeys(fields) | {name: row[name] for name in row if columns is None or name in columns}


def as_dataset(rows: list[dict], names: Sequence[str]) -> datasets.Dataset:
    """A column for every field of any row. `names[i]` says where row i is, for errors."""
    fields = dict.fromkeys(field for row in rows for field in row)
    columns = {field: _column(field, [row.get(field) for row in rows], names) for field in fields}
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))


def _column(field: str, values: list[Any], names: Sequence[str]) -> pa.ChunkedArray:
    """Typed, where one type says all: Arrow would give each object the keys of all others. Else as JSON."""
    if not any(_is_object(value) for value in values):
        try:
            return datasets.Dataset.from_dict({field: values}).data.column(field)
        except _NOT_ARROW:
            pass
    texts: list[str | None] = []
    for value, name in zip(values, names, strict=True):
        try:
            texts.append(None if value is None else json.dumps(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name}: field {field!r} cannot be stored: {error}") from error
    chunks = [pa.array(texts[i : i + 1000], pa.json_()) for i in range(0, len(texts), 1000)]
    return pa.chunked_array(chunks)  # one array holds 2 GiB of text at most


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))
