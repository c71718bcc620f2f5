"""Functions on tensors whose vocabulary or keys are spread over ranks: jobs of ranks.py, and their inputs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import tokensel
from tokensel.ops.context_parallel import context_parallel_prompt_mass


def whole(tensor):
    """A copy of a tensor that may be spread over ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


# A head whose vocabulary is spread over the ranks

VOCABULARY_CASES = [
    ("float64", "chunked"),
    ("float32", "chunked"),
    ("bfloat16", "chunked"),
    ("float32", "fused"),
    ("bfloat16", "fused"),
]


def head_inputs(dtype):
    """hidden (N, D) of two models, weight (V, D), bias (V,), labels (N,): V is odd, some rows are ignored."""
    generator = torch.Generator().manual_seed(8)
    N, D, V = 60, 24, 333
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, before, weight, bias = draw(N, D), draw(N, D), draw(V, D) * 0.6, draw(V)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::7] = -100
    labels[1:3] = torch.tensor([0, V - 1])  # the outermost rows of the shards
    labels[3:5] = torch.tensor([V // 2, V // 2 + 1])  # and the inner ones
    return *(t.to(dtype) for t in (hidden, before, weight, bias)), labels


HEAD_OPTIONS = {"softcap": 6.0, "logit_scale": 0.7}


def head_step(dtype, impl, mesh=None):
    """Statistics of both models, a selection by them, and the loss's gradients, all whole tensors."""
    hidden, before, weight, bias, labels = head_inputs(getattr(torch, dtype))
    local = hidden.requires_grad_()
    if mesh is not None:
        hidden, before = (DTensor.from_local(t, mesh, [Replicate()]) for t in (hidden, before))
        weight, bias = (distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias))
    leaves = local, weight.requires_grad_(), bias.requires_grad_()
    options = {"bias": bias, "impl": impl, **HEAD_OPTIONS}
    models = (hidden, weight), (before, weight)
    now, then = tokensel.token_stats_pair(*models, labels, entropy=True, **options)
    method = tokensel.methods.get("rel", rho=0.6)
    signals = tokensel.TokenSignals(labels != -100, torch.arange(60) // 20, nll=now.nll, history_nll=then.nll)
    keep = method(signals)
    weights = keep * torch.linspace(-1, 2, len(keep), dtype=torch.float64)  # not all alike, and some negative
    loss = tokensel.selected_cross_entropy(hidden, weight, labels, weights, stats=now, denominator=10.0, **options)
    alone = tokensel.selected_cross_entropy(hidden, weight, labels, weights, denominator=10.0, **options)
    gradients = torch.autograd.grad(3 * loss, leaves)
    return {"keep": keep, "loss": loss.detach(), "without stats": alone.detach(), "stats": now.fields()} | {
        name: whole(gradient) for name, gradient in zip(("hidden", "weight", "bias"), gradients, strict=True)
    }


def vocabulary(directory):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {f"{dtype}-{impl}": head_step(dtype, impl, mesh) for dtype, impl in VOCABULARY_CASES}
    torch.save(found, directory / f"vocabulary-{dist.get_rank()}.pt")


# Attention whose keys are spread over the ranks


def attention_inputs():
    """(q, k, keyword arguments of prompt_attention_mass) of packed and of padded rows, float64."""
    generator = torch.Generator().manual_seed(9)
    B, Hq, Hk, S, d = 2, 4, 2, 24, 8
    q, k = (torch.randn(B, h, S, d, generator=generator, dtype=torch.float64) for h in (Hq, Hk))
    position = torch.arange(S).expand(B, S)
    masks = {
        "prompt_mask": torch.rand(B, S, generator=generator) < 0.4,
        "key_mask": torch.stack([position[0] >= 0, position[0] >= 3]),  # the second row is padded on the left
        "segment_ids": torch.stack([(position[0] >= 11).long(), 0 * position[0]]),
        "turn_ids": position // 5,
    }
    masks["query_mask"] = ~masks["prompt_mask"]
    return q, k, masks | {"window": 9, "softcap": 2.0, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])}


CUTS = {"contiguous": [[0, 1], [2, 3]], "zigzag": [[0, 3], [1, 2]]}  # quarters of the sequence by rank


def tokens_of(rank, cut):
    return torch.cat([torch.arange(6) + 6 * quarter for quarter in CUTS[cut][rank]])


def context(directory):
    """Each rank's part of the mass, put back in place."""
    q, k, options = attention_inputs()
    names = {"segment_ids": "documents", "turn_ids": "turns"}
    found = {}
    for cut in CUTS:
        mine = tokens_of(dist.get_rank(), cut)
        shard = {
            names.get(name, name): value[:, mine] if name.endswith(("mask", "ids")) else value
            for name, value in options.items()
        }
        found[cut] = torch.zeros(q.shape[0], q.shape[2], dtype=q.dtype)
        found[cut][:, mine] = context_parallel_prompt_mass(q[:, :, mine], k[:, :, mine], positions=mine, **shard)
    torch.save(found, directory / f"context-{dist.get_rank()}.pt")
