"""What the ranks of one job share: settings that have to agree, the attention heads of a layer spread over them."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import Tensor, nn

from tokensel.ops import context_parallel
from tokensel.ops.vocab_parallel import is_dtensor


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


def is_first_rank() -> bool:
    """Whether this process speaks for the job: rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def gather_over_ranks(objects: list) -> list:
    """Everybody's lists joined in rank order; the list itself without a process group. To be called by all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return objects
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, objects)
    return [each for theirs in everybody for each in theirs]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of everybody's `x`; `x` itself without a process group. To be called by all ranks."""
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def spreading_group(module: nn.Module) -> dist.ProcessGroup | None:
    """The process group that a module's weights are spread over by rows (tensor parallel), or None."""
    for parameter in module.parameters():
        if is_dtensor(parameter):
            for i, placement in enumerate(parameter.placements):
                if placement.is_shard(0):
                    return parameter.device_mesh.get_group(i)
    return None


def mean_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean of everybody's `x`, of which each stands for as many attention heads; `x` itself without a group."""
    if group is None:
        return x
    dist.all_reduce(x, group=group)
    return x / dist.get_world_size(group)


def __getattr__(name: str) -> object:
    if name not in ("MassParts", "context_parallel_prompt_mass", "prompt_mass_parts"):
        raise AttributeError(f"module 'tokensel.parallel' has no attribute {name!r}")
    text = f"tokensel.parallel.{name} is now in tokensel.ops.context_parallel; the old name goes with 0.3"
    warnings.warn(text, FutureWarning, stacklevel=2)
    return getattr(context_parallel, name)
