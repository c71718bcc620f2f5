"""What is true by definition, in float64 or by eager code of another type, and the error that is allowed."""

from __future__ import annotations

import itertools

import torch

FIELDS = ("lse", "target_logit", "nll", "entropy", "logp_var", "top1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(N=37, V=2300, D=40, dtype=torch.float32, spread=1.0):
    """hidden, weight, labels, bias; every fifth row ignored. 2,300 columns are two blocks, the second one ragged."""
    hidden = torch.randn(N, D) * spread
    weight, bias = torch.randn(V, D) / D**0.5 * 3, torch.randn(V)
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    return hidden.to(dtype), weight.to(dtype), labels, bias.to(dtype)


def truth(hidden, weight, labels, bias=None, softcap=None, logit_scale=1.0, dtype=torch.float64):
    """The definitions, row by row of [N, V] logits in `dtype`; None where the row is ignored."""
    return truth_of_logits(head_of(hidden, weight, bias, softcap, logit_scale, dtype), labels)


def head_of(hidden, weight, bias=None, softcap=None, logit_scale=1.0, dtype=torch.float64):
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def truth_of_logits(z, labels):
    lse = (z - z.amax(-1, keepdim=True)).exp().sum(-1).log() + z.amax(-1)
    log_p = z - lse[:, None]
    p = log_p.exp()
    target = z.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    entropy = -(p * log_p).sum(-1)
    return {
        "lse": lse,
        "target_logit": target,
        "nll": lse - target,
        "entropy": entropy,
        "logp_var": (p * (log_p + entropy[:, None]) ** 2).sum(-1),
        "top1": z.amax(-1),
        "renyi2": -(p**2).sum(-1).log(),
        "logit_sum": z.sum(-1),
        "rank": (z > target[:, None]).sum(-1).to(z.dtype),
    }


def next_token_nll(logits, ids):
    """-log p of each token but the first, in the type of the logits. logits (..., S, V), ids (..., S); (..., S - 1).

    A negative id gives the nll of token 0, as a label that nobody looks at.
    """
    z = logits[..., :-1, :]
    return z.logsumexp(-1) - z.gather(-1, ids[..., 1:, None].clamp(min=0))[..., 0]


def visible(prompt, key_mask=None, segment_ids=None, window=None):
    """[B, S, S] by the definition: not later, same document, not padding, among the last `window`."""
    B, S = prompt.shape
    keys, segments = (None if mask is None else mask.tolist() for mask in (key_mask, segment_ids))
    see = torch.zeros(B, S, S, dtype=torch.bool)
    for b, i, j in itertools.product(range(B), range(S), range(S)):
        see[b, i, j] = (
            j <= i
            and (window is None or i - j < window)
            and (segments is None or segments[b][i] == segments[b][j])
            and (keys is None or keys[b][j])
        )
    return see.to(prompt.device)


def attention_scores(q, k, scale=None, softcap=None, dtype=torch.float64):
    """[B, Hq, S, S], of all keys."""
    z = q.to(dtype) @ k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    z = z * (scale or q.shape[-1] ** -0.5)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def attention_lse(q, k, prompt, *, key_mask=None, segment_ids=None, window=None, scale=None, softcap=None, **_):
    """log Σ exp of the scores of visible keys, without a sink. [B, Hq, S] float64."""
    see = visible(prompt, key_mask, segment_ids, window)
    return attention_scores(q, k, scale, softcap).masked_fill(~see[:, None], -torch.inf).logsumexp(-1)


def assert_within_budget(stats, exact, eager, labels, fields=FIELDS):
    """No further from float64 than twice what the eager computation is, plus rounding of the result itself.

    Moments are joined through the lse of each shard, a float32 number: its rounding counts too.
    """
    valid = labels != -100
    for name in fields:
        error = (getattr(stats, name)[valid].double() - exact[name][valid]).abs().max()
        allowed = 2 * (eager[name][valid].double() - exact[name][valid]).abs().max()
        scale = exact[name][valid].abs().max().clamp(min=1)
        lse = exact["lse"][valid].abs().max() if name in ("entropy", "logp_var") else 0
        allowed += torch.finfo(torch.float32).eps * scale * (4 + lse)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


OPTIONS = [
    {},
    {"bias": True},
    {"softcap": 5.0},
    {"logit_scale": 0.25},
    {"bias": True, "softcap": 30.0, "logit_scale": 1.7},
]
