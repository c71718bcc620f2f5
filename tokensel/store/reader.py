"""Reading a store: row group by row group, or whole, to look documents up.

Rows are found by what the document *is* (its token ids), never by where it stood, so shuffling, sharding,
packing, padding and filtering between scoring and training cannot misalign them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokensel.documents import BatchLayout, HostDocuments, keys_at
from tokensel.store.format import (
    CONTENTS,
    FORMAT_VERSION,
    MANIFEST,
    METADATA_KEY,
    checked_layout,
    footer_of,
    read_documents,
    tokenizer_fingerprint,
)

HELD_TOKENS = 1 << 26  # 256 MiB
LARGEST_RATIO = 100  # of what is in memory to what is in a file; a store is not compressed
HEADER = ("format_version", "tokenizer", "model", "max_length", "dataset", "documents", "tokens")

_REPAIR = (
    "Run `tokensel score` with the same tokenizer, chat template, turns, max_length, dataset, prompt and response "
    "columns as this run, or record what the trainer trains: trainer.record_history(path). In a lookup of your own "
    "pass key_mask if rows are padded and segment_ids if they are packed"
)


class HistoryMissError(LookupError):
    """A document or a response token that the history store cannot answer for."""


class StoreReader:
    """A history store read row group by row group. Arguments and errors of `HistoryStore.open`.

    Attributes:
        metadata: as of HistoryStore.
    """

    def __init__(self, path: str | os.PathLike, *, content: str = "nll", tokenizer=None):
        self.path, self.content = Path(path), content
        self.metadata: dict[str, Any] = {}
        if self.path.is_dir():
            self.metadata, files = self._read_manifest()
        elif self.path.is_file():
            files = [self.path]
        else:
            raise self._missing()
        self._parts = {file: self._checked(file) for file in files}  # documents of each row group
        self._check_metadata(tokenizer)

    def _missing(self) -> FileNotFoundError:
        made = CONTENTS[self.content].rpartition(": ")[2]
        if Path(f"{self.path}.partial").is_dir():
            problem = "the store is not finished; wait, or go on with"
        else:
            problem = "no history store; make it with"
        return FileNotFoundError(errno.ENOENT, f"{problem} {made}", str(self.path))

    def _read_manifest(self) -> tuple[dict[str, Any], list[Path]]:
        """(metadata, the files of the parts) of a directory. Files are looked for in it alone."""
        if not (self.path / MANIFEST).is_file():
            raise ValueError(
                f"{self.path} has no {MANIFEST}, and so is no history store; make one with `tokensel score`"
            )
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            sizes = [(int(part["documents"]), int(part["tokens"])) for part in manifest["parts"]]
            parts = [(str(part["file"]), str(part["footer"])) for part in manifest["parts"]]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{self.path / MANIFEST} is no manifest of a history store ({error!r})") from error
        for name, footer in parts:
            if Path(name).name != name or not name.endswith(".parquet"):
                raise ValueError(f"{self.path / MANIFEST} names {name!r}, which is no file of this directory")
            if not (self.path / name).is_file():
                raise ValueError(f"{self.path} lacks {name}, which its manifest names; copy the directory whole")
            with self._naming_damage(self.path / name):
                found = footer_of(self.path / name)
            if found != footer:
                raise ValueError(f"{self.path / name} is of another store than the manifest; copy the directory whole")
        if others := {p.name for p in self.path.glob("*.parquet")} - {name for name, _ in parts}:
            raise ValueError(f"{self.path} has {min(others)}, which its manifest does not name; move it away")
        metadata = {name: value for name, value in manifest.items() if name != "parts"}
        totals = [sum(column) for column in zip(*sizes, strict=True)]
        if totals != [metadata.get("documents"), metadata.get("tokens")]:
            raise ValueError(f"{self.path / MANIFEST} does not add up: its parts hold {totals} documents and tokens")
        return metadata, [self.path / name for name, _ in parts]

    def _checked(self, path: Path) -> list[int]:
        """How many documents each row group of a part has."""
        with self._opened(path) as parquet:
            header = self._header(path, parquet)
            self.metadata = self.metadata or header
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            expanded = 4 * sum(group.column(group.num_columns - 1).num_values for group in groups)
            if expanded > LARGEST_RATIO * path.stat().st_size:
                raise ValueError(f"{path} would need {expanded:,} bytes of memory, which no store of its size does")
            schema = parquet.schema_arrow
            lists = len(schema) == 3 and pa.types.is_list(schema.types[2])
            lists = lists and schema.types[2].value_type == pa.float32()
            if not lists or schema.names[:2] != ["key", "length"] or schema.types[:2] != [pa.int64(), pa.int32()]:
                raise ValueError(
                    f"{path} has the columns {', '.join(map(str, schema))}, and so is no history store; make one with "
                    "`tokensel score`"
                )
            return [group.num_rows for group in groups]

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        """A part, open as long as it is read: there may be more of them than a process may have open."""
        with open(path, "rb") as file:
            with self._naming_damage(path):
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
            yield parquet

    def _header(self, path: Path, parquet: Any) -> dict[str, Any]:
        text = (parquet.metadata.metadata or {}).get(METADATA_KEY)
        if text is None:
            raise ValueError(f"{path} is Parquet but not a history store; make one with `tokensel score`")
        try:
            return {"content": "nll"} | json.loads(text)  # the first stores did not say
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} has a header that cannot be read ({error}); make it anew") from error

    @contextmanager
    def _naming_damage(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{path} is not a readable Parquet file ({error}); make it anew with `tokensel score`"
            ) from error

    def _check_metadata(self, tokenizer) -> None:
        made, path = self.metadata, self.path
        if missing := [name for name in HEADER if name not in made]:
            raise ValueError(f"the header of {path} lacks {missing[0]}; make the store anew with `tokensel score`")
        if made["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has history format {made['format_version']}, this version of tokensel reads "
                f"{FORMAT_VERSION}; make it anew with `tokensel score`"
            )
        if not isinstance(made["content"], str) or made["content"] not in CONTENTS:
            raise ValueError(f"{path} holds {made['content']!r}, which this version of tokensel does not know")
        chat = made.get("chat")
        if chat is not None and not (isinstance(chat, dict) and {"template", "turns"} <= chat.keys()):
            raise ValueError(f"the header of {path} has a chat without template and turns; make the store anew")
        if made["content"] != self.content:
            raise ValueError(f"{path} holds {CONTENTS[made['content']]}; here belong {CONTENTS[self.content]}")
        if tokenizer is not None and made["tokenizer"] is not None:
            fingerprint = tokenizer_fingerprint(tokenizer)
            if fingerprint != made["tokenizer"]:
                raise ValueError(
                    f"{path} was made with another tokenizer (fingerprint {made['tokenizer'][:12]}…, "
                    f"this one {fingerprint[:12]}…; model {made['model']!r}); score again with "
                    "`tokensel score` and the tokenizer you train with"
                )

    def digest(self) -> str:
        """sha256 (hex) of the files' footers, which hold the settings, and place, size and extremes of each part."""
        footers = [footer_of(path) for path in self._parts]
        return footers[0] if len(footers) == 1 else hashlib.sha256("".join(footers).encode()).hexdigest()

    def places(self) -> list[tuple[Path, int]]:
        """(file, number in it) of each row group."""
        return [(path, i) for path, groups in self._parts.items() for i in range(len(groups))]

    def index(self) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
        """(keys, lengths) of each row group, without its values."""
        for path, groups in self._parts.items():
            with self._opened(path) as parquet:
                for i in range(len(groups)):
                    with self._naming_damage(path):
                        keys, lengths = read_documents(parquet.read_row_group(i, columns=["key", "length"]))
                    yield keys, lengths

    def row_groups(self, skip: int = 0) -> Iterator[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]]:
        """(keys (n,) int64, lengths (n,) int32, values (Σ lengths,) float32) of each row group.

        Args:
            skip: documents to leave out; whole row groups of them are not read.
        """
        for path, groups in self._parts.items():
            with self._opened(path) as parquet:
                for i, documents in enumerate(groups):
                    if skip >= documents:
                        skip -= documents
                        continue
                    with self._naming_damage(path):
                        keys, lengths, values = read_documents(parquet.read_row_group(i))
                    yield keys[skip:], lengths[skip:], values[lengths[:skip].sum() :]
                    skip = 0


