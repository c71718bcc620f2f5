"""Writing a store: the losses (or weights) of documents, a row group at a time, whole in the end or absent.

A store is one Parquet file, or a directory of such, its parts, with a manifest that names them.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokensel.files import FULL_DISK, making_folder, naming_a_full_disk, remove_left_over, replacing
from tokensel.ops.checks import check_shape, check_tensor
from tokensel.store.format import (
    FORMAT_VERSION,
    MANIFEST,
    METADATA_KEY,
    checked_layout,
    documents_table,
    footer_of,
    store_schema,
    tokenizer_fingerprint,
)

ROW_GROUP_TOKENS = 1 << 17  # 0.5 MiB: what a lookup in a store reads that is larger than what is held of it
PART_TOKENS = 1 << 26  # of a part of a directory: 256 MiB


class _Part:
    """A Parquet file that is being written."""

    def __init__(self, path: Path, schema: Any) -> None:
        self.path, self.documents, self.tokens = path, 0, 0
        self._file = open(path, "wb")
        try:
            # Random floats do not compress, and a checksum turns bit rot into an error at reading.
            self._parquet: Any = pq.ParquetWriter(
                self._file, schema, compression="none", use_dictionary=False, write_page_checksum=True
            )
        except BaseException:
            self.close()
            raise

    def write(self, table: Any, tokens: int) -> None:
        self._parquet.write_table(table)
        self._file.flush()  # so that a full disk is met here and not hours later
        self.documents += len(table)
        self.tokens += tokens

    def finish(self, metadata: dict[str, Any]) -> None:
        own = metadata | {"documents": self.documents, "tokens": self.tokens}
        self._parquet.add_key_value_metadata({METADATA_KEY: json.dumps(own)})
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, whole or not."""
        parquet = self.__dict__.get("_parquet")
        if parquet is not None:
            parquet.is_open = False  # or its finaliser writes a footer into the closed file
        try:
            self._file.close()  # flushes, so it can meet the full disk once more
        except OSError as again:
            if again.errno not in FULL_DISK:
                raise


