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
from typing import NoReturn

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokensel.documents import BatchLayout, HostDocuments
from tokensel.store.format import (
    CONTENTS,
    FORMAT_VERSION,
    METADATA_KEY,
    checked_layout,
    read_documents,
    tokenizer_fingerprint,
)

_REPAIR = (
    "Run `tokensel score` with the same tokenizer, chat template, turns, max_length, dataset, prompt and response "
    "columns as this run, or record what the trainer trains: trainer.record_history(path). In a lookup of your own "
    "pass key_mask if rows are padded and segment_ids if they are packed"
)


class HistoryMissError(LookupError):
    """A document or a response token that the history store cannot answer for."""


class StoreReader:
    """A history store read row group by row group; a context manager. Arguments and errors of `HistoryStore.open`.

    Attributes:
        metadata: as of HistoryStore.
    """

    def __init__(self, path: str | os.PathLike, *, content: str = "nll", tokenizer=None):
        self.path, self.content = Path(path), content
        if not self.path.is_file():
            made = CONTENTS[content].rpartition(": ")[2]
            raise FileNotFoundError(errno.ENOENT, f"no history store; make it with {made}", str(path))
        self._file = open(self.path, "rb")
        try:
            with self._naming_damage():
                self._parquet = pq.ParquetFile(self._file, page_checksum_verification=True)
            header = (self._parquet.metadata.metadata or {}).get(METADATA_KEY)
            if header is None:
                raise ValueError(f"{path} is Parquet but not a history store; make one with `tokensel score`")
            self.metadata = {"content": "nll"} | json.loads(header)  # the first stores did not say
            self._check_metadata(tokenizer)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._file.close()

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{self.path} is not a readable Parquet file ({error}); make it anew with `tokensel score`"
            ) from error

    def _check_metadata(self, tokenizer) -> None:
        made, path = self.metadata, self.path
        if made["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has history format {made['format_version']}, this version of tokensel reads "
                f"{FORMAT_VERSION}; make it anew with `tokensel score`"
            )
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
        """sha256 (hex) of the file's footer, which holds the settings, and place, size and extremes of each part."""
        self._file.seek(-8, os.SEEK_END)
        size = int.from_bytes(self._file.read(4), "little")
        self._file.seek(-8 - size, os.SEEK_END)
        return hashlib.sha256(self._file.read(size)).hexdigest()

    def row_groups(self, skip: int = 0) -> Iterator[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]]:
        """(keys (n,) int64, lengths (n,) int32, values (Σ lengths,) float32) of each row group.

        Args:
            skip: documents to leave out; whole row groups of them are not read.
        """
        for i in range(self._parquet.num_row_groups):
            rows = self._parquet.metadata.row_group(i).num_rows
            if skip >= rows:
                skip -= rows
                continue
            with self._naming_damage():
                table = self._parquet.read_row_group(i)
            keys, lengths, values = read_documents(table)
            yield keys[skip:], lengths[skip:], values[lengths[:skip].sum() :]
            skip = 0


class HistoryStore:
    """A history store in memory: per-token NLL looked up by document. Made by `HistoryStore.open`.

    Attributes:
        metadata: dict with format_version, content, tokenizer (fingerprint or None), model, max_length, dataset, chat
            (template and turns, or None), documents, tokens, tokensel_version.
        repair: what the error about a missing document says to do.
        chat_template: that of the run which looks documents up; named where a document is missing and the store was
            made with another. None = not known.
    """

    def __init__(self, path: Path, metadata: dict, keys: Tensor, lengths: Tensor, nll: Tensor):
        self.path, self.metadata = path, metadata
        self.chat_template: str | dict | None = None
        self.repair = _REPAIR
        starts = lengths.cumsum(0) - lengths
        self._keys, order = keys.sort()  # (n,) int64
        self._lengths, self._starts = lengths[order], starts[order]  # (n,) int64
        self._nll = nll  # (or weights) (tokens,) float32, NaN where the token was not a response

    @classmethod
    def open(cls, path: str | os.PathLike, *, tokenizer=None, content: str = "nll") -> HistoryStore:
        """Reads a store written by `HistoryWriter`.

        Args:
            path: the Parquet file.
            tokenizer: the tokenizer of the training run; compared with the one the store was made with, if
                that one was recorded. Its chat template is compared where a document is missing.
            content: what it must hold, one of CONTENTS.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a history store, damaged, of a newer format, holding something else, or made with
                another tokenizer.
        """
        with StoreReader(path, content=content, tokenizer=tokenizer) as reader:
            groups = list(reader.row_groups())
        keys, lengths, values = (numpy.concatenate(part) for part in zip(*groups, strict=True))
        metadata = reader.metadata
        if len(keys) != metadata["documents"] or len(values) != metadata["tokens"] or lengths.sum() != len(values):
            raise ValueError(f"{path} does not hold what its header says; make it anew with `tokensel score`")
        tensors = (torch.from_numpy(part) for part in (keys, lengths.astype(numpy.int64), values))
        store = cls(Path(path), metadata, *tensors)
        store.chat_template = getattr(tokenizer, "chat_template", None)
        return store

    def fingerprint(self) -> str:
        """sha256 (hex) of documents and losses: equal for equal stores, wherever their files are."""
        digest = hashlib.sha256()
        for part in (self._keys, self._lengths, self._starts, self._nll):
            digest.update(part.numpy().data)
        return digest.hexdigest()

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
        values = self._nll[self._starts[place[document]] + documents.position[documents.response]]
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
