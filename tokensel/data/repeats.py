"""Spans that many rows say word for word: boilerplate, which no loss tells from what is to be learnt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy

from tokensel.documents import IGNORE_INDEX
from tokensel.ops.checks import check_number

FEWEST = 3  # rows that share a span, however few there are


def weights_without_repeats(
    rows: Iterable[Mapping[str, Sequence[int]]], *, length: int = 12, share: float = 0.01
) -> list[list[float]]:
    """Weights of 0 for the response tokens of spans that other rows repeat, 1 for the other ones.

    A span is `length` response tokens in a row; it is repeated where at least `share` of the rows have it, and three of
    them. In the style of exact substring deduplication (arXiv 2107.06499), but within answers, and the rows stay::

        rows = rows.add_column("token_weights", weights_without_repeats(rows))

    Weights of 0 are factors of every method's weights. Prompt tokens get 0, which leaves them untrained.

    Args:
        rows: {"input_ids", "labels"}, lists of one length, label -100 where a token is no response; read twice. In
            memory is one number a span, 8 bytes.
        length: tokens, at least 2. What an answer's form has in common is shorter than boilerplate.
        share: of the rows, in (0, 1].
    Returns:
        For each row a list as long as its `labels`.
    Raises:
        ValueError: length or share out of bounds, or rows that can be read once only.
    """
    check_number("length", length)
    check_number("share", share)
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens; got {length}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], of the rows; got {share}")
    if iter(rows) is rows:
        raise ValueError("rows must be a list or a dataset, since they are read twice; got an iterator")
    # a sum of tokens times odd numbers modulo 2^64: two spans share it by a chance of about 2^-64
    factors = numpy.random.default_rng(0).integers(0, 2**64, length, numpy.uint64) | numpy.uint64(1)
    spans = [_spans(row, factors) for row in rows]
    once = [numpy.unique(each) for _, each in spans]  # a row counts once, however often it says the same
    found, counts = numpy.unique(numpy.concatenate(once or [factors[:0]]), return_counts=True)
    repeated = found[counts >= max(FEWEST, math.ceil(share * len(spans)))]
    weights = []
    for row, (starts, each) in zip(rows, spans, strict=True):
        kept = numpy.asarray(row["labels"]) != IGNORE_INDEX
        for start in starts[numpy.isin(each, repeated)]:
            kept[start : start + length] = False
        weights.append(kept.astype(float).tolist())
    return weights


def _spans(row: Mapping[str, Sequence[int]], factors: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Where each span of response tokens begins, and its number. (n,) int64 and (n,) uint64."""
    response = numpy.asarray(row["labels"]) != IGNORE_INDEX
    if len(response) < len(factors):
        return numpy.empty(0, numpy.int64), numpy.empty(0, numpy.uint64)
    windows = numpy.lib.stride_tricks.sliding_window_view
    starts = numpy.flatnonzero(windows(response, len(factors)).all(1))
    tokens = windows(numpy.asarray(row["input_ids"], numpy.uint64), len(factors))[starts]
    return starts, (tokens * factors).sum(1, dtype=numpy.uint64)
