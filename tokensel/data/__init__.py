"""Rows of text -> token ids and labels, and the collators that make batches of them."""

from tokensel.data.rows import (
    EncodingCounts,
    RowError,
    WeightsCollator,
    encode_rows,
    load_rows,
    place_of_row,
)

__all__ = ["EncodingCounts", "RowError", "WeightsCollator", "encode_rows", "load_rows", "place_of_row"]
