"""A head whose vocabulary is spread over ranks (tensor parallel): each rank multiplies with its own rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over ranks; asked without importing what only distributed runs need."""
    return hasattr(x, "device_mesh")


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
    group: dist.ProcessGroup

    IGNORED, ELSEWHERE = -100, -1  # labels as the shard sees them

    def labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels counted from the shard's first row; IGNORED for ignored ones, ELSEWHERE for other ranks'."""
        here = (labels >= self.first) & (labels < self.first + self.rows)
        mine = torch.where(here, labels - self.first, self.ELSEWHERE)
        return torch.where(labels == ignore_index, self.IGNORED, mine)

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
    sharded = is_dtensor(weight)
    for name, value in (("hidden", hidden), ("bias", bias)):
        if value is not None and is_dtensor(value) != sharded:
            types = [type(value).__name__, type(weight).__name__]
            raise TypeError(
                f"{name} is a {types[0]} but weight is a {types[1]}. A head that is sharded over the vocabulary takes "
                "hidden states that say they are the same on all ranks: DTensor.from_local(hidden, "
                "weight.device_mesh, [Replicate()]). FSDP's weights are whole only inside the module's own forward"
            )
    if not (is_dtensor(weight) and is_dtensor(hidden)):
        return hidden, weight, bias, None
    from torch.distributed.tensor import Partial, Replicate

    mesh, placements = weight.device_mesh, weight.placements
    over = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
    if len(over) != 1 or not all(p.is_replicate() for i, p in enumerate(placements) if i not in over):
        raise ValueError(f"weight must be sharded over dimension 0 of [V, D], once; got {placements}; redistribute it")
    if is_dtensor(bias) and (bias.device_mesh != mesh or bias.placements != placements):
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
    return hidden.to_local(grad_placements=gradients), rows, bias.to_local() if is_dtensor(bias) else None, shard


def replicated_as(like: Tensor, x: Tensor) -> Tensor:
    """`x`, equal on all ranks of a tensor-parallel group, as the DTensor that says so, where `like` is a DTensor."""
    if not is_dtensor(like) or is_dtensor(x):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
