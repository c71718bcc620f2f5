"""What the ranks of one job share: settings that have to agree, the attention heads of a layer spread over them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokensel.ops import context_parallel
from tokensel.ops.vocab_parallel import is_dtensor

T = TypeVar("T")
WAIT = timedelta(days=1)  # of a rank for the others, while one of them reads all rows or writes the store


class FirstRankFailed(ValueError):
    """Raised on the other ranks, where rank 0 has raised what it says itself."""

    is_told = True


@contextlib.contextmanager
def joined_ranks() -> Iterator[None]:
    """Joins the processes that torchrun or `accelerate launch` has started together, if there are several."""
    if dist.is_initialized() or launched_ranks() == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def launched_ranks() -> int:
    """How many processes torchrun or the like has started together, by the environment.

    Raises:
        ValueError: WORLD_SIZE without what belongs to it.
    """
    ranks = os.environ.get("WORLD_SIZE") or "1"
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not ranks.isdecimal() or (ranks != "1" and missing):
        problem = f"but {missing[0]} is not set" if ranks.isdecimal() else "which is no number"
        raise ValueError(f"WORLD_SIZE is {ranks}, {problem}; start the ranks by torchrun, or unset WORLD_SIZE")
    return int(ranks)


def rank_of_ranks() -> tuple[int, int]:
    """(number of this process, how many there are); (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Around what all ranks do together.

    Raises:
        ConnectionError: another rank has ended, or has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:  # of the backend: each has its own
        raise ConnectionError(
            "another rank of the job has ended, or has not answered in time; what it says itself is the cause "
            f"({str(error).splitlines()[0][:200]})"
        ) from error


def on_first_rank(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, where alone it runs. To be called by all ranks.

    Raises:
        What it raises on rank 0; on the others FirstRankFailed, with the message of that.
    """
    rank, ranks = rank_of_ranks()
    if ranks == 1:
        return function()
    failure: Exception | None = None
    answer: list[Any] = [None, None]
    if rank == 0:
        try:
            answer = [function(), None]
        except Exception as error:  # raised below, once the others know
            failure, answer = error, [None, f"{type(error).__name__}: {error}"]
    with naming_lost_ranks():
        dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise FirstRankFailed(f"rank 0 failed: {answer[1]}")
    return answer[0]


def wait_for_ranks() -> None:
    """Returns when all ranks have come here."""
    if rank_of_ranks()[1] > 1:
        with naming_lost_ranks():
            dist.barrier()


def check_ranks_agree(settings: dict[str, object], fix: str = "start all ranks with the same settings") -> None:
    """Compares settings over the ranks of the default process group; one small exchange, to be called by all of them.

    Raises:
        ValueError: on every rank, where two differ; names the setting, the two ranks and their values.
    """
    if rank_of_ranks()[1] == 1:
        return
    everybody: list = [None] * dist.get_world_size()
    with naming_lost_ranks():
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
    return rank_of_ranks()[0] == 0


def gather_over_ranks(objects: list) -> list:
    """Everybody's lists joined in rank order; the list itself without a process group. To be called by all ranks."""
    if rank_of_ranks()[1] == 1:
        return objects
    everybody: list = [None] * dist.get_world_size()
    with naming_lost_ranks():
        dist.all_gather_object(everybody, objects)
    return [each for theirs in everybody for each in theirs]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of everybody's `x`; `x` itself without a process group. To be called by all ranks."""
    if rank_of_ranks()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def without_repeated_rows(sample: Tensor, size: int, accelerator: Any) -> Tensor:
    """Tokens of rows that are no repetition, by which the last batch is filled where ranks have unequal numbers.

    Args:
        sample: [B, S] int64, the number of each token's document (`BatchLayout`).
        size: rows in a batch of one rank; where B is 1, they may lie end to end in one.
        accelerator: accelerate's, which is at the batch.
    Returns:
        [B, 1] bool, or [1, S] where the batch is one row of rows.
    Raises:
        ValueError: the rows that lie end to end are packed ones, whose ends cannot be seen.
    """
    state, number = accelerator.gradient_state, torch.arange(len(sample), device=sample.device)[:, None]
    filled = state.end_of_dataloader and state.remainder > 0 and accelerator.even_batches
    if not filled or accelerator.num_processes == 1 or len(sample) not in (1, size):
        return number >= 0
    if len(sample) != size:
        number = torch.diff(sample, prepend=sample[:, :1]).ne(0).cumsum(-1)
        documents = int(number[0, -1]) + 1
        if documents != size:
            raise ValueError(
                f"the last batch of the evaluation repeats rows, which cannot be found among {documents} documents of "
                f"{size} packed rows; set per_device_eval_batch_size=1, or do not pack them"
            )
    return accelerator.process_index * size + number < state.remainder


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
