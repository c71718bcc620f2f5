"""Recorded history: the NLL (or weight) of every response token, in one Parquet file, under a hash of its document.

Rows are found by what the document *is* (its token ids), never by where it stood, so shuffling, sharding,
packing, padding and filtering between scoring and training cannot misalign them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokensel.documents import IGNORE_INDEX, document_index, document_keys, positions_in_document
from tokensel.journal import FULL_DISK, naming_a_full_disk
from tokensel.ops.checks import check_same_device, check_shape, check_tensor

FORMAT_VERSION = 1
METADATA_KEY = b"tokensel"
ROW_GROUP_TOKENS = 1 << 20  # 4 MiB of NLL held in memory between two writes

# What a store holds, and the command that makes such a one.
CONTENTS = {
    "nll": "losses of a model: `tokensel score`",
    "alone_nll": "losses of responses without their prompts: `tokensel score --without_prompt true`",
    "contrast_nll": "losses under the contrast of two models: `tokensel score --contrast_model_name_or_path NEGATIVE`",
    "weight": "weights: `tokensel select`",
}


def _schema(content: str) -> pa.Schema:
    column = "weight" if content == "weight" else "nll"
    return pa.schema(
        [
            pa.field("key", pa.int64(), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field(column, pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        ]
    )


def content_of(signal: str) -> str:
    """The content that the store of a recorded signal must have ("base_nll" -> "nll", "alone_nll" -> "alone_nll")."""
    return signal if signal in CONTENTS else "nll"


class HistoryMissError(LookupError):
    """A document or a response token that the history store cannot answer for."""


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 (hex) of the sorted vocabulary (token, id) and the set of special-token ids.

    Equal for tokenizers that give equal ids the same meaning; the padding side, the chat template and reusing
    a special token for padding do not enter.
    """
    identity = [sorted(tokenizer.get_vocab().items()), sorted(set(tokenizer.all_special_ids))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


class _Documents(NamedTuple):
    """The documents of a batch. n documents, t valid tokens, in batch order; on the CPU."""

    valid: Tensor  # [B, S] bool
    response: Tensor  # (t,) bool
    position: Tensor  # (t,) place of the token in its document
    document: Tensor  # (t,) number of its document, in [0, n)
    keys: Tensor  # (n,) int64
    lengths: Tensor  # (n,) int64


def _documents(input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None, key_mask: Tensor | None) -> _Documents:
    if check_tensor("input_ids", input_ids).dim() != 2:
        raise ValueError(f"input_ids must have shape [B, S]; got {list(input_ids.shape)}")
    for name, value in (("labels", labels), ("segment_ids", segment_ids), ("key_mask", key_mask)):
        if value is not None:
            check_shape(name, check_tensor(name, value), tuple(input_ids.shape), "that of input_ids [B, S]")
    check_same_device(input_ids=input_ids, labels=labels, segment_ids=segment_ids, key_mask=key_mask)
    input_ids, labels = input_ids.cpu(), labels.cpu()
    segment_ids = None if segment_ids is None else segment_ids.cpu()
    valid = torch.ones_like(input_ids, dtype=torch.bool) if key_mask is None else key_mask.cpu().bool()
    index = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
    _, document, lengths = document_index(index)[valid].unique_consecutive(return_inverse=True, return_counts=True)
    position = positions_in_document(input_ids, segment_ids, valid)[valid]
    # A document's first token is predicted from nothing, so it never is a response, whatever its label:
    # packing collators set it to -100 and padding collators do not.
    response = (labels[valid] != IGNORE_INDEX) & (position > 0)
    keys = document_keys(input_ids, segment_ids, valid)[valid][position == 0]
    return _Documents(valid, response, position, document, keys, lengths)


class HistoryWriter:
    """Writes a history store; a context manager. The store appears at `path` only when the block ends well.

    Rows go to a temporary file beside `path`, one row group at a time. After any exception in the block that
    file is gone and `path` is what it was before: absent, or the complete store of an earlier run.

    Args:
        path: the Parquet file to make; missing directories are made.
        tokenizer: recorded as a fingerprint, which `HistoryStore.open` compares.
        model, max_length, dataset: what the NLL was computed with; recorded, and named in errors.
        content: what is written, one of CONTENTS; a reader that expects something else refuses the store.
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
        if_disk_is_full: str = "nothing of this run was kept. Free some space or name another path",
    ):
        self.path = Path(path)
        self._schema = _schema(content)
        self._if_disk_is_full = if_disk_is_full
        self.metadata = {
            "format_version": FORMAT_VERSION,
            "content": content,
            "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            "model": str(model),
            "max_length": max_length,
            "dataset": str(dataset),
            "documents": 0,
            "tokens": 0,
        }
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = self._parquet = None
        self._seen: set[int] = set()
        self._keys: list[int] = []
        self._values: list[numpy.ndarray] = []
        self._waiting_tokens = 0

    def __enter__(self) -> HistoryWriter:
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the history store is a file; name one", str(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._naming_a_full_disk():
                self._file = open(self._temporary, "wb")
                # Random floats do not compress, and a checksum turns bit rot into an error at reading.
                self._parquet = pq.ParquetWriter(
                    self._file, self._schema, compression="none", use_dictionary=False, write_page_checksum=True
                )
        except BaseException:
            self._discard()
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
        found = _documents(input_ids, labels, segment_ids, key_mask)
        check_shape("nll", check_tensor("nll", nll, floating=True), tuple(input_ids.shape), "that of input_ids")
        values = nll.detach().to("cpu", torch.float32)[found.valid]
        wrong = found.response & ~values.isfinite()
        if wrong.any():
            where = found.valid.nonzero()[wrong.nonzero()[0, 0]].tolist()
            raise ValueError(
                f"nll{where} is {float(nll[tuple(where)])} at a response token; the scoring model must give "
                "finite NLL (try float32 or bfloat16 instead of float16)"
            )
        values = values.masked_fill(~found.response, torch.nan).numpy()
        ends = found.lengths.cumsum(0).tolist()
        for key, length, end in zip(found.keys.tolist(), found.lengths.tolist(), ends, strict=True):
            if key not in self._seen:
                self._seen.add(key)
                self.append(key, values[end - length : end].copy())  # a view would keep the whole batch alive

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
        finally:
            self._discard()

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
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)

    def _write_row_group(self) -> None:
        lengths = numpy.array([len(values) for values in self._values], dtype=numpy.int32)
        offsets = numpy.concatenate([[0], lengths.cumsum(dtype=numpy.int32)]).astype(numpy.int32)
        lists = pa.ListArray.from_arrays(offsets, numpy.concatenate(self._values), type=self._schema.field(2).type)
        table = pa.table([pa.array(self._keys, pa.int64()), lengths, lists], schema=self._schema)
        with self._naming_a_full_disk():
            self._parquet.write_table(table)
            self._file.flush()  # so that a full disk is met here and not hours later
        self.metadata["documents"] += len(self._keys)
        self.metadata["tokens"] += self._waiting_tokens
        self._keys, self._values, self._waiting_tokens = [], [], 0

    def _discard(self) -> None:
        """Closes and removes the temporary file. After a good end there is none."""
        if self._parquet is not None:
            self._parquet.is_open = False  # or its finaliser writes a footer into the closed file
        try:
            if self._file is not None:
                self._file.close()  # flushes, so it can meet the full disk once more
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
        finally:
            self._temporary.unlink(missing_ok=True)
            self._parquet = self._file = None

    def _naming_a_full_disk(self) -> AbstractContextManager:
        return naming_a_full_disk(self.path, "the history store", self._if_disk_is_full)


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
            keys, lengths, lists = (table[name].combine_chunks() for name in table.column_names)
            keys, lengths, values = keys.to_numpy(), lengths.to_numpy(), lists.flatten().to_numpy()
            yield keys[skip:], lengths[skip:], values[lengths[:skip].sum() :]
            skip = 0


class HistoryStore:
    """A history store in memory: per-token NLL looked up by document. Made by `HistoryStore.open`.

    Attributes:
        metadata: dict with format_version, content, tokenizer (fingerprint or None), model, max_length, dataset,
            documents, tokens, tokensel_version.
    """

    def __init__(self, path: Path, metadata: dict, keys: Tensor, lengths: Tensor, nll: Tensor):
        self.path, self.metadata = path, metadata
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
                that one was recorded.
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
        keys, lengths = torch.from_numpy(keys), torch.from_numpy(lengths.astype(numpy.int64))
        return cls(Path(path), metadata, keys, lengths, torch.from_numpy(values))

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
        found = _documents(input_ids, labels, segment_ids, key_mask)
        needed = torch.zeros_like(found.keys, dtype=torch.bool)
        needed[found.document[found.response]] = True
        place = torch.searchsorted(self._keys, found.keys).clamp_(max=len(self._keys) - 1)  # (n,)
        for problem in (self._keys[place] != found.keys, self._lengths[place] != found.lengths):
            if (needed & problem).any():
                self._raise_miss(found, input_ids, int((needed & problem).nonzero()[0]), place)
        document = found.document[found.response]
        values = self._nll[self._starts[place[document]] + found.position[found.response]]
        if values.isnan().any():
            self._raise_other_response(found, int(values.isnan().nonzero()[0]))
        result = torch.zeros(found.valid.shape, dtype=torch.float32)
        result[found.valid] = torch.zeros(len(found.response)).masked_scatter_(found.response, values)
        return result

    def _origin(self) -> str:
        made = self.metadata
        return (
            f"{self.path} was made from dataset {made['dataset']!r} with model {made['model']!r}, "
            f"max_length {made['max_length']}"
        )

    def _raise_miss(self, found: _Documents, input_ids: Tensor, document: int, place: Tensor) -> None:
        row = int(found.valid.nonzero()[(found.document == document).nonzero()[0, 0], 0])
        first = input_ids.cpu()[found.valid][found.document == document][:8].tolist()
        length = int(found.lengths[document])
        name = f"the document in row {row} ({length} tokens, the first {len(first)}: {first})"
        if self._keys[place[document]] == found.keys[document]:
            problem = f"{name} has {int(self._lengths[place[document]])} tokens in the history store"
        else:
            problem = f"{name} is not in the history store"
        raise HistoryMissError(
            f"{problem}. {self._origin()}. Run `tokensel score` with the same tokenizer, max_length and "
            "dataset as this run, and pass key_mask if rows are padded and segment_ids if they are packed"
        )

    def _raise_other_response(self, found: _Documents, response: int) -> None:
        token = int(found.response.nonzero()[response])
        row, column = found.valid.nonzero()[token].tolist()
        raise HistoryMissError(
            f"the document in row {row} was scored with other response tokens: the one at column {column} "
            f"(token {int(found.position[token])} of the document) has a label now and had none then. "
            f"{self._origin()}. Run `tokensel score` again with the same prompt and response columns"
        )
