"""The documents of a dataset, on disk while their losses are recorded: token ids and labels, read by number.

One file holds two int32 of each token, its id and its label. Memory holds a key, a length and a place of each document.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from tokensel.documents import IGNORE_INDEX, document_keys, documents_of

AT_ONCE = 1 << 18  # tokens that are hashed together


@dataclass(frozen=True)
class EncodedDocuments:
    """What the documents of a dataset are, n of them, in the order of the rows.

    Attributes:
        path: of the file.
        keys: (n,) int64, the hash of each document's token ids.
        lengths: (n,) int64.
        responses: (n,) int64, how many response tokens each has.
        row_of: (n,) int64, the number of the row that it comes from.
        rows: how many there were.
        largest_id: of the tokens and labels.
        digest: sha256 (hex) of all token ids and labels, in order.
    """

    path: Path
    keys: numpy.ndarray
    lengths: numpy.ndarray
    responses: numpy.ndarray
    row_of: numpy.ndarray
    rows: int
    largest_id: int
    digest: str

    @cached_property
    def _tokens(self) -> numpy.ndarray:
        return numpy.memmap(self.path, numpy.int32, "r").reshape(-1, 2)  # (t, 2)

    @cached_property
    def _ends(self) -> numpy.ndarray:
        return self.lengths.cumsum()

    def __getitem__(self, number: int) -> numpy.ndarray:
        """(length, 2) int32: id and label of each token of a document."""
        end = int(self._ends[number])
        return self._tokens[end - int(self.lengths[number]) : end]

    def numbers(self) -> numpy.ndarray:
        """Numbers of the documents to score, in order: of those with equal token ids the first."""
        return numpy.sort(numpy.unique(self.keys, return_index=True)[1])


def write_documents(
    path: str | os.PathLike[str], rows: Iterable[Any], max_length: int | None = None, same_responses: bool = False
) -> EncodedDocuments:
    """Reads rows once, in order, and puts their documents (`documents_of`) into a file.

    Of documents with equal token ids, the first gets the labels of all.

    Args:
        same_responses: refuse such whose labels differ.
    Raises:
        ValueError: no row, one that is none or has a negative token, with its number; or what `same_responses` refuses.
    """
    digest, keys, lengths, responses, row_of = hashlib.sha256(), [], [], [], array("q")
    largest, number, tokens = 0, -1, 0
    waiting: list[dict[str, list[int]]] = []

    with open(path, "wb") as file:

        def take() -> None:
            nonlocal largest, tokens
            sizes = torch.tensor([len(document["input_ids"]) for document in waiting])
            ids, labels = (
                torch.tensor([token for document in waiting for token in document[name]])
                for name in ("input_ids", "labels")
            )
            segments = torch.repeat_interleave(torch.arange(len(waiting)), sizes)
            is_response = labels != IGNORE_INDEX
            if (wrong := (ids < 0) | (is_response & (labels < 0))).any():
                place = int(wrong.nonzero()[0])
                row = row_of[len(row_of) - len(waiting) + int(segments[place])]
                raise ValueError(
                    f"row {row}: token {int(ids[place])} with label {int(labels[place])}; token ids are not negative"
                )
            hashes = document_keys(ids[None], segments[None])[0][sizes.cumsum(0) - sizes]
            digest.update(hashes.numpy().tobytes() + sizes.numpy().tobytes() + labels.numpy().tobytes())
            largest = max(largest, int(ids.max()), int(labels.max()))
            keys.append(hashes.numpy())
            lengths.append(sizes.numpy())
            responses.append(torch.zeros_like(sizes).index_add_(0, segments, is_response.long()).numpy())
            file.write(torch.stack([ids, labels], -1).to(torch.int32).numpy().tobytes())
            waiting.clear()
            tokens = 0

        for number, row in enumerate(rows):
            try:
                documents = documents_of(row, max_length)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            row_of.extend([number] * len(documents))
            waiting += documents
            tokens += sum(len(document["input_ids"]) for document in documents)
            if tokens >= AT_ONCE:
                take()
        if waiting:
            take()
    if not keys:
        raise ValueError("there is no row, and so nothing to record")
    encoded = EncodedDocuments(
        Path(path).resolve(),
        numpy.concatenate(keys),
        numpy.concatenate(lengths),
        numpy.concatenate(responses),
        numpy.array(row_of),
        number + 1,
        largest,
        digest.hexdigest(),
    )
    _join_labels(encoded, same_responses)
    return encoded


def _join_labels(documents: EncodedDocuments, same_responses: bool) -> None:
    """Gives the first of documents with equal token ids the labels of all, in the file."""
    order = documents.keys.argsort(kind="stable")
    sorted_keys = documents.keys[order]
    again = numpy.flatnonzero(sorted_keys[1:] == sorted_keys[:-1]) + 1  # places of those that another stands before
    if not len(again):
        return
    starts = documents._ends - documents.lengths
    file = numpy.memmap(documents.path, numpy.int32, "r+")
    tokens = file.reshape(-1, 2)
    first_of = order[numpy.searchsorted(sorted_keys, sorted_keys[again])]
    for first, other in zip(first_of, order[again], strict=True):
        size = int(documents.lengths[first])
        mine, theirs = (tokens[starts[n] : starts[n] + size, 1] for n in (first, other))
        if same_responses and not numpy.array_equal(mine != IGNORE_INDEX, theirs != IGNORE_INDEX):
            raise ValueError(
                f"rows {documents.row_of[first]} and {documents.row_of[other]} have the same token ids and different "
                "response tokens, so without their prompts they are two documents, which a store does not tell apart; "
                "leave one out"
            )
        missing = mine == IGNORE_INDEX
        mine[missing] = theirs[missing]
    file.flush()
