"""Rows of text -> token ids and labels, and the collator that makes batches of them."""

from __future__ import annotations

import warnings

from tokensel.data.collators import SelectionCollator
from tokensel.data.encode import EncodingCounts, encode_rows
from tokensel.data.repeats import weights_without_repeats
from tokensel.data.rows import RowError, load_rows, place_of_row

__all__ = [
    "EncodingCounts",
    "RowError",
    "SelectionCollator",
    "encode_rows",
    "load_rows",
    "place_of_row",
    "weights_without_repeats",
]

_RENAMED = {"EncodingReport": EncodingCounts, "WeightsCollator": SelectionCollator}  # until 0.3


def __getattr__(name: str) -> object:
    if name not in _RENAMED:
        raise AttributeError(f"module 'tokensel.data' has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(
        f"tokensel.data.{name} is now {new.__name__}; the old name goes with 0.3", FutureWarning, stacklevel=2
    )
    return new
