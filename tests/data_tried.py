"""Each kind of file and each layout of rows that is tried; docs/data.md shows them. Imports nothing of the tests."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

# Files of the same two rows.

ROWS = [{"prompt": "a", "completion": "b c"}, {"prompt": "d, e", "completion": 'f "g"\nh'}]


def _lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _cells(delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _zst(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def _parquet() -> bytes:
    packed = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), packed, row_group_size=1)
    return packed.getvalue().to_pybytes()


class File(NamedTuple):
    """A file of `ROWS`, what is said of it, and the place of its second row."""

    name: str
    about: str
    place: str

    def write(self, folder: Path) -> Path:
        content = {
            "rows.jsonl": _lines,
            "rows.ndjson": _lines,
            "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
            "rows.jsonl.gz": lambda: gzip.compress(_lines()),
            "rows.jsonl.zst": lambda: _zst(_lines()),
            "rows.csv": _cells,
            "rows.tsv": lambda: _cells("\t"),
            "rows.csv.gz": lambda: gzip.compress(_cells()),
            "rows.parquet": _parquet,
        }[self.name]()
        (folder / self.name).write_bytes(content)
        return folder / self.name


FILES = [
    File("rows.jsonl", "JSON, an object a line; so is read what ends in nothing known, too", "rows.jsonl:2"),
    File("rows.ndjson", "the same", "rows.ndjson:2"),
    File("rows.json", "JSON, an object a line or one array of objects", "rows.json, row 1"),
    File("rows.jsonl.gz", "any of these but Parquet, packed", "rows.jsonl.gz:2"),
    File("rows.jsonl.zst", "the same; needs no package", "rows.jsonl.zst:2"),
    File("rows.csv", "a header and lines of cells, which are text (a `weight` is a number)", "rows.csv:3"),
    File("rows.tsv", "the same, a tab between cells", "rows.tsv:3"),
    File("rows.csv.gz", "the same, packed", "rows.csv.gz:3"),
    File("rows.parquet", "Parquet", "rows.parquet, row 1"),
]


def write_list(folder: Path) -> list[Path]:
    return [file.write(folder) for file in FILES]


def write_directory(folder: Path) -> Path:
    """One whose files' names tell their splits, beside a file that holds no rows."""
    for file in FILES:
        part = folder / "dir" / file.name.replace("rows", "test" if file.name == "rows.tsv" else f"train-{file.name}")
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(file.write(folder).read_bytes())
    (folder / "dir" / "README.md").write_text("# Rows\n")
    return folder / "dir"


def write_saved(folder: Path) -> Path:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(folder / "saved")
    return folder / "saved"


class Many(NamedTuple):
    """Several files in one, what is said of them, and how often `ROWS` is in their "train"."""

    name: str
    about: str
    write: Callable[[Path], Any]
    times: int


MANY = [
    Many("a list of files", "of any kinds, one behind the other; all are of the split `train`", write_list, len(FILES)),
    Many(
        "a directory",
        "`train-0.parquet`, `test.csv`: names tell the splits, as `datasets` has it; without, all are `train`",
        write_directory,
        len(FILES) - 1,
    ),
    Many("a directory by `save_to_disk`", "with one split or several", write_saved, 1),
]


# Rows, and what tests/encoding.py's tokenizer makes of them: a token a word, "." for a label of -100.


class Row(NamedTuple):
    """A row of a layout, its tokens, and which of them are responses."""

    layout: str
    row: dict[str, Any]
    tokens: str
    labels: str
    settings: dict[str, Any] = {}


def _turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


_ANSWER = [{"role": "assistant", "content": "b"}]
_WORSE = [{"role": "assistant", "content": "c"}]

LAYOUTS = [
    Row("prompt and completion", {"prompt": "a b", "completion": "c"}, "<s> a b c </s>", ". . . c </s>"),
    Row(
        "prompt and completion",
        {"prompt": _turns("a"), "completion": _ANSWER},
        "<user> a <bot> b </s>",
        ". . . b </s>",
    ),
    Row("question and answer", {"question": "a b", "answer": "c"}, "<s> a b \n c </s>", ". . . . c </s>"),
    Row(
        "chat",
        {"messages": _turns("a", "b", "c", "d")},
        "<user> a <bot> b </s> <user> c <bot> d </s>",
        ". . . b </s> . . . d </s>",
    ),
    Row(
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "<user> a <bot> b </s>",
        ". . . b </s>",
    ),
    Row(
        "Alpaca",
        {"instruction": "a", "input": "b", "output": "c"},
        "<user> a \n b <bot> c </s>",
        ". . . . . c </s>",
    ),
    Row("Alpaca", {"instruction": "a", "input": "", "output": "c"}, "<user> a <bot> c </s>", ". . . c </s>"),
    Row("text", {"text": "a b c"}, "<s> a b c </s>", ". a b c </s>"),
    Row("pair", {"prompt": "a ", "chosen": "b", "rejected": "c"}, "<s> a b </s>", ". . b </s>"),
    Row("pair", {"chosen": "a b c", "rejected": "a b d"}, "<s> a b c </s>", ". . . c </s>"),
    Row("pair", {"question": "a", "chosen": "b", "rejected": "c"}, "<user> a <bot> b </s>", ". . . b </s>"),
    Row(
        "pair",
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
        "<user> a \n b <bot> c </s>",
        ". . . . . c </s>",
    ),
    Row(
        "pair",
        {"chosen": _turns("a") + _ANSWER, "rejected": _turns("a") + _WORSE},
        "<user> a <bot> b </s>",
        ". . . b </s>",
    ),
    Row(
        "pair",
        {"prompt": _turns("a"), "chosen": _ANSWER, "rejected": _WORSE},
        "<user> a <bot> b </s>",
        ". . . b </s>",
    ),
    Row("token ids", {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, "a b c", ". b c"),
]
