"""Attention mass on the prompt (step 4) of packed documents, in the layout of FlashAttention's varlen functions."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensel.ops.checks import check_same_device, check_tensor, may_read_values
from tokensel.ops.prompt_mass import check_mass_options, compute_mass, run_start


@torch.no_grad()
def prompt_attention_mass_varlen(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    query_mask: Tensor | None = None,
    turn_ids: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`prompt_attention_mass` of documents that lie one after the other, T tokens in all; nothing is padded or copied.

    Source: ssToken, arXiv 2510.18250; the layout is that of `flash_attn_varlen_func`.

    Args:
        q: [T, Hq, d] queries, k: [T, Hk, d] keys, after rotary embedding; Hk divides Hq; any strides.
        prompt_mask: [T] bool, keys that count as prompt.
        cu_seqlens: [n + 1] int32 or int64, where each document begins, and T; attention does not cross these borders.
        query_mask: [T] bool, rows to compute; None means every row that is not a prompt key.
        turn_ids: [T] integer; a key of the query's own turn never counts as prompt (it stays visible).
        lse: [Hq, T] float32, as FlashAttention's varlen functions return it: natural log-sum-exp of the scaled scores
            over the visible keys, without sinks. Given, only query rows × prompt columns are computed.
        scale, softcap, window, sinks, impl: as in `prompt_attention_mass`.
    Returns:
        [T] float32 (float64 for float64 inputs) in [0, 1]; 0 on rows that are not asked for.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given.
    """
    check_tensor("q", q, floating=True)
    check_tensor("k", k, floating=True)
    if q.dim() != 3:
        raise ValueError(f"q must have shape [T, Hq, d]; got {list(q.shape)}; of [B, Hq, S, d]: prompt_attention_mass")
    T, Hq, d = q.shape
    if k.dim() != 3 or (k.shape[0], k.shape[2]) != (T, d):
        raise ValueError(f"k must have shape [T, Hk, d] = [{T}, Hk, {d}]; got {list(k.shape)}")
    impl = check_mass_options(
        q,
        k,
        {"prompt_mask": prompt_mask, "query_mask": query_mask},
        {"turn_ids": turn_ids},
        ((T,), "[T]"),
        (lse, (Hq, T), "[Hq, T]"),
        (sinks, (Hq,), "[Hq]"),
        scale,
        softcap,
        window,
        impl,
    )
    _check_borders(cu_seqlens, T)
    check_same_device(q=q, cu_seqlens=cu_seqlens)

    position = torch.arange(T, device=q.device)
    document = torch.searchsorted(cu_seqlens, position, right=True) - 1
    # borders that nothing could check must not lead outside of memory
    start = torch.minimum(cu_seqlens.long()[document.clamp(min=0)].clamp(min=0), position)
    turn = None if turn_ids is None else run_start(turn_ids[None], position[None])
    query_mask = ~prompt_mask if query_mask is None else query_mask
    asked = query_mask[None]
    documents = (start[None], turn)
    log_all = None if lse is None else lse[None]
    heads = (q.transpose(0, 1)[None], k.transpose(0, 1)[None])  # views [1, H, T, d]
    scale = d**-0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):  # or it would round what is float32 on purpose
        return compute_mass(
            *heads, prompt_mask[None], asked, None, *documents, log_all, scale, softcap, window, sinks, impl
        )[0]


def _check_borders(cu_seqlens: Tensor, tokens: int) -> None:
    """Borders from 0 to the number of tokens that never fall, by their values where these may be read."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be torch.int32 or torch.int64; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must have shape [n + 1]: the first token of each of n documents, and the number of tokens; "
            f"got {list(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    if not may_read_values(cu_seqlens):
        whole = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(whole, "cu_seqlens: not from 0 to T without falling; TOKENSEL_CHECK=1 names it")
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must go from 0 to {tokens}, the number of tokens of q; got {values[0]} to {values[-1]}; "
            "if documents are lengths, take their cumulative sum with a 0 before it"
        )
    for n, (before, after) in enumerate(zip(values, values[1:], strict=False)):
        if after < before:
            raise ValueError(f"cu_seqlens must never fall; got {before} and then {after} at entry {n + 1}")
