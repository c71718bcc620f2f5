"""What a token belongs to: its document, its turn, the prompt before it.

`BatchLayout.from_batch` reads it once a micro-batch from `labels` (`-100` = not a response token), the padding mask
and the packing boundaries, and is handed along. All tensors are [B, S] and label-aligned. Nothing but
`host_documents` makes the host wait for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
PROMPTS = ("all", "first", "context")


def to_rows(x: Tensor, last: float) -> Tensor:
    """Label-aligned [B, S] to row-aligned: entry t, the row that predicts token t + 1, speaks of that token."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1), value=last)


def to_labels(x: Tensor) -> Tensor:
    """Row-aligned [B, S] to label-aligned; nothing predicts the first token, which gets 0."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))


class HostDocuments(NamedTuple):
    """The documents of a batch, on the CPU: n documents, t valid tokens, in batch order."""

    valid: Tensor  # [B, S] bool
    response: Tensor  # (t,) bool
    position: Tensor  # (t,) place of the token in its document
    document: Tensor  # (t,) number of its document, in [0, n)
    keys: Tensor  # (n,) int64, `document_keys`
    lengths: Tensor  # (n,) int64


@dataclass(eq=False)
class BatchLayout:
    """What every token of a micro-batch belongs to; made once from the batch, handed along. Tensors are [B, S].

    Attributes:
        input_ids: int64 token ids.
        labels: int64, -100 where a token is not a response.
        segment_ids: int64 packing boundaries, a new number where a document begins; None = one document a row.
        key_mask: bool, False on padding; None = no padding.
        sample: int64, `document_index`.
        predictable: bool, tokens that another token of their document stands before.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor | None
    key_mask: Tensor | None
    sample: Tensor
    predictable: Tensor

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> BatchLayout:
        """Reads `input_ids` and `labels`, and `attention_mask` and `position_ids` where the batch has them.

        By the rule of transformers' masks, positions that restart mean packed documents only where there is no 2-D
        mask; with one, the model itself would let documents see each other, which is refused.

        Raises:
            ValueError: no labels, a mask that is not [B, S], or packed documents under a mask (a device-side assertion
                elsewhere than on a CPU).
        """
        if batch.get("labels") is None:
            raise ValueError(
                "the batch has no labels (token ids, -100 off the response); give rows that have them, and a collator "
                "that keeps and pads them, such as transformers.DataCollatorForSeq2Seq"
            )
        attention_mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
        if attention_mask is None:
            segments = None if position_ids is None else segments_from_positions(position_ids)
            return cls.of_segments(batch["input_ids"], batch["labels"], segments, None)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be [B, S] (1 = token, 0 = padding); got {list(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        if position_ids is not None:
            _refuse_packing_under_mask(position_ids, mask)
        return cls.of_segments(batch["input_ids"], batch["labels"], None, mask)

    @classmethod
    def of_segments(
        cls, input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None, key_mask: Tensor | None
    ) -> BatchLayout:
        """From packing boundaries and a padding mask that are known already."""
        predictable = torch.ones_like(labels, dtype=torch.bool)
        predictable[:, :1] = False
        if segment_ids is not None:
            predictable[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]
        if key_mask is not None:
            predictable[:, 1:] &= key_mask[:, 1:] & key_mask[:, :-1]
        sample = document_index(torch.zeros_like(labels) if segment_ids is None else segment_ids)
        return cls(input_ids, labels, segment_ids, key_mask, sample, predictable)

    @property
    def response(self) -> Tensor:
        """The tokens that compete, bool. A document's first token is never one: nothing predicts it."""
        return (self.labels != IGNORE_INDEX) & self.predictable

    @property
    def response_labels(self) -> Tensor:
        """`labels` of the tokens that compete, -100 elsewhere."""
        return torch.where(self.response, self.labels, IGNORE_INDEX)

    def positions(self) -> Tensor:
        """`positions_in_document`."""
        return positions_in_document(self.input_ids, self.segment_ids, self.key_mask)

    def token_keys(self) -> Tensor:
        """`token_keys`."""
        return token_keys(self.input_ids, self.segment_ids, self.key_mask)

    def prompt_keys(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """`prompt_keys`, among the competing responses."""
        return prompt_keys(self.response_labels, prompt, self.segment_ids)

    @cached_property
    def host_documents(self) -> HostDocuments:
        """The documents, on the CPU; waits for the device."""
        input_ids, labels = self.input_ids.cpu(), self.labels.cpu()
        segment_ids = None if self.segment_ids is None else self.segment_ids.cpu()
        valid = torch.ones_like(input_ids, dtype=torch.bool) if self.key_mask is None else self.key_mask.cpu().bool()
        sample = self.sample.cpu()[valid]
        _, document, lengths = sample.unique_consecutive(return_inverse=True, return_counts=True)
        position = positions_in_document(input_ids, segment_ids, valid)[valid]
        # A document's first token is predicted from nothing, so it never is a response, whatever its label:
        # packing collators set it to -100 and padding collators do not.
        response = (labels[valid] != IGNORE_INDEX) & (position > 0)
        keys = document_keys(input_ids, segment_ids, valid)[valid][position == 0]
        return HostDocuments(valid, response, position, document, keys, lengths)


def _refuse_packing_under_mask(position_ids: Tensor, mask: Tensor) -> None:
    restarts = (position_ids[:, 1:] <= position_ids[:, :-1]) & mask[:, 1:] & mask[:, :-1]
    one_document_a_row = ~restarts.any()
    if mask.device.type != "cpu":
        torch._assert_async(one_document_a_row, "position_ids restart although attention_mask is given")
    elif not bool(one_document_a_row):
        raise ValueError(
            "position_ids restart inside a row although attention_mask is given: the packed documents would see "
            "each other. Leave attention_mask out of packed batches"
        )


def segments_from_positions(position_ids: Tensor) -> Tensor:
    """Packing boundaries from positions: a new document starts wherever positions do not go up by one.

    Args:
        position_ids: [B, S] int64, restarting at each document.
    Returns:
        [B, S] int64 document index in the row, from 0. The rule is the one of transformers' packed masks.
    """
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def document_index(segment_ids: Tensor) -> Tensor:
    """Numbers documents over the whole batch: [B, S] -> [B, S] int64 in [0, B·S), without a host sync.

    The number is the flat position of the document's first token, so any [B·S] buffer can hold one value a
    document.
    """
    flat = torch.arange(segment_ids.numel(), device=segment_ids.device).view_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.where(starts, flat, 0).cummax(-1).values


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (arithmetic wraps; shifts are made logical by a mask)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as int64: the step of splitmix64


def document_keys(input_ids: Tensor, segment_ids: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
    """A 64-bit hash of the document that each token belongs to.

    The hash is a sum over the document's tokens of mixed (position, token id) pairs: order matters, where the
    document stands in the batch (row, padding side, packing) does not.

    Args:
        input_ids: [B, S] int64.
        segment_ids: [B, S] int64 packing boundaries; None means one document a row.
        key_mask: [B, S] bool, False on padding.
    Returns:
        [B, S] int64, 0 on padding.
    """
    index, position, valid = _places(input_ids, segment_ids, key_mask)
    pairs = _mix(_mix((position + 1) * _GOLDEN) + input_ids) * valid
    sums = torch.zeros(index.numel(), dtype=torch.int64, device=index.device)
    sums.index_add_(0, index.flatten(), pairs.flatten())
    return _mix(sums)[index] * valid


def _places(input_ids: Tensor, segment_ids: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(document number, position among the document's valid tokens, valid), each [B, S]."""
    segments = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
    valid = torch.ones_like(input_ids, dtype=torch.bool) if key_mask is None else key_mask.bool()
    index = document_index(segments)
    count = valid.to(torch.int64).cumsum(-1)
    before = torch.where(valid, count - 1, count).flatten()[index]  # valid tokens of the row before the document
    return index, count - 1 - before, valid


def positions_in_document(
    input_ids: Tensor, segment_ids: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """Position of each token among the valid tokens of its document: [B, S] int64, from 0; -1 or less on padding."""
    _, position, valid = _places(input_ids, segment_ids, key_mask)
    return torch.where(valid, position, -1)


def token_keys(input_ids: Tensor, segment_ids: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
    """A 64-bit identity of each token: its document's key and its place in it. [B, S] int64.

    Seeded random selection draws from it, so that the draw does not depend on batch order, padding or packing.
    """
    position = positions_in_document(input_ids, segment_ids, key_mask)
    return keys_at(document_keys(input_ids, segment_ids, key_mask), position)


def keys_at(document_key: Tensor, position: Tensor) -> Tensor:
    """`token_keys` from the key of each token's document and its position there, int64 of one shape."""
    return _mix(document_key + (position + 1) * _GOLDEN)


def uniform_from_keys(keys: Tensor, seed: int) -> Tensor:
    """A float64 in [0, 1) for each int64 key, the same for the same (key, seed) on every device."""
    start = _mix(torch.tensor(seed, dtype=torch.int64, device=keys.device) * _GOLDEN)
    return ((_mix(keys + start) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def turn_ids(labels: Tensor) -> Tensor:
    """Numbers the runs of prompt and of response tokens of each row: [B, S] int64, going up along the row."""
    response = (labels != IGNORE_INDEX).to(torch.int64)
    return torch.diff(response, prepend=response[:, :1], dim=-1).abs().cumsum(-1)


def prompt_keys(labels: Tensor, prompt: str = "all", segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Which keys count as prompt, as `prompt_attention_mass` takes it.

    Args:
        labels: [B, S] int64.
        prompt: "all", every non-response token of the document before the query (also of later turns);
            "first", only those before the document's first response token;
            "context", everything before the query's own answer, earlier answers included.
        segment_ids: [B, S] packing boundaries, needed by "first" to find each document's start.
    Returns:
        (prompt_mask [B, S] bool, turn_ids [B, S] int64 or None).
    """
    if prompt == "all":
        return labels == IGNORE_INDEX, None
    if prompt == "first":
        segments = torch.zeros_like(labels) if segment_ids is None else segment_ids
        index = document_index(segments)
        responses = (labels != IGNORE_INDEX).to(torch.int64)
        count = responses.cumsum(-1)
        before = (count - responses).flatten()[index]
        return count == before, None
    if prompt == "context":
        return torch.ones_like(labels, dtype=torch.bool), turn_ids(labels)
    raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}; got {prompt!r}")


_MASKS = ("completion_mask", "assistant_masks")  # which TRL makes of text; 1 = a response token
_ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")  # of its DPO and KTO trainers


def documents_of(row: Mapping[str, Any], max_length: int | None = None) -> list[dict[str, list[int]]]:
    """The documents of a row, as a trainer sees them: lists `input_ids` and `labels` of each.

    Args:
        row: `input_ids`, and `labels` or the masks that TRL makes of text (1 = a response token); with neither every
            token is a response. Perhaps `attention_mask`, 0 = padding, which is no part of a document, and
            `seq_lengths`, those of the documents that TRL has packed into the row. Or `prompt_ids` and the answers to
            it, as TRL's DPO and KTO trainers have them; each answer makes a document.
        max_length: a prompt with its answer is cut to this many tokens, as TRL's collators do.
    Raises:
        ValueError: no `input_ids`, or lists that differ in length.
    """
    if "prompt_ids" in row and "input_ids" not in row:
        return [document for answered in _answered(row, max_length) for document in documents_of(answered)]
    if "input_ids" not in row:
        raise ValueError(f"a row must have input_ids; it has {', '.join(row) or 'nothing'}. Tokenise the rows first")
    ids, labels, valid = (_listed(row.get(name)) for name in ("input_ids", "labels", "attention_mask"))
    lengths = _listed(row.get("seq_lengths")) or [len(ids)]
    masks = {name: _listed(row[name]) for name in _MASKS if row.get(name) is not None} if labels is None else {}
    for name, values in {"labels": labels, "attention_mask": valid, **masks}.items():
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{name} has {len(values)} entries, but the row has {len(ids)} input_ids")
    if sum(lengths) != len(ids):
        raise ValueError(f"seq_lengths are {' + '.join(map(str, lengths))}, but the row has {len(ids)} input_ids")
    if labels is None:
        labels = [token if all(bits) else IGNORE_INDEX for token, *bits in zip(ids, *masks.values(), strict=True)]
    documents = []
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        places = [i for i in range(end - length, end) if valid is None or valid[i]]
        if places:  # nothing predicts the first token
            answers = [IGNORE_INDEX, *(labels[i] for i in places[1:])]
            documents.append({"input_ids": [ids[i] for i in places], "labels": answers})
    return documents


def _answered(row: Mapping[str, Any], max_length: int | None) -> Iterator[dict[str, list[int]]]:
    """The prompt of a row with each of its answers, which are responses."""
    prompt = _listed(row["prompt_ids"])
    for answer in (_listed(row[name]) for name in _ANSWERS if row.get(name) is not None):
        whole = {"input_ids": [*prompt, *answer], "completion_mask": [0] * len(prompt) + [1] * len(answer)}
        yield {name: values[:max_length] for name, values in whole.items()}


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values