class HistoryWriter:
    """Writes a history store; a context manager. The store appears at `path` only when the block ends well.

    Rows go to a temporary file or directory beside `path`, one row group at a time. After any exception in the block
    that is gone and `path` is what it was before: absent, or the complete store of an earlier run.

    Args:
        path: what to make: a Parquet file, if the name ends in .parquet, or else a directory of such, of PART_TOKENS
            tokens each, with a manifest; missing directories are made.
        tokenizer: recorded as a fingerprint, which `HistoryStore.open` compares.
        model, max_length, dataset: what the NLL was computed with; recorded, and named in errors.
        content: what is written, one of CONTENTS; a reader that expects something else refuses the store.
        chat: how chats became tokens, {"template": text, "turns": "last"}; recorded, and named in errors. None = there
            are none, or it is not known.
        if_disk_is_full: what the error about a full disk says of the run's results.

    Attributes:
        metadata: dict; what else it gets before the block ends is recorded, too.

    Raises:
        IsADirectoryError: `path` is a directory that exists.
        OSError: the disk is full (same errno, the message says that nothing was kept).
        ValueError: the block ended without a document.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        tokenizer=None,
        model: str = "",
        max_length: int | None = None,
        dataset: str = "",
        content: str = "nll",
        chat: dict[str, Any] | None = None,
        if_disk_is_full: str = "nothing of this run was kept. Free some space or name another path",
    ):
        self.path = Path(path)
        self._schema = store_schema(content)
        self._if_disk_is_full = if_disk_is_full
        self.metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "content": content,
            "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            "model": str(model),
            "max_length": max_length,
            "dataset": str(dataset),
            "chat": chat,
            "documents": 0,
            "tokens": 0,
        }
        self._folder: Path | None = None  # of the parts, where they are several
        self._part: _Part | None = None
        self._parts: list[dict[str, Any]] = []  # of the manifest
        self._stack: ExitStack | None = None
        self._seen: set[int] = set()
        self._keys: list[int] = []
        self._values: list[numpy.ndarray] = []
        self._waiting_tokens = 0

    def __enter__(self) -> HistoryWriter:
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a directory is there already; choose another name", str(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        try:
            with self._naming_a_full_disk():
                remove_left_over(self.path)
                if self.path.suffix == ".parquet":
                    self._part = _Part(self._stack.enter_context(replacing(self.path)), self._schema)
                else:
                    self._folder = self._stack.enter_context(making_folder(self.path))
        except BaseException as error:
            self._close(error)
            raise
        return self

    def add(
        self,
        input_ids: Tensor,
        labels: Tensor,
        nll: Tensor,
        *,
        segment_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> None:
        """Stores the documents of a batch, one row each; of documents with equal token ids the first is kept.

        Args:
            input_ids, labels: [B, S] int64, label-aligned; labels -100 = not a response token.
            nll: [B, S] floating, nats; entry t is -log p(x_t); read where it has a response label, beyond the
                document's first token.
            segment_ids: [B, S] packing boundaries; None means one document a row.
            key_mask: [B, S], False (0) on padding; needed when there is padding.
        Raises:
            ValueError: shapes differ, or the NLL of a response token is not finite.
        """
        if self._stack is None:
            raise RuntimeError("HistoryWriter writes only inside a `with` block: with HistoryWriter(path) as writer")
        documents = checked_layout(input_ids, labels, segment_ids, key_mask).host_documents
        check_shape("nll", check_tensor("nll", nll, floating=True), tuple(input_ids.shape), "that of input_ids")
        values = nll.detach().to("cpu", torch.float32)[documents.valid]
        wrong = documents.response & ~values.isfinite()
        if wrong.any():
            where = documents.valid.nonzero()[wrong.nonzero()[0, 0]].tolist()
            raise ValueError(
                f"nll{where} is {float(nll[tuple(where)])} at a response token; the scoring model must give "
                "finite NLL (try float32 or bfloat16 instead of float16)"
            )
        stored = values.masked_fill(~documents.response, torch.nan).numpy()
        ends = documents.lengths.cumsum(0).tolist()
        for key, length, end in zip(documents.keys.tolist(), documents.lengths.tolist(), ends, strict=True):
            if key not in self._seen:
                self._seen.add(key)
                self.append(key, stored[end - length : end].copy())  # a view would keep the whole batch alive

    def append(self, key: int, values: numpy.ndarray) -> None:
        """Stores one document that is not in the store yet: its hash, and float32 values (length,), NaN = none."""
        self._keys.append(key)
        self._values.append(values)
        self._waiting_tokens += len(values)
        if self._waiting_tokens >= ROW_GROUP_TOKENS:
            self._write_row_group()

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as failure:
            self._close(failure)
            raise
        self._close(error)

    def _finish(self) -> None:
        if self._keys:
            self._write_row_group()
        if not self.metadata["documents"]:
            raise ValueError(f"no document was added, so no history store was written at {self.path}")
        with self._naming_a_full_disk():
            self._finish_part()
            if self._folder is not None:
                manifest = self._signed() | {"parts": self._parts}
                with replacing(self._folder / MANIFEST) as temporary:
                    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _write_row_group(self) -> None:
        lengths = numpy.array([len(values) for values in self._values], dtype=numpy.int32)
        table = documents_table(numpy.array(self._keys), lengths, numpy.concatenate(self._values), self._schema)
        with self._naming_a_full_disk():
            if self._part is None:
                assert self._folder is not None
                self._part = _Part(self._folder / f"part-{len(self._parts):05d}.parquet", self._schema)
            self._part.write(table, self._waiting_tokens)
        self.metadata["documents"] += len(self._keys)
        self.metadata["tokens"] += self._waiting_tokens
        self._keys, self._values, self._waiting_tokens = [], [], 0
        if self._folder is not None and self._part.tokens >= PART_TOKENS:
            with self._naming_a_full_disk():
                self._finish_part()

    def _signed(self) -> dict[str, Any]:
        from tokensel import __version__

        return self.metadata | {"tokensel_version": __version__}

    def _finish_part(self) -> None:
        if (part := self._part) is not None:
            part.finish(self._signed())
            part.close()
            size = {"documents": part.documents, "tokens": part.tokens}
            self._parts.append({"file": part.path.name, **size, "footer": footer_of(part.path)})
            self._part = None

    def _close(self, error: BaseException | None) -> None:
        """Closes what is temporary, which takes its place; after an error it is gone."""
        assert self._stack is not None
        try:
            if self._part is not None:
                self._part.close()
        finally:
            stack, self._part, self._stack = self._stack, None, None
            with self._naming_a_full_disk():
                stack.__exit__(None if error is None else type(error), error, None)

    def _naming_a_full_disk(self) -> AbstractContextManager:
        return naming_a_full_disk(self.path, "the history store", self._if_disk_is_full)
