"""Logits of one model or of several, a block of rows and of the vocabulary at a time, in workspaces that are reused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokensel.ops import reference
from tokensel.ops.chunked import CACHE_BYTES, Head, in_float32, logits_block, vocabulary_blocks
from tokensel.ops.products import exact_products


class Model(NamedTuple):
    """What the logits of some rows are made of."""

    hidden: Tensor  # (K, D)
    weight: Tensor  # (V, D), of a dtype of its own
    head: Head

    def logits(self) -> Tensor:
        """All of them, for impl="reference". (K, V)"""
        return reference.head_logits(self.hidden, self.weight, *self.head)


class LogitsBlocks:
    """Blocks of a model's logits in `dtype`; each overwrites the one before."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.hidden, self.weight, self.head = model.hidden.to(dtype), model.weight, model.head
        self.exact = model.hidden.dtype if model.hidden.dtype == model.weight.dtype else dtype
        self.space = self.hidden.new_empty(0)
        self.head_copy = self.hidden.new_empty(0, self.weight.shape[1])

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        x, w = self.hidden[rows], self.weight[columns]
        shape = len(x), len(w)
        if shape[0] * shape[1] > len(self.space):
            self.space = x.new_empty(shape[0] * shape[1])
        if w.dtype != x.dtype and len(w) > len(self.head_copy):
            self.head_copy = x.new_empty(w.shape)
        bias = None if self.head.bias is None else self.head.bias[columns].to(x.dtype)
        out = self.space[: shape[0] * shape[1]].view(shape)
        with exact_products(self.exact):
            return logits_block(x, in_float32(w, self.head_copy), self.head._replace(bias=bias), out)


def sweep(
    models: Sequence[Model], dtype: torch.dtype, workspace_mib: float
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """(rows, columns, a block (R, C) of each model's logits), the vocabulary from its start for one slice of rows after
    the other; the blocks may be overwritten."""
    K, V = len(models[0].hidden), len(models[0].weight)
    R, C = vocabulary_blocks(K, V, workspace_mib, models=len(models))
    blocks = [LogitsBlocks(model, dtype) for model in models]
    for first in range(0, K, R):
        for start in range(0, V, C):
            rows, columns = slice(first, min(first + R, K)), slice(start, min(start + C, V))
            yield rows, columns, [block(rows, columns) for block in blocks]


def row_pieces(columns: int) -> int:
    """How many rows of several blocks' worth of temporaries stay in the nearest cache (a third of the time of whole
    blocks, measured)."""
    return max(1, CACHE_BYTES // (16 * columns))
