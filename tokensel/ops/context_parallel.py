"""Attention mass of sequences whose keys are spread over ranks (context parallel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokensel.ops.checks import check_positive, check_shape, check_tensor
from tokensel.ops.score_blocks import score_blocks


@dataclass(frozen=True)
class MassParts:
    """What a shard of the keys adds to the attention mass on the prompt: log-sum-exps of the scaled scores.

    Attributes:
        prompt: [B, Hq, Q] float32 (float64 for float64 inputs), over the shard's visible prompt keys; -inf for none.
        every: the same over all its visible keys.
    """

    prompt: Tensor
    every: Tensor

    @staticmethod
    def merge(parts: Sequence[MassParts]) -> MassParts:
        """Joins disjoint shards of the keys of the same queries, in any order."""
        if not parts:
            raise ValueError("parts is empty; merge needs at least one shard of the keys")
        joined = (torch.stack([getattr(p, name) for p in parts]).logsumexp(0) for name in ("prompt", "every"))
        return MassParts(*joined)

    def mass(self, sinks: Tensor | None = None) -> Tensor:
        """`prompt_attention_mass` of the queries, [B, Q], once all keys are joined; 0 where no key is visible.

        Args:
            sinks: [Hq] logits that add to every row's denominator only.
        """
        every = self.every if sinks is None else torch.logaddexp(self.every, sinks.to(self.every.dtype)[:, None])
        return torch.where(self.prompt.isfinite(), self.prompt - every, -torch.inf).exp().mean(1)


@torch.no_grad()
def prompt_mass_parts(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    *,
    query_positions: Tensor,
    key_positions: Tensor,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    query_turns: Tensor | None = None,
    key_turns: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> MassParts:
    """`prompt_attention_mass` in parts: of some queries over a shard of the keys, whichever tokens these are.

    Joined over shards of all keys, in any order, the parts give the exact mass, so any way of cutting the sequence
    will do: contiguous, head and tail (zig-zag), striped. Plain PyTorch, O(keys of the shard) memory.

    Args:
        q: [B, Hq, Q, d], k: [B, Hk, K, d], after rotary embedding; Hk divides Hq.
        prompt_mask: [B, K] bool, keys that count as prompt.
        query_positions: [B, Q] or [Q] int64, key_positions: [B, K] or [K]: places in the whole sequence; a query sees
            the keys that do not stand behind it.
        query_mask: [B, Q] bool, rows to compute; None = all. key_mask: [B, K] bool, False on padding.
        query_documents, key_documents: [B, Q] and [B, K] integers, equal in the same document of a row only (numbers
            such as `tokensel.documents.document_index` gives); a query sees its own document.
        query_turns, key_turns: the same; a key of the query's own turn never counts as prompt.
        scale, softcap, window: as in `prompt_attention_mass`.
    Raises:
        ValueError: the argument, what was expected and what was given.
    """
    (B, Hq, Q, d), (Hk, K) = q.shape, k.shape[1:3]
    if k.shape != (B, Hk, K, d) or Hq % Hk:
        raise ValueError(f"k must have shape [B, Hk, K, d] = [{B}, Hk, K, {d}], Hk dividing {Hq}; got {list(k.shape)}")
    queries, keys = {"query_mask": query_mask}, {"prompt_mask": prompt_mask, "key_mask": key_mask}
    for name, mask, n in [(n, m, Q) for n, m in queries.items()] + [(n, m, K) for n, m in keys.items()]:
        if mask is not None:
            check_shape(name, check_tensor(name, mask), (B, n), "one entry a token")
    for name, mine, theirs in (
        ("documents", query_documents, key_documents),
        ("turns", query_turns, key_turns),
    ):
        if (mine is None) != (theirs is None):
            raise ValueError(f"query_{name} and key_{name} go together; set both or neither")
    check_positive("softcap", softcap)
    check_positive("window", window)
    query_positions, key_positions = query_positions.expand(B, Q), key_positions.expand(B, K)
    scale = d**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    prompt = torch.full((B, Hq, Q), -torch.inf, dtype=dtype, device=q.device)
    every = prompt.clone()
    for b in range(B):
        rows = torch.arange(Q, device=q.device) if query_mask is None else query_mask[b].nonzero()[:, 0]
        columns = torch.arange(K, device=q.device) if key_mask is None else key_mask[b].nonzero()[:, 0]
        for heads, i, j, z in score_blocks(q[b], k[b], rows, columns, scale, softcap, in_order=False):
            at, behind = query_positions[b, i][:, None], key_positions[b, j][None, :]
            visible = behind <= at  # (R, C)
            if window is not None:
                visible &= at - behind < window
            if query_documents is not None and key_documents is not None:
                visible &= query_documents[b, i][:, None] == key_documents[b, j][None, :]
            counts = visible & prompt_mask[b, j]
            if query_turns is not None and key_turns is not None:
                counts &= query_turns[b, i][:, None] != key_turns[b, j][None, :]
            every[b, heads, i] = z.masked_fill_(~visible, -torch.inf).logsumexp(-1)
            prompt[b, heads, i] = z.masked_fill_(~counts, -torch.inf).logsumexp(-1)
    return MassParts(prompt, every)


@torch.no_grad()
def context_parallel_prompt_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    positions: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    turns: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`prompt_attention_mass` where each rank of `group` has as many tokens of the same sequences, in its own order.

    The ranks hand out their keys one after the other, so a rank holds two shards of one layer's keys at a time.

    Args:
        q: [B, Hq, S, d], k: [B, Hk, S, d] of this rank's S tokens; prompt_mask, query_mask, key_mask: [B, S] bool.
        positions: [B, S] or [S] int64, places of this rank's tokens in the whole sequence.
        documents, turns: [B, S] integers, numbered alike on all ranks.
        query_mask, key_mask, scale, softcap, window, sinks: as in `prompt_mass_parts` and `prompt_attention_mass`.
    Returns:
        [B, S] float32 (float64 for float64 inputs), the mass of this rank's queries; 0 on rows that are not asked for.
    """
    B, S = prompt_mask.shape
    none = torch.zeros_like(prompt_mask, dtype=torch.int64)
    columns = [positions.expand(B, S), prompt_mask, none + 1 if key_mask is None else key_mask]
    columns += [none if ids is None else ids for ids in (documents, turns)]
    own = torch.stack([values.to(torch.int64) for values in columns])  # (5, B, S)
    parts: list[MassParts] = []
    for source in range(dist.get_world_size(group)):
        sends = source == dist.get_rank(group)
        keys, theirs = (x.contiguous() if sends else torch.empty_like(x).contiguous() for x in (k, own))
        for x in (keys, theirs):
            dist.broadcast(x, group=group, group_src=source)
        shard = prompt_mass_parts(
            q,
            keys,
            theirs[1].bool(),
            query_positions=own[0],
            key_positions=theirs[0],
            query_mask=query_mask,
            key_mask=theirs[2].bool(),
            query_documents=None if documents is None else own[3],
            key_documents=None if documents is None else theirs[3],
            query_turns=None if turns is None else own[4],
            key_turns=None if turns is None else theirs[4],
            scale=scale,
            softcap=softcap,
            window=window,
        )
        parts = [MassParts.merge([*parts, shard])]
    return parts[0].mass(sinks)
