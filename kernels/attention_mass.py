"""q, k -> each query's attention mass on prompt keys, without an [S, S] matrix.

mass_i = mean over heads of Σ_prompt exp(z_ij) / Σ_visible exp(z_ij). One sweep over the visible keys keeps two running
sums under one maximum: 2 Hq d operations a visible pair, half of an attention forward. With the log-sum-exp that
FlashAttention returned, only prompt columns are computed. Query heads of one key head share the key tile.

What a query sees is three numbers: keys from `low` (its document and window begin there) to itself; keys that count as
prompt end before `prompt_end` (its own turn begins there).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.primitives import multiply, tanh
from tokensel_kernels.tiles import attention_tile

VISIBLE, PROMPT = 1, 2  # bits of a key's flags


@triton.jit
def _attention_mass_kernel(
    q_ptr, k_ptr, flags_ptr, query_ptr, low_ptr, prompt_end_ptr, lse_ptr, sinks_ptr, mass_ptr,  # pointers
    S, heads,  # shapes
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,  # strides
    scale, softcap, HAS_LSE: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,  # constants
):  # fmt: skip
    """One key head, ROWS queries of all its GROUP query heads: the mass, summed over them -> mass_ptr[b, head, row].

    Row r of the score tile is query r // GROUP_PADDED of head r % GROUP_PADDED.
    """
    first = tl.program_id(0) * ROWS
    key_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    queries = first + tl.arange(0, ROWS)
    asked = tl.load(query_ptr + batch * S + queries, mask=queries < S, other=0) != 0
    if tl.sum(asked.to(tl.int32)) == 0:  # a tile of prompt or padding costs nothing
        return

    r = tl.arange(0, ROWS * GROUP_PADDED)
    i = first + r // GROUP_PADDED
    member = r % GROUP_PADDED
    head = key_head * GROUP + member
    real = (i < S) & (member < GROUP)
    d = tl.arange(0, D_PADDED)
    q_at = batch * q_stride_b + head[:, None].to(tl.int64) * q_stride_h + i[:, None].to(tl.int64) * q_stride_s
    q = tl.load(q_ptr + q_at + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    row_asked = tl.load(query_ptr + batch * S + i, mask=i < S, other=0) != 0
    low = tl.load(low_ptr + batch * S + i, mask=i < S, other=0)
    prompt_end = tl.load(prompt_end_ptr + batch * S + i, mask=i < S, other=0)

    top = tl.full([ROWS * GROUP_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([ROWS * GROUP_PADDED], tl.float32)
    prompt = tl.zeros([ROWS * GROUP_PADDED], tl.float32)
    if HAS_LSE:  # the denominator is known, so its logarithm is the pivot
        top = tl.load(lse_ptr + (batch * heads + head) * S + i, mask=real, other=0.0).to(tl.float32)
    begin = tl.min(tl.where((i < S) & row_asked, low, S)) // KEYS * KEYS
    end = min(first + ROWS, S)
    for key in range(begin, end, KEYS):
        j = key + tl.arange(0, KEYS)
        flags = tl.load(flags_ptr + batch * S + j, mask=j < S, other=0)
        wanted = flags == 3 if HAS_LSE else flags > 0
        if tl.sum(wanted.to(tl.int32)) > 0:
            k_at = batch * k_stride_b + key_head.to(tl.int64) * k_stride_h + j[:, None].to(tl.int64) * k_stride_s
            k = tl.load(k_ptr + k_at + d[None, :], mask=wanted[:, None] & (d < D)[None, :], other=0.0)
            z = multiply(q, k.T, tl.zeros([ROWS * GROUP_PADDED, KEYS], tl.float32), PRECISION) * scale
            if HAS_SOFTCAP:
                z = softcap * tanh(z / softcap)
            sees = (j[None, :] >= low[:, None]) & (j[None, :] <= i[:, None]) & (flags > 0)[None, :]
            counts = sees & (flags == 3)[None, :] & (j[None, :] < prompt_end[:, None])
            if HAS_LSE:
                prompt += tl.sum(tl.where(counts, tl.exp(z - top[:, None]), 0.0), 1)
            else:
                z = tl.where(sees, z, -float("inf"))
                new_top = tl.maximum(top, tl.max(z, 1))
                pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
                shift = tl.where(top == -float("inf"), 0.0, top - pivot)
                rescale = tl.where(top == -float("inf"), 0.0, tl.exp(shift))
                u = z - pivot[:, None]
                e = tl.exp(u)
                total = total * rescale + tl.sum(e, 1)
                prompt = prompt * rescale + tl.sum(tl.where(counts, e, 0.0), 1)
                top = new_top
    if HAS_LSE:
        total = tl.full([ROWS * GROUP_PADDED], 1.0, tl.float32)
    if HAS_SINKS:  # a sink only adds to the denominator
        sink = tl.load(sinks_ptr + head, mask=member < GROUP, other=-float("inf")).to(tl.float32)
        pivot = tl.where(top == -float("inf"), 0.0, top)
        total += tl.exp(sink - pivot)
    mass = tl.where(real & (total > 0), prompt / tl.where(total > 0, total, 1.0), 0.0)
    summed = tl.sum(tl.reshape(mass, [ROWS, GROUP_PADDED]), 1)
    at = (batch * tl.num_programs(1) + key_head) * S + queries
    tl.store(mass_ptr + at, summed, mask=asked & (queries < S))


def attention_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    low: Tensor,
    prompt_end: Tensor,
    *,
    lse: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Mean over heads of the attention probability on prompt keys.

    Args:
        q: [B, Hq, S, d], k: [B, Hk, S, d], float16, bfloat16 or float32; the last dimension contiguous.
        prompt_mask, query_mask, key_mask: [B, S] bool.
        low: [B, S], first position that a query sees. prompt_end: [B, S], where its keys cease to count as prompt.
        lse: [B, Hq, S] or None. sinks: [Hq] or None.
    Returns:
        [B, S] float32; 0 on rows that are not asked for.
    """
    B, Hq, S, d = q.shape
    Hk = k.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    flags = key_mask.to(torch.int8) * VISIBLE + (key_mask & prompt_mask).to(torch.int8) * PROMPT
    low, prompt_end = low.to(torch.int32).contiguous(), prompt_end.to(torch.int32).contiguous()
    sums = torch.zeros(B, Hk, S, dtype=torch.float32, device=q.device)
    group = Hq // Hk
    padded = triton.next_power_of_2(group)
    rows, constants = attention_tile(q, padded)
    _attention_mass_kernel[(triton.cdiv(S, rows), Hk, B)](
        q, k, flags.contiguous(), query_mask.to(torch.int8).contiguous(), low, prompt_end,
        None if lse is None else lse.contiguous(), None if sinks is None else sinks.contiguous(), sums,
        S, Hq,
        *q.stride()[:3], *k.stride()[:3],
        scale, softcap or 1.0, HAS_LSE=lse is not None, HAS_SINKS=sinks is not None, HAS_SOFTCAP=softcap is not None,
        GROUP=group, GROUP_PADDED=padded, D=d, D_PADDED=max(16, triton.next_power_of_2(d)),
        ROWS=rows, **constants,
    )  # fmt: skip
    return sums.sum(1) / Hq
