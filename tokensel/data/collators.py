"""Collators, composed in one place: what another one makes of a batch, and what the selection wants beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

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


class CollatedRows:
    """Rows by number, as a collator makes a batch of each: `tokensel.record_losses` reads them.

    Each has `input_ids` and `labels` without padding, and `seq_lengths`, those of its documents.

    Raises:
        TypeError: rows without a length, as a stream.
        ValueError: batches with numbers that are no text, when such a row is read.
    """

    def __init__(self, rows: Any, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        if not has_length(rows):
            raise TypeError(
                f"the training set must have a length; got {type(rows).__name__}. Make a Dataset of the stream: "
                "datasets.Dataset.from_list(list(rows))"
            )
        self._rows: Any = rows
        self._collate = collate

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        batch = self._collate([self._rows[number]])
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name != "token_weights":
                raise ValueError(f"only text can be recorded, but the batches have {name}")
        layout = BatchLayout.from_batch(batch)
        documents = layout.host_documents
        ids, labels = layout.input_ids[documents.valid], layout.response_labels[documents.valid]
        return {"input_ids": ids, "labels": labels, "seq_lengths": documents.lengths}


def refuse_data_without_prompt(
    rows: Any, collate: Callable[[list[dict[str, Any]]], Any], batch_size: int, method: str, most: int = 1000
) -> None:
    """Attention to the prompt says nothing of language-modelling data, where every token is a response.

    Judged by the batches that a collator makes of the first `most` rows; one prompt token in them is enough. A stream
    is read from its start, and what can be read only once is left alone.

    Raises:
        ValueError: there is none.
    """
    streamed = isinstance(rows, IterableDataset) or not has_length(rows)
    first = iter(rows) if streamed else (rows[i] for i in range(len(rows)))
    if first is rows:
        return
    first, seen = itertools.islice(first, most), 0
    with torch.random.fork_rng(devices=[]):  # a collator that draws leaves the run's seed alone
        while some := list(itertools.islice(first, batch_size)):
            batch = collate(some)
            if "labels" not in batch:
                return
            layout = BatchLayout.from_batch(batch)
            if bool((layout.predictable & ~layout.response).any()):
                return
            seen += len(some)
    if seen:
        raise ValueError(
            f"method {method!r} measures attention to the prompt, but the first {seen} rows of the training data, "
            f"as the data collator makes batches of them, have none: no label is {IGNORE_INDEX}. Mask the prompt (with "
            "TRL: prompt-completion rows, or chats with assistant_only_loss=True), or choose a method without attention"
        )
