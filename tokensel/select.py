"""Selectors (step 6): pure functions from a score to a weight per token. No host synchronisation on a device."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from tokensel.checks import check_number


def exact_share(rho: float) -> Fraction:
    """`rho` as the decimal that was written, so that 0.6 · 10 is 6 and 0.7 · 10 is 7, not 8 after rounding up.

    Raises:
        TypeError: rho is not a number. ValueError: rho outside (0, 1].
    """
    check_number("rho", rho)
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], the share of response tokens to keep; got {rho}")
    return Fraction(str(rho)).limit_denominator(1_000_000)


def kept_count(responses: Tensor, rho: float) -> Tensor:
    """ceil(rho · n) in integers. responses: int64 counts n of any shape."""
    share = exact_share(rho)
    return (responses * share.numerator + share.denominator - 1) // share.denominator


def responses_per_sample(response: Tensor, sample: Tensor) -> Tensor:
    """Counts response tokens by sample number: bool and int64 of one shape with N entries -> [N] int64."""
    counts = torch.zeros(sample.numel(), dtype=torch.int64, device=sample.device)
    return counts.index_add_(0, sample.flatten(), response.flatten().to(torch.int64))


def top_share(score: Tensor, response: Tensor, sample: Tensor, rho: float) -> Tensor:
    """Keeps, in each sample, the ceil(rho · n) response tokens with the highest score; ties go to the earlier one.

    Args:
        score: float; response: bool; sample: int64 in [0, N); all of one shape with N entries.
    Returns:
        bool of that shape.
    Raises:
        ValueError: rho outside (0, 1], or (on a CPU; a device-side assertion elsewhere) a NaN score.
    """
    flat, competes, group = score.flatten(), response.flatten(), sample.flatten()
    finite = (~(flat.isnan() & competes)).all()
    if torch.compiler.is_compiling():
        pass  # a compiled graph has no place for the check
    elif flat.device.type != "cpu":
        torch._assert_async(finite, "score: NaN on a response token")
    elif not bool(finite):
        raise ValueError("score is NaN on a response token; check the model's losses and the recorded history")
    N = flat.numel()
    quota = kept_count(responses_per_sample(competes, group), rho)  # (N,)
    # two stable sorts: by score within samples, the others behind everybody in a group N of their own
    by_score = torch.argsort(flat, descending=True, stable=True)
    order = by_score[torch.argsort(torch.where(competes, group, N)[by_score], stable=True)]
    place = torch.arange(N, device=flat.device)
    sorted_group = group[order]
    starts = torch.ones(N, dtype=torch.bool, device=flat.device)
    starts[1:] = sorted_group[1:] != sorted_group[:-1]
    rank = place - torch.where(starts, place, 0).cummax(0).values
    keep = torch.zeros(N, dtype=torch.bool, device=flat.device)
    keep[order] = rank < quota[sorted_group]
    return (keep & competes).view_as(response)
