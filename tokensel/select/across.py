"""Choosing among the tokens of several micro-batches and ranks together, as if they were one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensel.select.method import SelectionMethod
from tokensel.select.signals import TokenSignals


def choose_across(
    method: SelectionMethod,
    scored: Sequence[Any],
    given: Sequence[Tensor],
    gather: Callable[[Tensor], Tensor],
    rank: int,
) -> list[Tensor]:
    """The weights of this rank's tokens, [B, S] of each micro-batch.

    Args:
        method: of scope "batch".
        scored: outputs with `score`, `response` and `sample` [B, S] of this rank's micro-batches; as many on each rank.
        given: the data's own weights, [B, S] of each.
        gather: joins the tensors of all ranks along the first dimension, in rank order.
        rank: this one.
    """
    device = scored[0].score.device
    # in the order in which one process would see them (micro-batch, rank, row), so that ties end alike
    widest = int(gather(torch.tensor([max(o.score.numel() for o in scored)], device=device)).max())
    everybody = {}
    for name in ("score", "response", "sample", "weight"):
        own = given if name == "weight" else [output[name] for output in scored]
        parts = [nn.functional.pad(part.flatten(), (0, widest - part.numel())) for part in own]  # with False and 0
        everybody[name] = gather(torch.stack(parts)[None]).transpose(0, 1)  # (batch, rank, token)
    shape = (*everybody["score"].shape[:2], 1)  # (batch, rank, 1)
    first = widest * torch.arange(math.prod(shape), device=device).view(shape)
    signals = TokenSignals(everybody["response"], everybody["sample"] + first, weight=everybody["weight"].float())
    weights = method.select(everybody["score"], signals)[:, rank]
    return [row[: output.score.numel()].view_as(output.score) for row, output in zip(weights, scored, strict=True)]
