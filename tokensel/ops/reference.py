"""The specification in code: eager, short, and as large as the definitions are.

Every function here holds the full [N, V] logits or [B, Hq, S, S] attention. `impl="reference"` runs them; tests
compare everything else against them in float64. Compute dtype is float32, or float64 for float64 input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap): [N, D], [V, D] -> [N, V]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ weight.to(dtype).T  # (N, V)
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def contrast_logits(positive: Tensor, negative: Tensor, beta: float) -> Tensor:
    """(1 + beta) z_positive - beta z_negative: [N, V], [N, V] -> [N, V] (cDPO, arXiv 2411.19943)."""
    return (1 + beta) * positive - beta * negative


def logits_stats(logits: Tensor, labels: Tensor, ignore_index: int) -> dict[str, Tensor]:
    """Fields of TokenStats from [N, V] logits in their own dtype; an ignored row has seen no vocabulary."""
    valid = labels != ignore_index
    log_p = torch.log_softmax(logits, dim=-1)  # (N, V)
    p = log_p.exp()
    log_p = torch.where(p > 0, log_p, 0)  # a token that cannot be has no part in either moment
    entropy = -(p * log_p).sum(-1)
    none = torch.full_like(entropy, -torch.inf)
    target = logits.gather(-1, torch.where(valid, labels, 0)[:, None])[:, 0]
    return {
        "lse": torch.where(valid, torch.logsumexp(logits, dim=-1), none),
        "target_logit": torch.where(valid, target, none),
        "entropy": torch.where(valid, entropy, 0),
        "logp_var": torch.where(valid, (p * (log_p + entropy[:, None]) ** 2).sum(-1), 0),
        "top1": torch.where(valid, logits.amax(-1), none),
        "renyi2": torch.where(valid, -torch.logsumexp(2 * torch.log_softmax(logits, dim=-1), dim=-1), 0),
        "logit_sum": torch.where(valid, logits.sum(-1), 0),
        "rank": torch.where(valid, (logits > target[:, None]).sum(-1), 0).to(logits.dtype),
    }


def logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of the labels, entropies) by autograd, of rows that all have a label: [N, V], [N] -> [N] each."""
    log_p = torch.log_softmax(logits, dim=-1)  # (N, V)
    p = log_p.exp()
    return log_p.gather(-1, labels[:, None])[:, 0], -(p * torch.where(p > 0, log_p, 0)).sum(-1)


def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(log p, ids) of the k largest logits, descending, of equal ones the smaller id first: [N, V] -> [N, k] each."""
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.log_softmax(logits, dim=-1).gather(-1, ids), ids


def logprobs_at(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of the ids, log of the probability of all other tokens) by autograd: [N, V], [N, K] -> [N, K], [N].

    A negative id names no token, and has -inf.
    """
    log_p = torch.log_softmax(logits, dim=-1)  # (N, V)
    named, at = ids >= 0, ids.clamp(min=0)
    elsewhere = log_p.masked_fill(torch.zeros_like(log_p).scatter_add_(-1, at, named.to(log_p.dtype)) > 0, -torch.inf)
    return torch.where(named, log_p.gather(-1, at), -torch.inf), torch.logsumexp(elsewhere, dim=-1)


def divergence_terms(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor | None]:
    """(terms whose sum over the vocabulary is a divergence of p from q, its slope in p up to a constant): [N, V] each.

    The slope is None for KL(q, p), where it is -q / p. `tokensel.token_divergence` says which kinds there are.
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "tv":
        return (p - q).abs() / 2, torch.sign(p - q) / 2
    if kind == "jsd":
        possible = (p > 0) | (q > 0)  # of what is not, the gradient would be no number
        log_q, log_p = torch.where(possible, log_q, 0), torch.where(possible, log_p, 0)
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        over_q, over_p = (torch.where(x > 0, log_x - log_m, 0) for x, log_x in ((q, log_q), (p, log_p)))
        return beta * q * over_q + (1 - beta) * p * over_p, (1 - beta) * over_p
    if kind == "reverse_kl":
        over = torch.where(p > 0, log_p - log_q, 0)
        return p * over, over
    return q * torch.where(q > 0, log_q - log_p, 0), None


def losses(logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross-entropies with z-loss by autograd, of rows that all have a label: [K, V], [K] -> [K]."""
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return nll + z_loss * torch.logsumexp(logits, dim=-1) ** 2


def visible_keys(key_mask: Tensor, segment_ids: Tensor | None, window: int | None) -> Tensor:
    """visible[b, i, j]: key j is seen by query i. Causal, same document, not padding, in the window. [B, S, S]."""
    S = key_mask.shape[1]
    i = torch.arange(S, device=key_mask.device)[:, None]
    j = torch.arange(S, device=key_mask.device)[None, :]
    near = (j <= i) if window is None else (j <= i) & (i - j < window)
    visible = near & key_mask[:, None, :]
    return visible if segment_ids is None else visible & (segment_ids[:, :, None] == segment_ids[:, None, :])


def prompt_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    segment_ids: Tensor | None,
    turn_ids: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Mean over heads of the attention probability on prompt keys: [B, Hq, S, d], [B, Hk, S, d] -> [B, S]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    z = scale * (q.to(dtype) @ k.to(dtype).transpose(-1, -2))  # (B, Hq, S, S)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    visible = visible_keys(key_mask, segment_ids, window)  # (B, S, S)
    z = z.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:  # a sink only adds to the denominator
        z = torch.cat([z, sinks.to(dtype)[None, :, None, None].expand(*z.shape[:3], 1)], dim=-1)
    p = torch.softmax(z, dim=-1).nan_to_num(0.0)[..., : k.shape[2]]  # a row that sees nothing has no mass
    prompt = visible & prompt_mask[:, None, :]
    if turn_ids is not None:
        prompt &= turn_ids[:, :, None] != turn_ids[:, None, :]
    mass = (p * prompt[:, None]).sum(-1)  # (B, Hq, S)
    return torch.where(query_mask, mass.mean(1), 0)
