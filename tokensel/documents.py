"""What a token belongs to: its document, its turn, the prompt before it.

Everything here is read from `labels` (`-100` = not a response token), the padding mask and the packing
boundaries; all tensors are [B, S] and label-aligned. No function makes the host wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
PROMPTS = ("all", "first", "context")


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
