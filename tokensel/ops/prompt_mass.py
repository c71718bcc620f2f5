"""How much a token attends to the prompt (step 4): attention mass of one layer, without an [S, S] matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokensel.ops import reference
from tokensel.ops.checks import check_number, check_positive, check_same_device, check_shape, check_tensor, resolve_impl
from tokensel.ops.operators import custom_operator
from tokensel.ops.score_blocks import score_blocks

FUSED_HEAD_SIZE = 256  # the largest that the kernels are compiled and tested for


@torch.no_grad()
def prompt_attention_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    turn_ids: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mean over heads of the causal attention probability that each query puts on prompt keys.

    mass_i = mean over h of exp(lse over visible prompt keys - lse over all visible keys). Exact; O(S) memory.
    Source: ssToken, arXiv 2510.18250.

    Args:
        q: [B, Hq, S, d] queries, k: [B, Hk, S, d] keys, after rotary embedding; Hk divides Hq; any strides.
        prompt_mask: [B, S] bool, keys that count as prompt.
        query_mask: [B, S] bool, rows to compute; None means every valid row that is not a prompt key.
        key_mask: [B, S] bool, False on padding (either side); None means no padding.
        segment_ids: [B, S] integer packing boundaries; attention does not cross a change of them.
        turn_ids: [B, S] integer; a key of the query's own turn never counts as prompt (it stays visible).
        lse: [B, Hq, S] float32, natural log-sum-exp of the scaled scores over the visible keys, without sinks, as
            FlashAttention returns it. Given, only query rows × prompt columns are computed.
        scale: of the scores; None means 1/sqrt(d).
        softcap: scores become softcap · tanh(score / softcap).
        window: a query sees the last `window` keys, itself included; None means all.
        sinks: [Hq] logits that add to every row's denominator only.
    Returns:
        [B, S] float32 (float64 for float64 inputs) in [0, 1]; 0 on rows that are not asked for or see no key.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given.
    """
    check_tensor("q", q, floating=True)
    check_tensor("k", k, floating=True)
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, Hq, S, d]; got {list(q.shape)}")
    B, Hq, S, d = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (B, S, d):
        raise ValueError(f"k must have shape [B, Hk, S, d] = [{B}, Hk, {S}, {d}]; got {list(k.shape)}")
    impl = check_mass_options(
        q,
        k,
        {"prompt_mask": prompt_mask, "query_mask": query_mask, "key_mask": key_mask},
        {"segment_ids": segment_ids, "turn_ids": turn_ids},
        ((B, S), "[B, S]"),
        (lse, (B, Hq, S), "[B, Hq, S]"),
        (sinks, (Hq,), "[Hq]"),
        scale,
        softcap,
        window,
        impl,
    )
    scale = d**-0.5 if scale is None else scale
    position = torch.arange(S, device=q.device).expand(B, S)
    segment_starts = None if segment_ids is None else run_start(segment_ids, position)
    turn_starts = None if turn_ids is None else run_start(turn_ids, position)
    query_mask = ~prompt_mask if query_mask is None else query_mask
    query_mask = query_mask if key_mask is None else query_mask & key_mask
    masks = (prompt_mask, query_mask, key_mask, segment_starts, turn_starts)
    with torch.autocast(q.device.type, enabled=False):  # or it would round what is float32 on purpose
        return compute_mass(q, k, *masks, lse, float(scale), softcap, window, sinks, impl)


def check_mass_options(
    q: Tensor,
    k: Tensor,
    masks: dict[str, Any],
    ids: dict[str, Tensor | None],
    tokens: tuple[tuple[int, ...], str],
    lse: tuple[Tensor | None, tuple[int, ...], str],
    sinks: tuple[Tensor | None, tuple[int, ...], str],
    scale: float | None,
    softcap: float | None,
    window: int | None,
    impl: str,
) -> str:
    """Checks what both layouts of q and k have in common, by shapes and their names; `impl` resolved."""
    heads, key_heads = sinks[1][0], k.shape[1]  # both layouts have heads second
    if scale is not None:
        check_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite; got {scale}")
    if not heads or not key_heads:
        raise ValueError(f"q and k must have heads; got {heads} and {key_heads}")
    if heads % key_heads:
        raise ValueError(f"k has {key_heads} heads, which does not divide the {heads} heads of q")
    if q.dtype != k.dtype:
        raise TypeError(f"q is {q.dtype} but k is {k.dtype}; cast one of them")
    for name, mask in masks.items():
        if mask is not None or name == "prompt_mask":
            check_shape(name, check_tensor(name, mask), *tokens)
            if mask.dtype != torch.bool:
                raise TypeError(f"{name} must be torch.bool; got {mask.dtype}; convert with .bool()")
    for name, numbers in ids.items():
        if numbers is not None:
            check_shape(name, check_tensor(name, numbers), *tokens)
            if numbers.is_floating_point() or numbers.dtype == torch.bool:
                raise TypeError(f"{name} must have an integer dtype; got {numbers.dtype}")
    for name, (value, shape, like) in {"lse": lse, "sinks": sinks}.items():
        if value is not None:
            check_shape(name, check_tensor(name, value, floating=True), shape, like)
    check_positive("softcap", softcap)
    check_positive("window", window)
    check_same_device(q=q, k=k, **masks, **ids, lse=lse[0], sinks=sinks[0])
    impl = resolve_impl(impl, q)
    if impl == "fused" and q.shape[-1] > FUSED_HEAD_SIZE:
        raise ValueError(
            f"impl='fused' takes head sizes up to {FUSED_HEAD_SIZE} (64, 96, 128, 192 and 256 are compiled for every "
            f"chip); q has {q.shape[-1]}; use impl='chunked'"
        )
    return impl


