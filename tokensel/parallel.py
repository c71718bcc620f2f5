"""What ranks of one job share: settings that have to agree, a head whose vocabulary is spread over them (tensor
parallel), attention whose keys are (context parallel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokensel.ops.checks import check_positive, check_shape, check_tensor


def check_ranks_agree(settings: dict[str, object], fix: str = "start all ranks with the same settings") -> None:
    """Compares settings over the ranks of the default process group; one small exchange, to be called by all of them.

    Raises:
        ValueError: on every rank, where two differ; names the setting, the two ranks and their values.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, settings)
    for rank, theirs in enumerate(everybody):
        for name in sorted(theirs.keys() | everybody[0].keys()):
            first, other = everybody[0].get(name), theirs.get(name)
            if first != other:
                raise ValueError(
                    f"{name} must be the same on every rank; rank 0 has {first!r} but rank {rank} has {other!r}; {fix}"
                )


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that this rank's rows of the head stand for.

    Attributes:
        first: number of the first row. rows: how many. vocabulary: V, of all ranks together.
        group: the process group that the vocabulary is spread over.
    """

    first: int
    rows: int
    vocabulary: int
    group: object

    IGNORED, ELSEWHERE = -100, -1  # labels as the shard sees them

    def labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels counted from the shard's first row; IGNORED for ignored ones, ELSEWHERE for other ranks'."""
        here = (labels >= self.first) & (labels < self.first + self.rows)
        found = torch.where(here, labels - self.first, self.ELSEWHERE)
        return torch.where(labels == ignore_index, self.IGNORED, found)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Everybody's `x`, of one shape and dtype, in the order of their shards."""
        everybody = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everybody, x.contiguous(), group=self.group)
        return everybody


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """(hidden, weight, bias, shard) as this rank computes with them; shard is None unless `weight` is a DTensor.

    Each rank multiplies the hidden states with its own rows of the head. Their gradient is the sum over ranks, which
    DTensor adds up where `hidden` came from.

    Raises:
        TypeError: weight is a DTensor but hidden or bias is not, or the other way round.
        ValueError: placements other than rows of the vocabulary, evenly cut as by Shard(0), and whole hidden states.
    """
    sharded = hasattr(weight, "device_mesh")
    for name, value in (("hidden", hidden), ("bias", bias)):
        if value is not None and hasattr(value, "device_mesh") != sharded:
            found = [type(value).__name__, type(weight).__name__]
            raise TypeError(
                f"{name} is a {found[0]} but weight is a {found[1]}. A head that is sharded over the vocabulary takes "
                "hidden states that say they are the same on all ranks: DTensor.from_local(hidden, "
                "weight.device_mesh, [Replicate()]). FSDP's weights are whole only inside the module's own forward"
            )
    if not sharded:
        return hidden, weight, bias, None
    from torch.distributed.tensor import Partial, Replicate

    mesh, placements = weight.device_mesh, weight.placements
    over = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
    if len(over) != 1 or not all(p.is_replicate() for i, p in enumerate(placements) if i not in over):
        raise ValueError(f"weight must be sharded over dimension 0 of [V, D], once; got {placements}; redistribute it")
    if bias is not None and (bias.device_mesh != mesh or bias.placements != placements):
        raise ValueError(f"bias must be sharded as weight is, {placements}; got {bias.placements}; redistribute it")
    if hidden.device_mesh != mesh or not all(p.is_replicate() for p in hidden.placements):
        raise ValueError(
            f"hidden must be replicated over the mesh of weight; got {hidden.placements} on {hidden.device_mesh}; use "
            "hidden.redistribute(placements=[Replicate()])"
        )
    ranks, rank = mesh.size(over[0]), mesh.get_local_rank(over[0])
    V, even = weight.shape[0], -(-weight.shape[0] // ranks)
    first = min(rank * even, V)
    rows = weight.to_local()
    if len(rows) == 0 or len(rows) != min(even, V - first):
        raise ValueError(
            f"weight must be cut evenly: rows {first} to {min(first + even, V)} of {V} on rank {rank} of {ranks}; got "
            f"{len(rows)} rows; cut it with distribute_tensor(weight, mesh, [Shard(0)])"
        )
    gradients = [Partial() if i in over else Replicate() for i in range(mesh.ndim)]
    shard = VocabShard(first, len(rows), V, mesh.get_group(over[0]))
    return hidden.to_local(grad_placements=gradients), rows, None if bias is None else bias.to_local(), shard


def replicated_as(like: Tensor, x: Tensor) -> Tensor:
    """`x`, equal on all ranks of a tensor-parallel group, as the DTensor that says so, where `like` is a DTensor."""
    if not hasattr(like, "device_mesh") or hasattr(x, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def spreading_group(module: nn.Module) -> object | None:
    """The process group that a module's weights are spread over by rows (tensor parallel), or None."""
    for parameter in module.parameters():
        for i, placement in enumerate(getattr(parameter, "placements", ())):
            if placement.is_shard(0):
                return parameter.device_mesh.get_group(i)
    return None


def mean_over_ranks(x: Tensor, group: object | None) -> Tensor:
    """The mean of everybody's `x`, of which each stands for as many attention heads; `x` itself without a group."""
    if group is None:
        return x
    dist.all_reduce(x, group=group)
    return x / dist.get_world_size(group)


_BLOCK_ELEMENTS = 8 * 2**20 // 4  # of the scores of one key head, [group · rows, keys]


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
        ValueError: the argument, what was expected and what was found.
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
    scale, G = d**-0.5 if scale is None else scale, Hq // Hk
    dtype = torch.promote_types(q.dtype, torch.float32)
    prompt = torch.full((B, Hq, Q), -torch.inf, dtype=dtype, device=q.device)
    every = prompt.clone()
    for b in range(B):
        rows = torch.arange(Q, device=q.device) if query_mask is None else query_mask[b].nonzero()[:, 0]
        columns = torch.arange(K, device=q.device) if key_mask is None else key_mask[b].nonzero()[:, 0]
        if len(rows) == 0 or len(columns) == 0:
            continue
        for i in rows.split(max(1, _BLOCK_ELEMENTS // (G * len(columns)))):
            at, behind = query_positions[b, i][:, None], key_positions[b, columns][None, :]
            visible = behind <= at  # (R, C)
            if window is not None:
                visible &= at - behind < window
            if query_documents is not None:
                visible &= query_documents[b, i][:, None] == key_documents[b, columns][None, :]
            counts = visible & prompt_mask[b, columns]
            if query_turns is not None:
                counts &= query_turns[b, i][:, None] != key_turns[b, columns][None, :]
            for head in range(Hk):
                heads = slice(head * G, (head + 1) * G)
                z = (q[b, heads, i].to(dtype).flatten(0, 1) * scale) @ k[b, head, columns].to(dtype).T
                if softcap is not None:
                    z = z.div_(softcap).tanh_().mul_(softcap)
                z = z.view(G, len(i), -1).masked_fill_(~visible, -torch.inf)  # (G, R, C)
                every[b, heads, i] = z.logsumexp(-1)
                prompt[b, heads, i] = z.masked_fill_(~counts, -torch.inf).logsumexp(-1)
    return MassParts(prompt, every)


@torch.no_grad()
def context_parallel_prompt_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    positions: Tensor,
    *,
    group: object | None = None,
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
    known = [positions.expand(B, S), prompt_mask, none + 1 if key_mask is None else key_mask]
    known += [none if ids is None else ids for ids in (documents, turns)]
    own = torch.stack([values.to(torch.int64) for values in known])  # (5, B, S)
    options = {"query_mask": query_mask, "scale": scale, "softcap": softcap, "window": window}
    parts: list[MassParts] = []
    for source in range(dist.get_world_size(group)):
        sends = source == dist.get_rank(group)
        keys, theirs = (x.contiguous() if sends else torch.empty_like(x).contiguous() for x in (k, own))
        for x in (keys, theirs):
            dist.broadcast(x, group=group, group_src=source)
        options |= {"query_positions": own[0], "key_positions": theirs[0], "key_mask": theirs[2].bool()}
        if documents is not None:
            options |= {"query_documents": own[3], "key_documents": theirs[3]}
        if turns is not None:
            options |= {"query_turns": own[4], "key_turns": theirs[4]}
        found = prompt_mass_parts(q, keys, theirs[1].bool(), **options)
        parts = [MassParts.merge([*parts, found])]
    return parts[0].mass(sinks)
