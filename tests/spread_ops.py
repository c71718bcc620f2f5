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
    now, then = tokensel.token_stats_pair(
        *models, labels, entropy=True, renyi2=True, logit_sum=True, rank=True, **options
    )
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


DIVERGENCES = [{"kind": kind} for kind in ("forward_kl", "reverse_kl", "jsd", "tv")]
RECORDED = [{}, {"kind": "reverse_kl"}, {"add_tail": False}]


def logprobs_step(dtype, mesh=None):
    """Log-probabilities of several tokens a row, divergences, and the gradients of them all, whole tensors."""
    hidden, other, weight, bias, labels = head_inputs(getattr(torch, dtype))
    local, ids = (
        hidden.requires_grad_(),
        torch.stack([labels.clamp(min=0), torch.arange(60), torch.arange(60) + 273], 1),
    )
    mask, other_weight = labels != -100, weight.flip(0)
    if mesh is not None:
        hidden, other = (DTensor.from_local(t, mesh, [Replicate()]) for t in (hidden, other))
        weight, bias, other_weight = (distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias, other_weight))
    leaves = local, weight.requires_grad_(), bias.requires_grad_()
    student, teacher, head = (hidden, weight), (other, other_weight), HEAD_OPTIONS | {"temperature": 1.3}
    top = {k: tokensel.top_logprobs(*teacher, k, mask=mask, **head) for k in (5, 200)}  # 200: more than a rank's rows
    far = {f"top {k}": found.logp for k, found in top.items()} | {f"ids {k}": found.ids for k, found in top.items()}
    values = {"at ids": tokensel.logprobs_at(*student, ids, mask=mask, bias=bias, **head)}
    stats = tokensel.token_stats(*student, labels, bias=bias, **head), tokensel.token_stats(*teacher, labels, **head)
    for of, calls in ((teacher, DIVERGENCES), (teacher, [{"kind": "jsd", "stats": stats}]), (top[5], RECORDED)):
        for options in calls:
            name = f"{len(values)} {options.get('kind')}"
            values[name] = tokensel.token_divergence(student, of, mask, bias=bias, **head, **options)
    weights = torch.linspace(-1, 2, 60, dtype=torch.float64)  # not all alike, and some negative
    loss = sum((weights * value.double().reshape(60, -1).sum(1)).sum() for value in values.values())
    gradients = zip(("hidden", "weight", "bias"), torch.autograd.grad(loss, leaves), strict=True)
    return far | {n: v.detach() for n, v in values.items()} | {name: whole(gradient) for name, gradient in gradients}


def logprobs(directory):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {dtype: logprobs_step(dtype, mesh) for dtype in ("float64", "float32")}
    torch.save(found, directory / f"logprobs-{dist.get_rank()}.pt")


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
