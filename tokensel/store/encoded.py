"""The documents of a dataset, on disk while their losses are recorded: token ids and labels, read by number.

One file holds two int32 of each token, its id and its label. Memory holds a key, a length and a place of each document.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from tokensel.documents import IGNORE_INDEX, document_keys, documents_of

AT_ONCE = 1024  # documents that are hashed together


@dataclass(frozen=True)
class EncodedDocuments:
    """What the documents of a dataset are, n of them, in the order of the rows.

    Attributes:
        path: of the file.
        keys: (n,) int64, the hash of each document's token ids.
        lengths: (n,) int64.
        row_of: (n,) int64, the number of the row that it comes from.
        rows: how many there were.
        largest_id: of the tokens.
        digest: sha256 (hex) of all token ids and of which tokens are responses, in order.
    """

    path: Path
    keys: numpy.ndarray
    lengths: numpy.ndarray
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
        ValueError: no row, one that is none, with its number; or what `same_responses` refuses.
    """
    digest, keys, lengths, row_of = hashlib.sha256(), [], [], []
    largest, number = 0, -1
    waiting: list[dict[str, list[int]]] = []

    with open(path, "wb") as file:

        def take() -> None:
            nonlocal largest
            sizes = torch.tensor([len(document["input_ids"]) for document in waiting])
            ids, labels = (
                torch.tensor([token for document in waiting for token in document[name]])
                for name in ("input_ids", "labels")
            )
            segments = torch.repeat_interleave(torch.arange(len(waiting)), sizes)
            hashes = document_keys(ids[None], segments[None])[0][sizes.cumsum(0) - sizes]
            responses = (labels != IGNORE_INDEX).numpy().tobytes()
            digest.update(hashes.numpy().tobytes() + sizes.numpy().tobytes() + responses)
            largest = max(largest, int(ids.max()))
            keys.append(hashes.numpy())
            lengths.append(sizes.numpy())
            file.write(torch.stack([ids, labels], -1).to(torch.int32).numpy().tobytes())
            waiting.clear()

        for number, row in enumerate(rows):
            try:
                documents = documents_of(row, max_length)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            row_of += [number] * len(documents)
            waiting += documents
            if len(waiting) >= AT_ONCE:
                take()
        if waiting:
            take()
    if not keys:
        raise ValueError("there is no row, and so nothing to record")
    encoded = EncodedDocuments(
        Path(path).resolve(),
        numpy.concatenate(keys),
        numpy.concatenate(lengths),
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
