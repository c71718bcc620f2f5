"""What ranks of one job have to agree on, and what they share."""

from __future__ import annotations

import torch.distributed as dist


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
