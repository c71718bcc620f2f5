"""Inputs of the kernels' tests, their float64 truth and the error allowed."""

from __future__ import annotations

import torch
from oracles import head_of

from tokensel import selected_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(N=37, V=150, D=40, dtype=torch.float32):
    """hidden, weight, labels, bias; every fifth row ignored, and a whole tile of rows."""
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    labels[16:32] = -100
    tensors = (torch.randn(N, D), torch.randn(V, D) / D**0.5 * 3, labels, torch.randn(V))
    return [t.to(DEVICE, dtype if t.is_floating_point() else None) for t in tensors]


def widened_product(a, b, out):
    return out.copy_(a.float() @ b.float())


def gradients(inputs, labels, keep, impl, **options):
    hidden, weight, bias = (t.detach().clone().requires_grad_() for t in inputs)
    loss = selected_cross_entropy(hidden, weight, labels, keep, bias=bias, impl=impl, **options)
    (loss * -1.7).backward()
    return [loss.detach(), hidden.grad, weight.grad, bias.grad]


def summed_magnitude(name, inputs, labels, keep, exact, softcap=None, logit_scale=1.0):
    """Largest Σ |dz| |factor|, what half a unit of rounding of each dz can at most make of the result."""
    hidden, weight, bias = (t.double() for t in inputs)
    z = head_of(hidden, weight, bias, softcap, logit_scale)
    slope = 1.0 if softcap is None else 1 - (z / softcap) ** 2
    w = torch.where(labels != -100, keep.double(), 0)
    onehot = torch.zeros_like(z).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    dz = ((z.softmax(-1) - onehot) * (w / w.abs().sum() * 1.7 * logit_scale)[:, None] * slope).abs()
    product = {"hidden": lambda: dz @ weight.abs(), "weight": lambda: dz.T @ hidden.abs(), "bias": lambda: dz.sum(0)}
    return product[name]().max()


def attention_inputs(names, dtype, d=24, Hq=6, Hk=2, S=41, B=2):
    q, k = (torch.randn(B, H, S, d, device=DEVICE).to(dtype) * 2 for H in (Hq, Hk))
    position = torch.arange(S, device=DEVICE).expand(B, S)
    prompt = (position % 17) < 8
    options = {
        "key_mask": torch.stack([position[0] >= 5, position[1] < 35]),
        "segment_ids": torch.stack([(position[0] >= 20).long(), (position[1] >= 9).long() + (position[1] >= 30)]),
        "turn_ids": torch.diff(prompt.long(), prepend=prompt[:, :1].long()).abs().cumsum(-1),
        "query_mask": torch.rand(B, S, device=DEVICE) < 0.7,
        "window": 12,
        "softcap": 3.0,
        "scale": 0.4,
        "sinks": torch.randn(Hq, device=DEVICE) * 2,
    }
    return q, k, prompt, {name: options[name] for name in names}


NAMES = ("key_mask", "segment_ids", "turn_ids", "query_mask", "window", "softcap", "scale", "sinks")