def _empty_mass(q: Tensor, k: Tensor, prompt_mask: Tensor, *_: object) -> Tensor:
    return torch.empty(prompt_mask.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


@custom_operator(
    "prompt_mass",
    "(Tensor q, Tensor k, Tensor prompt_mask, Tensor query_mask, Tensor? key_mask, Tensor? segment_starts, "
    "Tensor? turn_starts, Tensor? lse, float scale, float? softcap, int? window, Tensor? sinks, str impl) -> Tensor",
    fake=_empty_mass,
)
def compute_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    query_mask: Tensor,
    key_mask: Tensor | None,
    segment_starts: Tensor | None,
    turn_starts: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    impl: str,
) -> Tensor:
    """The mass of checked arguments; of documents and turns, ids are where each token's begins."""
    B, _, S, _ = q.shape
    if impl == "fused":
        from tokensel_kernels.attention_mass import attention_mass

        bounds = (prompt_mask, query_mask, key_mask, segment_starts, turn_starts)
        scores = {"scale": scale, "softcap": softcap, "window": window}
        fused: Tensor = attention_mass(q, k, *bounds, lse=lse, sinks=sinks, **scores)
        return fused
    present = torch.ones_like(prompt_mask) if key_mask is None else key_mask
    if impl == "reference":
        masks = (prompt_mask, query_mask, present, segment_starts, turn_starts)
        return reference.prompt_mass(q, k, *masks, scale, softcap, window, sinks)
    mass = torch.zeros(B, S, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for b in range(B):
        segments, turns, log_all = (None if t is None else t[b] for t in (segment_starts, turn_starts, lse))
        of_row = (prompt_mask[b], query_mask[b], present[b], segments, turns)
        mass[b] = _chunked_row(q[b], k[b], *of_row, log_all, scale, softcap, window, sinks)
    return mass


def _chunked_row(
    q: Tensor,
    k: Tensor,
    prompt: Tensor,
    queries: Tensor,
    keys: Tensor,
    segments: Tensor | None,
    turns: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Mass of one sequence. q (Hq, S, d), k (Hk, S, d); masks and ids (S,); lse (Hq, S) or None -> (S,)."""
    Hq, S, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.zeros(S, dtype=dtype, device=q.device)
    rows = queries.nonzero()[:, 0]
    # With the denominator given, only prompt columns matter; without it, every valid key does.
    columns = ((keys & prompt) if lse is not None else keys).nonzero()[:, 0]
    for heads, i, j, z in score_blocks(q, k, rows, columns, scale, softcap, in_order=True):
        visible = j[None, :] <= i[:, None]  # (R, C)
        if window is not None:
            visible &= i[:, None] - j[None, :] < window
        if segments is not None:
            visible &= segments[i][:, None] == segments[j][None, :]
        log_all: Tensor | None  # (G, R)
        if lse is not None:
            log_all = lse[heads, i].to(dtype)
        else:
            z.masked_fill_(~visible, -torch.inf)
            log_all = None if sinks is None else z.logsumexp(-1)
        if log_all is None:  # PyTorch's softmax goes over a row while it is in the nearest cache
            p = torch.softmax(z, -1, out=z).masked_fill_(~visible, 0)  # a row that sees nothing has no mass
        else:
            log_all = log_all if sinks is None else torch.logaddexp(log_all, sinks[heads].to(dtype)[:, None])
            log_all = torch.where(log_all.isfinite(), log_all, torch.inf)
            p = z.masked_fill_(~visible, -torch.inf).sub_(log_all[..., None]).exp_()
        if turns is None:
            head_mass = p @ prompt[j].to(dtype)  # (G, R)
        else:
            earlier_turn = prompt[j] & (turns[i][:, None] != turns[j][None, :])
            head_mass = p.mul_(earlier_turn).sum(-1)
        mass[i] += head_mass.sum(0) / Hq
    return mass


def uniform_prompt_mass(
    prompt_mask: Tensor,
    *,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    turn_ids: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The mass that a uniform attention would put on the prompt: visible prompt keys / visible keys.

    It is the position bias of the attention signal: P/(i+1) for a prompt of P tokens, whatever was learnt.

    Args:
        prompt_mask, key_mask, segment_ids, turn_ids, window: as in `prompt_attention_mass`.
    Returns:
        [B, S] float32; 0 where no key is visible.
    """
    check_positive("window", window)
    B, S = prompt_mask.shape
    key_mask = torch.ones_like(prompt_mask) if key_mask is None else key_mask

    def visible_count(keys: Tensor) -> Tensor:
        # float64 counts are exact, and a cumulative sum needs no [S, S] mask
        total = torch.cat([keys.new_zeros(B, 1, dtype=torch.float64), keys.double().cumsum(-1)], -1)  # (B, S + 1)
        return total[:, 1:] - total.gather(1, first)

    position = torch.arange(S, device=prompt_mask.device).expand(B, S)
    first = torch.zeros_like(position)
    if segment_ids is not None:
        first = run_start(segment_ids, position)
    if window is not None:
        first = torch.maximum(first, position - window + 1)
    prompt = prompt_mask & key_mask
    visible_prompt, visible = visible_count(prompt), visible_count(key_mask)
    if turn_ids is not None:
        first = torch.maximum(first, run_start(turn_ids, position))
        visible_prompt = visible_prompt - visible_count(prompt)
    return torch.where(visible > 0, visible_prompt / visible.clamp(min=1), 0).float()


def run_start(ids: Tensor, position: Tensor) -> Tensor:
    """Position where the run of equal ids that holds each entry begins: [B, S] -> [B, S]."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return torch.where(starts, position, 0).cummax(-1).values
