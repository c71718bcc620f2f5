"""Collators, composed in one place: what another one makes of a batch, and what the selection wants beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokensel.documents import IGNORE_INDEX, BatchLayout

if TYPE_CHECKING:
    from tokensel.store import HistoryStore


class SelectionCollator:
    """Adds [B, S] tensors to the batches of another collator: columns of the rows, recorded losses and weights.

    Stands around `DataCollatorForSeq2Seq`, either padding side, and `DataCollatorWithFlattening`, which know nothing of
    them. What is recorded is looked up here, on the loader's side, where token ids are still on the host.

    Args:
        collator: rows -> batch with `input_ids` and, for what is recorded, `labels`.
        columns: columns with a number a token that the rows may have; they become float32.
        losses: stores by the name of the signal that they hold, "history_nll" or another of
            `tokensel.select.signals.RECORDED`.
        weights: a store of weights, which are factors of `token_weights` on response tokens.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        columns: Sequence[str] = ("token_weights",),
        losses: Mapping[str, HistoryStore] | None = None,
        weights: HistoryStore | None = None,
    ) -> None:
        self.collator, self.columns = collator, columns
        self.losses, self.weights = losses or {}, weights

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        columns = [name for name in self.columns if name in rows[0]]  # held-out rows have none
        batch = self.collator([{k: v for k, v in row.items() if k not in columns} for row in rows])
        for name in columns:
            batch[name] = _beside_tokens([row[name] for row in rows], batch)
        if not self.losses and self.weights is None:
            return batch
        layout = BatchLayout.from_batch(batch)
        for name, store in self.losses.items():
            batch[name] = store.lookup_layout(layout)
        if self.weights is not None:
            batch["token_weights"] = _selected(self.weights.lookup_layout(layout), batch)
        return batch


def _beside_tokens(column: list[Sequence[float]], batch: Mapping[str, Tensor]) -> Tensor:
    """Puts the entries of a column where the batch has the rows' tokens: [B, S], 0 on padding."""
    entries = torch.cat([torch.as_tensor(values, dtype=torch.float32) for values in column])
    mask = batch.get("attention_mask")
    placed = torch.zeros(batch["input_ids"].shape)  # (B, S)
    placed[torch.ones_like(placed, dtype=torch.bool) if mask is None else mask.bool()] = entries
    return placed


def _selected(weights: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    given = batch.get("token_weights")
    if given is None:
        return weights
    # a weight on a prompt token trains it, whatever was selected of the response
    return torch.where(batch["labels"] == IGNORE_INDEX, given, given * weights)
