"""Writing a store: the losses (or weights) of documents, a row group at a time, into a file that is whole or absent."""

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

from tokensel.files import FULL_DISK, naming_a_full_disk, replacing
from tokensel.ops.checks import check_shape, check_tensor
from tokensel.store.format import (
    FORMAT_VERSION,
    METADATA_KEY,
    checked_layout,
    documents_table,
    store_schema,
    tokenizer_fingerprint,
)

ROW_GROUP_TOKENS = 1 << 20  # 4 MiB of NLL held in memory between two writes


class HistoryWriter:
    """Writes a history store; a context manager. The store appears at `path` only when the block ends well.

    Rows go to a temporary file beside `path`, one row group at a time. After any exception in the block that
    file is gone and `path` is what it was before: absent, or the complete store of an earlier run.

    Args:
        path: the Parquet file to make; missing directories are made.
        tokenizer: recorded as a fingerprint, which `HistoryStore.open` compares.
        model, max_length, dataset: what the NLL was computed with; recorded, and named in errors.
        content: what is written, one of CONTENTS; a reader that expects something else refuses the store.
        chat: how chats became tokens, {"template": text, "turns": "last"}; recorded, and named in errors. None = there
            are none, or it is not known.
        if_disk_is_full: what the error about a full disk says of the run's results.

    Attributes:
        metadata: dict; what else it gets before the block ends is recorded, too.

    Raises:
        IsADirectoryError: `path` is a directory.
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
        self._file: Any = None
        self._parquet: Any = None
        self._seen: set[int] = set()
        self._keys: list[int] = []
        self._values: list[numpy.ndarray] = []
        self._waiting_tokens = 0

    def __enter__(self) -> HistoryWriter:
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the history store is a file; name one", str(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        temporary = self._stack.enter_context(replacing(self.path))
        try:
            with self._naming_a_full_disk():
                self._file = open(temporary, "wb")
                # Random floats do not compress, and a checksum turns bit rot into an error at reading.
                self._parquet = pq.ParquetWriter(
                    self._file, self._schema, compression="none", use_dictionary=False, write_page_checksum=True
                )
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
        if self._parquet is None:
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
        from tokensel import __version__

        if self._keys:
            self._write_row_group()
        if not self.metadata["documents"]:
            raise ValueError(f"no document was added, so no history store was written at {self.path}")
        self.metadata["tokensel_version"] = __version__
        with self._naming_a_full_disk():
            self._parquet.add_key_value_metadata({METADATA_KEY: json.dumps(self.metadata)})
            self._parquet.close()
            self._file.close()

    def _write_row_group(self) -> None:
        lengths = numpy.array([len(values) for values in self._values], dtype=numpy.int32)
        table = documents_table(numpy.array(self._keys), lengths, numpy.concatenate(self._values), self._schema)
        with self._naming_a_full_disk():
            self._parquet.write_table(table)
            self._file.flush()  # so that a full disk is met here and not hours later
        self.metadata["documents"] += len(self._keys)
        self.metadata["tokens"] += self._waiting_tokens
        self._keys, self._values, self._waiting_tokens = [], [], 0

    def _close(self, error: BaseException | None) -> None:
        """Closes the temporary file, which takes its place; after an error it is gone."""
        if self._parquet is not None:
            self._parquet.is_open = False  # or its finaliser writes a footer into the closed file
        try:
            if self._file is not None:
                self._file.close()  # flushes, so it can meet the full disk once more
        except OSError as again:
            if again.errno not in FULL_DISK:
                raise
        finally:
            self._parquet = self._file = None
            with self._naming_a_full_disk():
                self._stack.__exit__(None if error is None else type(error), error, None)

    def _naming_a_full_disk(self) -> AbstractContextManager:
        return naming_a_full_disk(self.path, "the history store", self._if_disk_is_full)