class HistoryStore:
    """A history store: per-token NLL looked up by document. Made by `HistoryStore.open`.

    Memory holds a key, a length and a place of each document, and of the values HELD_TOKENS at most. A larger store
    stays on its disk, and of it is read what lookups need, a row group at a time.

    Attributes:
        metadata: dict with format_version, content, tokenizer (fingerprint or None), model, max_length, dataset, chat
            (template and turns, or None), documents, tokens, tokensel_version.
        repair: what the error about a missing document says to do.
        chat_template: that of the run which looks documents up; named where a document is missing and the store was
            made with another. None = not known.
    """

    def __init__(self, path: Path, metadata: dict, groups: list[tuple[Path, int]], index: list[tuple]):
        self.path, self.metadata = path, metadata
        self.chat_template: str | dict | None = None
        self.repair = _REPAIR
        keys, lengths, starts, group = [], [], [], []
        for number, (group_keys, group_lengths) in enumerate(index):
            keys.append(torch.from_numpy(group_keys.copy()))
            lengths.append(torch.from_numpy(group_lengths.copy()))
            starts.append((lengths[-1].cumsum(0) - lengths[-1]).int())
            group.append(torch.full_like(lengths[-1], number))
        self._keys, order = torch.cat(keys).sort()  # (n,) int64
        self._lengths, self._starts, self._group = (
            torch.cat(part)[order] for part in (lengths, starts, group)
        )  # int32
        self._groups = groups  # (file, number in it)
        self._held: dict[int, Tensor] = {}  # values (tokens,) float32, NaN where no response; the last used comes last

    @classmethod
    def open(cls, path: str | os.PathLike, *, tokenizer=None, content: str = "nll") -> HistoryStore:
        """Opens a store written by `HistoryWriter`. One of HELD_TOKENS at most is read whole, and so known to be whole.

        Args:
            path: the Parquet file, or the directory of such.
            tokenizer: the tokenizer of the training run; compared with the one the store was made with, if
                that one was recorded. Its chat template is compared where a document is missing.
            content: what it must hold, one of CONTENTS.
        Raises:
            FileNotFoundError: there is no such store, or it is not finished.
            ValueError: not a history store, damaged, of a newer format, holding something else, made with another
                tokenizer, or a directory that lacks a part or has a foreign one.
        """
        reader = StoreReader(path, content=content, tokenizer=tokenizer)
        index, metadata = list(reader.index()), reader.metadata
        documents = sum(len(keys) for keys, _ in index)
        tokens = sum(int(lengths.sum(dtype=numpy.int64)) for _, lengths in index)
        if not documents or documents != metadata["documents"] or tokens != metadata["tokens"]:
            raise ValueError(f"{path} does not hold what its header says; make it anew with `tokensel score`")
        store = cls(Path(path), metadata, reader.places(), index)
        if tokens <= HELD_TOKENS:
            groups = (values for _, _, values in reader.row_groups())
            store._held = {number: torch.from_numpy(values.copy()) for number, values in enumerate(groups)}
        store.chat_template = getattr(tokenizer, "chat_template", None)
        return store

    def fingerprint(self) -> str:
        """A hash (hex) of documents and losses: equal for equal stores, wherever their files are and whatever their
        order. Reads them."""
        total = 0
        for keys, lengths, values in StoreReader(self.path, content=self.metadata["content"]).row_groups():
            sizes = torch.from_numpy(lengths.astype(numpy.int64))
            document = torch.repeat_interleave(torch.arange(len(keys)), sizes)
            position = torch.arange(len(values)) - (sizes.cumsum(0) - sizes)[document]
            tokens = keys_at(torch.from_numpy(keys.copy())[document], position)
            total += int(keys_at(tokens, torch.from_numpy(values.view(numpy.int32).astype(numpy.int64))).sum())
        return f"{total % (1 << 64):016x}"

    def _values(self, place: Tensor, position: Tensor) -> Tensor:
        """Values of tokens (t,), of their document's place among the keys and their position in it."""
        group, at = self._group[place], self._starts[place] + position
        values = torch.empty(len(at), dtype=torch.float32)
        for number in group.unique().tolist():
            mine = group == number
            values[mine] = self._read(number)[at[mine]]
        return values

    def _read(self, number: int) -> Tensor:
        """The values of a row group, which are held until others have taken their room."""
        if (values := self._held.pop(number, None)) is None:
            path, in_file = self._groups[number]
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as parquet:  # every worker opens its own
                    *_, read = read_documents(parquet.read_row_group(in_file))
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{path} cannot be read any more ({error})") from error
            values = torch.from_numpy(read.copy())
            while self._held and sum(map(len, self._held.values())) + len(values) > HELD_TOKENS:
                del self._held[next(iter(self._held))]
        self._held[number] = values
        return values

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._keys)

    def lookup(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        segment_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """The recorded NLL of each response token.

        Args:
            input_ids, labels: [B, S] int64, label-aligned, on any device.
            segment_ids: [B, S] packing boundaries; None means one document a row.
            key_mask: [B, S], False (0) on padding; needed when there is padding.
        Returns:
            [B, S] float32 on the CPU, nats; 0 where labels == -100, on padding and on a document's first
            token (nothing predicts it). A document without a response token need not be in the store.
        Raises:
            HistoryMissError: a document is not in the store, has another length there, or was scored with
                other response tokens.
        """
        return self.lookup_layout(checked_layout(input_ids, labels, segment_ids, key_mask))

    def lookup_layout(self, layout: BatchLayout) -> Tensor:
        """`lookup` of a batch whose layout is known."""
        documents = layout.host_documents
        needed = torch.zeros_like(documents.keys, dtype=torch.bool)
        needed[documents.document[documents.response]] = True
        place = torch.searchsorted(self._keys, documents.keys).clamp_(max=len(self._keys) - 1)  # (n,)
        for problem in (self._keys[place] != documents.keys, self._lengths[place] != documents.lengths):
            if (needed & problem).any():
                self._raise_miss(layout, int((needed & problem).nonzero()[0]), place)
        document = documents.document[documents.response]
        values = self._values(place[document], documents.position[documents.response])
        if values.isnan().any():
            self._raise_other_response(documents, int(values.isnan().nonzero()[0]))
        result = torch.zeros(documents.valid.shape, dtype=torch.float32)
        result[documents.valid] = torch.zeros(len(documents.response)).masked_scatter_(documents.response, values)
        return result

    def _origin(self) -> str:
        made = self.metadata
        origin = (
            f"{self.path} was made from dataset {made['dataset']!r} with model {made['model']!r}, "
            f"max_length {made['max_length']}"
        )
        chat = made.get("chat")
        if chat is None:
            return origin
        return f"{origin}, chats with turns={chat['turns']!r}{self._other_template(chat['template'])}"

    def _other_template(self, theirs: str | dict) -> str:
        """What a chat template may have to do with a missing document."""
        if self.chat_template not in (None, theirs):
            return (
                " and another chat template than this run's (TRL takes a training version of the model's for "
                "assistant_only_loss: --chat_template trl)"
            )
        dated = "strftime_now" in str(theirs)
        return " and a template that writes the day's date (fix it with chat_template_kwargs)" if dated else ""

    def _raise_miss(self, layout: BatchLayout, document: int, place: Tensor) -> NoReturn:
        documents = layout.host_documents
        row = int(documents.valid.nonzero()[(documents.document == document).nonzero()[0, 0], 0])
        first = layout.input_ids.cpu()[documents.valid][documents.document == document][:8].tolist()
        length = int(documents.lengths[document])
        name = f"the document in row {row} ({length} tokens, the first {len(first)}: {first})"
        if self._keys[place[document]] == documents.keys[document]:
            problem = f"{name} has {int(self._lengths[place[document]])} tokens in the history store"
        else:
            problem = f"{name} is not in the history store"
        raise HistoryMissError(f"{problem}. {self._origin()}. {self.repair}")

    def _raise_other_response(self, documents: HostDocuments, response: int) -> NoReturn:
        token = int(documents.response.nonzero()[response])
        row, column = documents.valid.nonzero()[token].tolist()
        raise HistoryMissError(
            f"the document in row {row} was scored with other response tokens: the one at column {column} "
            f"(token {int(documents.position[token])} of the document) has a label now and had none then. "
            f"{self._origin()}. {self.repair}"
        )
