"""The form of recorded losses and weights on disk: Parquet, a row for each document."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from tokensel.documents import BatchLayout
from tokensel.ops.checks import check_same_device, check_shape, check_tensor

FORMAT_VERSION = 1
METADATA_KEY = b"tokensel"
MANIFEST = "manifest.json"  # of a directory of parts

# What a store holds, and the command that makes such a one.
CONTENTS = {
    "nll": "losses of a model: `tokensel score`",
    "alone_nll": "losses of responses without their prompts: `tokensel score --without_prompt true`",
    "contrast_nll": "losses under the contrast of two models: `tokensel score --contrast_model_name_or_path NEGATIVE`",
    "weight": "weights: `tokensel select`",
}


def store_schema(content: str) -> pa.Schema:
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


def documents_table(keys: numpy.ndarray, lengths: numpy.ndarray, values: numpy.ndarray, schema: pa.Schema) -> pa.Table:
    """Documents as rows: keys (n,) int64, lengths (n,) int32, values (Σ lengths,) float32, NaN = no value."""
    offsets = numpy.concatenate([[0], lengths.cumsum(dtype=numpy.int32)]).astype(numpy.int32)
    lists = pa.ListArray.from_arrays(offsets, values, type=schema.field(2).type)
    return pa.table([pa.array(keys, pa.int64()), lengths, lists], schema=schema)


def read_documents(table: pa.Table) -> tuple[numpy.ndarray, ...]:
    """(keys, lengths, values) of `documents_table`; without its last column the first two.

    Raises:
        ArrowInvalid: other columns, lists that do not have the lengths, or a value that is infinite.
    """
    if table.column_names[:2] != ["key", "length"] or table.num_columns > 3:
        raise pa.ArrowInvalid(f"the columns {', '.join(table.column_names)}")
    keys, lengths, *lists = (table[name].combine_chunks() for name in table.column_names)
    if lists and not numpy.array_equal(
        pc.list_value_length(lists[0]).to_numpy(zero_copy_only=False), lengths.to_numpy()
    ):
        raise pa.ArrowInvalid("lists that do not have the lengths of their documents")
    values = [column.flatten().to_numpy() for column in lists]
    if any(numpy.isinf(part).any() for part in values):
        raise pa.ArrowInvalid("a value that is infinite")
    return keys.to_numpy(), lengths.to_numpy(), *values


def footer_of(path: str | os.PathLike[str]) -> str:
    """sha256 (hex) of a Parquet file's footer: its settings, and place, size and extremes of each part."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, os.SEEK_END)
        return hashlib.sha256(file.read(size)).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) of the sorted vocabulary (token, id) and the set of special-token ids.

    Equal for tokenizers that give equal ids the same meaning; the padding side, the chat template and reusing
    a special token for padding do not enter.
    """
    identity = [sorted(tokenizer.get_vocab().items()), sorted(set(tokenizer.all_special_ids))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def checked_layout(
    input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None, key_mask: Tensor | None
) -> BatchLayout:
    if check_tensor("input_ids", input_ids).dim() != 2:
        raise ValueError(f"input_ids must have shape [B, S]; got {list(input_ids.shape)}")
    for name, value in (("labels", labels), ("segment_ids", segment_ids), ("key_mask", key_mask)):
        if value is not None:
            check_shape(name, check_tensor(name, value), tuple(input_ids.shape), "that of input_ids [B, S]")
    check_same_device(input_ids=input_ids, labels=labels, segment_ids=segment_ids, key_mask=key_mask)
    return BatchLayout.of_segments(input_ids, labels, segment_ids, None if key_mask is None else key_mask.bool())
