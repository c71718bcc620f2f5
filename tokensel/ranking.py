"""Ranking the tokens of all documents by recorded losses, exactly and in bounded memory.

It streams: memory holds some documents at a time, and a run that was killed goes on from its shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy
import torch
from tqdm.auto import tqdm

from tokensel.documents import keys_at
from tokensel.select.method import SelectionMethod
from tokensel.select.rules import TopSamples, TopShare
from tokensel.select.signals import MEASURED, RECORDED, TokenSignals
from tokensel.store import StoreReader, content_of
from tokensel.store.shards import Shards


class Chunk(NamedTuple):
    """Neighbouring documents: n of them, t tokens, as they stand in the stores."""

    first: int  # number of the first one in the dataset
    keys: numpy.ndarray  # (n,) int64
    lengths: numpy.ndarray  # (n,) int32
    values: dict[str, numpy.ndarray]  # by signal, (t,) float32, NaN where not a response


class RecordedDataset:
    """Stores of the same documents, read side by side in chunks of whole documents.

    Attributes:
        metadata: of the first store.
        digest: of each store's content, by signal.

    Args:
        files: Parquet files of `tokensel score` by the signal that they hold ("base_nll", ...).
    Raises:
        ValueError: not such files, or files of different documents.
    """

    def __init__(self, files: Mapping[str, str | os.PathLike[str]]) -> None:
        self._files = files
        self._readers = {signal: StoreReader(path, content=content_of(signal)) for signal, path in files.items()}
        first, *others = self._readers.values()
        for other in others:
            for name in ("tokenizer", "max_length", "documents", "tokens"):
                self._compare(other, name, first.metadata[name], other.metadata[name])
        self.metadata = first.metadata
        self.digest = {signal: reader.digest() for signal, reader in self._readers.items()}

    def _compare(self, other: StoreReader, what: str, expected: object, other_value: object) -> None:
        if expected != other_value:
            first = next(iter(self._readers.values()))
            raise ValueError(
                f"{first.path} and {other.path} differ in {what}: {expected} and {other_value}; score both with the "
                "same dataset, tokenizer and max_length"
            )

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        """All documents behind the first `skip`; in memory are two row groups of each store at most."""
        streams = [reader.row_groups(skip) for reader in self._readers.values()]
        waiting = [next(stream, None) for stream in streams]
        while waiting[0] is not None:
            # files of other versions may have cut their row groups elsewhere
            parts = [part for part in waiting if part is not None]
            n = min(len(keys) for keys, _, _ in parts)
            taken = []
            for i, (keys, lengths, values) in enumerate(parts):
                tokens = int(lengths[:n].sum(dtype=numpy.int64))
                taken.append((keys[:n], lengths[:n], values[:tokens]))
                rest = (keys[n:], lengths[n:], values[tokens:])
                waiting[i] = rest if len(rest[0]) else next(streams[i], None)
            self._check_same_documents(skip, taken)
            yield Chunk(skip, *taken[0][:2], dict(zip(self._files, (values for _, _, values in taken), strict=True)))
            skip += n

    def _check_same_documents(self, first: int, taken: list) -> None:
        keys, lengths, values = taken[0]
        for reader, (other_keys, other_lengths, others) in zip(self._readers.values(), taken, strict=True):
            differ = (keys != other_keys) | (lengths != other_lengths)
            if differ.any():
                i = int(differ.argmax())
                self._compare(reader, f"document {first + i} (hash)", int(keys[i]), int(other_keys[i]))
                self._compare(reader, f"document {first + i} (length)", int(lengths[i]), int(other_lengths[i]))
            differ = numpy.isnan(values) != numpy.isnan(others)
            if differ.any():
                token, ends = int(differ.argmax()), lengths.cumsum(dtype=numpy.int64)
                i = int(numpy.searchsorted(ends, token, side="right"))
                place = f"what is a response (document {first + i}, token {token - int(ends[i]) + int(lengths[i])})"
                self._compare(reader, place, not numpy.isnan(values[token]), not numpy.isnan(others[token]))


def ordered_bits(values: numpy.ndarray) -> numpy.ndarray:
    """Unsigned integers that sort as the floats (float32 or float64, no NaN) do; -0 and 0 are equal."""
    kind = numpy.uint32 if values.dtype == numpy.float32 else numpy.uint64
    bits = (values + values.dtype.type(0)).view(kind)  # -0 + 0 is 0
    sign = kind(1) << kind(8 * bits.itemsize - 1)
    return numpy.where(bits & sign, ~bits, bits | sign)


LAST = 1 << 62  # behind every place


@dataclass(frozen=True)
class Threshold:
    """The last of a ranking that is kept.

    Attributes:
        bits: `ordered_bits` of the lowest score that is kept.
        last: place of the last one with that score that is kept.
    """

    bits: int
    last: int

    def keep(self, values: numpy.ndarray, places: numpy.ndarray) -> numpy.ndarray:
        """Which of these are kept, bool (m,)."""
        bits = ordered_bits(values)
        return (bits > self.bits) | ((bits == self.bits) & (places <= self.last))


def top_threshold(
    stream: Callable[[], Iterable[tuple[numpy.ndarray, numpy.ndarray]]], quota: Callable[[int], int]
) -> Threshold | None:
    """The threshold at which the `quota(n)` best of n scores are kept, ties going to the earlier place.

    An exact selection without holding the scores: its bits are found 16 at a time, from the top, by a histogram
    of those scores that agree with what is known. Reads the stream 2 times for float32 and 4 for float64, and once
    more where some of the scores that are equal to the lowest kept one have to go.

    Args:
        stream: gives (scores (m,), places (m,) int64, going up) in pieces, from the beginning at each call.
    Returns:
        The threshold, or None when nothing is kept.
    """
    prefix = 0  # the threshold's leading bits
    wanted: int | None = None  # scores to take that begin so
    below: int | None = None  # bits not yet known
    while below != 0:
        counts = numpy.zeros(1 << 16, numpy.int64)
        for values, _ in stream():
            bits = ordered_bits(values)
            if below is not None:
                bits = bits[bits >> below == prefix]
            shift = (8 * bits.itemsize if below is None else below) - 16
            counts += numpy.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        if wanted is None:
            wanted = quota(int(counts.sum()))
        if wanted == 0:
            return None
        from_top = counts[::-1].cumsum()
        digit = int(numpy.searchsorted(from_top, wanted))  # counted from the top
        ties = int(counts[::-1][digit])
        wanted -= int(from_top[digit]) - ties
        prefix, below = prefix << 16 | (0xFFFF - digit), shift
    assert wanted is not None  # the loop ran
    if wanted == ties:
        return Threshold(prefix, LAST)
    for values, places in stream():
        equal = places[ordered_bits(values) == prefix]
        if wanted <= len(equal):
            return Threshold(prefix, int(equal[wanted - 1]))
        wanted -= len(equal)
    raise RuntimeError("the stream gave other scores when it was read again")


def check_offline(method: SelectionMethod, recorded: Iterable[str]) -> None:
    """Refuses methods that recorded losses alone cannot decide.

    Args:
        recorded: the signals that are recorded ("base_nll", ...).
    Raises:
        ValueError: says what the method needs, and how to use it instead.
    """
    name, rule, recorded = method.name, method.rule, set(recorded)
    during = f"use it during training: tokensel train --method {name}"
    for signal in MEASURED:
        if signal in method.needs:
            raise ValueError(
                f"method {name!r} needs {signal}, which a training step measures under the model as it is then; "
                f"`tokensel select` has recorded losses alone: {during}"
            )
    for signal in sorted(method.needs & RECORDED.keys() - recorded):
        raise ValueError(f"method {name!r} needs {RECORDED[signal]}")
    if not recorded:
        raise ValueError("recorded is empty; name at least one store of the dataset, as in base=base.parquet")
    unused = sorted(recorded - method.needs)
    if unused and method.needs & RECORDED.keys():
        raise ValueError(f"method {name!r} does not use {', '.join(unused)}; leave it out of recorded")
    if not isinstance(rule, (TopShare, TopSamples)):
        raise ValueError(f"method {name!r} weighs tokens and ranks none, so there is nothing to select; {during}")
    if rule.scope not in ("sample", "dataset") or getattr(rule, "rho_min", None) is not None:
        among = "micro-batch" if rule.scope == "sample" else rule.scope.replace("_", "-")
        raise ValueError(f"method {name!r} chooses among the tokens of a {among} here; set scope=dataset, or {during}")


def _signals(chunk: Chunk, method: SelectionMethod) -> TokenSignals:
    lengths = torch.from_numpy(chunk.lengths.astype(numpy.int64))
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (t,)
    sample = (lengths.cumsum(0) - lengths)[document]
    response = ~torch.from_numpy(numpy.isnan(next(iter(chunk.values.values()))))
    losses: dict[str, Any] = {
        name: torch.from_numpy(numpy.nan_to_num(values))
        for name, values in chunk.values.items()
        if name in method.needs
    }
    if "key" in method.needs:
        position = torch.arange(len(sample)) - sample
        losses["key"] = keys_at(torch.from_numpy(chunk.keys.copy())[document], position)
    return TokenSignals(response, sample, **losses)


class _Competitors(NamedTuple):
    """What is ranked in a chunk, m tokens or whole samples."""

    values: numpy.ndarray  # (m,) scores
    places: numpy.ndarray  # (m,) int64, order in the dataset
    owner: numpy.ndarray  # (r,) of each response token, which competitor decides about it


def _competitors(chunk: Chunk, signals: TokenSignals, method: SelectionMethod) -> _Competitors:
    score, sample = method.score(signals)[signals.response].numpy(), signals.sample[signals.response]
    starts = chunk.lengths.cumsum(dtype=numpy.int64) - chunk.lengths
    document = chunk.first + numpy.searchsorted(starts, sample.numpy(), side="right") - 1
    if isinstance(method.rule, TopSamples):  # the score of a sample stands on each of its tokens
        places, first, owner = numpy.unique(document, return_index=True, return_inverse=True)
        return _Competitors(score[first], places, owner)
    position = signals.response.nonzero()[:, 0] - sample
    return _Competitors(score, document << 32 | position.numpy(), numpy.arange(len(score)))


def select_tokens(method: SelectionMethod, data: RecordedDataset, shards: Shards) -> None:
    """Puts the weights of all documents that the shards lack into them: 1 = kept, 0 = dropped, NaN = not a response.

    Whole samples of a method of scope "sample" are ranked by themselves, otherwise all tokens of the dataset together.

    Raises:
        ValueError: nothing would be kept.
    """
    tokens = data.metadata["tokens"]

    def chunks(what: str, skip: int = 0, done: int = 0) -> Iterator[Chunk]:
        with tqdm(total=tokens, initial=done, unit="token", unit_scale=True, desc=what) as bar:
            for chunk in data.chunks(skip):
                yield chunk
                bar.update(int(chunk.lengths.sum()))

    def ranked() -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
        for chunk in chunks("rank"):
            yield _competitors(chunk, _signals(chunk, method), method)[:2]

    def quota(n: int) -> int:
        rule = method.rule
        assert isinstance(rule, (TopShare, TopSamples))  # `check_offline` refuses others
        kept = int(rule.quota(torch.tensor(n)))
        if not kept:
            raise ValueError(f"rho={rule.rho} of {n} is less than one, so nothing would be kept; raise rho")
        return kept

    together = method.scope == "dataset"
    if together and "threshold" not in shards.state:
        threshold = top_threshold(ranked, quota)
        assert threshold is not None  # a quota of nothing is refused
        shards.state["threshold"] = asdict(threshold)
        shards.save_state()
    for chunk in chunks("select", len(shards.keys), int(shards.lengths.sum())):
        signals = _signals(chunk, method)
        weights = numpy.full(len(signals.response), numpy.nan, numpy.float32)
        response = signals.response.numpy()
        if together:
            values, places, owner = _competitors(chunk, signals, method)
            weights[response] = Threshold(**shards.state["threshold"]).keep(values, places)[owner]
        else:
            weights[response] = method(signals).numpy()[response]
        shards.append(chunk.keys, chunk.lengths, weights)
    shards.flush()
