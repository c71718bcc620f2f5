"""Documents that hypothesis draws token by token, and the batches that they can stand in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

IGNORED = -100


class Document(NamedTuple):
    ids: list[int]
    answer: list[bool]  # which tokens have a label; the first one may, though nothing predicts it

    @property
    def response(self) -> list[bool]:
        """The tokens that compete."""
        return [False, *self.answer[1:]]


def as_document(tokens: list[tuple[int, bool]]) -> Document:
    return Document([token for token, _ in tokens], [answer for _, answer in tokens])


token_ids = st.one_of(st.integers(0, 5), st.integers(0, 2**31))
documents = st.lists(st.tuples(token_ids, st.booleans()), min_size=1, max_size=8).map(as_document)
corpora = st.lists(documents, min_size=1, max_size=5)


@dataclass(frozen=True)
class Layout:
    """How documents stand in a batch; printed as it is when a test fails."""

    order: list[int]
    how: str  # "left", "right": padded there; "packed": one behind the other
    extra: int  # columns of padding more than are needed
    between: int  # and behind each document of a packed batch
    rows: int  # of a packed batch
    junk: int  # what stands on padding

    def of(self, corpus: list[Document]) -> Batch:
        order = [i for i in self.order if i < len(corpus)]
        if self.how == "packed":
            size = -(-len(order) // self.rows)
            rows = [order[i : i + size] for i in range(0, len(order), size)]
        else:
            rows = [[i] for i in order]
        between = self.between if self.how == "packed" else 0
        lengths = [sum(len(corpus[i].ids) + between for i in row) for row in rows]
        width = max(lengths) + self.extra
        ids = torch.full((len(rows), width), self.junk)
        labels, segments = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        mask, places = torch.zeros_like(ids, dtype=torch.bool), {}
        for r, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            column = width - length if self.how == "left" else 0
            for number, i in enumerate(row):
                place = slice(column, column + len(corpus[i].ids))
                column, answers = place.stop + between, torch.tensor(corpus[i].answer)
                mask[r, place] = True
                ids[r, place] = torch.tensor(corpus[i].ids)
                labels[r, place] = torch.where(answers, ids[r, place], IGNORED)
                segments[r, place.start :] = number
                places[i] = r, place
        packed = self.how == "packed"
        return Batch(ids, labels, segments if packed else None, None if mask.all() else mask, places)


class Batch(NamedTuple):
    ids: Tensor  # [B, S]
    labels: Tensor
    segment_ids: Tensor | None
    key_mask: Tensor | None
    places: dict[int, tuple[int, slice]]  # number of a document -> its row and columns

    @property
    def bounds(self) -> dict[str, Tensor | None]:
        return {"segment_ids": self.segment_ids, "key_mask": self.key_mask}

    @property
    def valid(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool) if self.key_mask is None else self.key_mask

    def put(self, values: list[Tensor], fill: float) -> Tensor:
        """Values of each document's tokens in their places."""
        whole = torch.full(self.ids.shape, fill, dtype=values[0].dtype)
        for i, (row, place) in self.places.items():
            whole[row, place] = values[i]
        return whole

    def take(self, whole: Tensor) -> dict[int, Tensor]:
        """What stands on the tokens of each document: its number -> (length,)"""
        return {i: whole[row, place] for i, (row, place) in self.places.items()}


layouts = st.builds(
    Layout,
    order=st.permutations(range(5)),
    how=st.sampled_from(["right", "left", "packed"]),
    extra=st.integers(0, 2),
    between=st.sampled_from([0, 0, 1, 3]),
    rows=st.integers(1, 2),
    junk=st.sampled_from([0, 7]),
)
