"""How much a token attends to the prompt (step 4): attention mass of one layer, without an [S, S] matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensel.ops import reference
from tokensel.ops.checks import check_positive, check_same_device, check_shape, check_tensor, resolve_impl

# A block of scores is [group · rows, keys] float32 of one key head; 2 MiB stay near the cache.
_BLOCK_ELEMENTS = 2 * 2**20 // 4
HEAD_WEIGHTS = ("mean", "entropy")
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
    head_weights: str = "mean",
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
        head_weights: "mean", every head counts the same, or "entropy": at each query, head h counts
            w_h = 1 - H_h / log n, where n is the number of visible keys and H_h the entropy (nats) of the head's
            softmax over them, without its sink. A head that looks at one key counts 1, one that looks at all alike 0;
            where all count 0, or one key is visible, it is the plain mean. Needs all visible keys, so no `lse`.
    Returns:
        [B, S] float32 (float64 for float64 inputs) in [0, 1]; 0 on rows that are not asked for or see no key.
    Raises:
        TypeError, ValueError: the argument, what was expected and what was found.
    """
    check_tensor("q", q, floating=True)
    check_tensor("k", k, floating=True)
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, Hq, S, d]; got {list(q.shape)}")
    B, Hq, S, d = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (B, S, d):
        raise ValueError(f"k must have shape [B, Hk, S, d] = [{B}, Hk, {S}, {d}]; got {list(k.shape)}")
    if Hq % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which does not divide the {Hq} heads of q")
    if q.dtype != k.dtype:
        raise TypeError(f"q is {q.dtype} but k is {k.dtype}; cast one of them")
    for name, mask in (("prompt_mask", prompt_mask), ("query_mask", query_mask), ("key_mask", key_mask)):
        if mask is not None:
            check_shape(name, check_tensor(name, mask), (B, S), "[B, S]")
            if mask.dtype != torch.bool:
                raise TypeError(f"{name} must be torch.bool; got {mask.dtype}; convert with .bool()")
    for name, ids in (("segment_ids", segment_ids), ("turn_ids", turn_ids)):
        if ids is not None:
            check_shape(name, check_tensor(name, ids), (B, S), "[B, S]")
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise TypeError(f"{name} must have an integer dtype; got {ids.dtype}")
    if lse is not None:
        check_shape("lse", check_tensor("lse", lse, floating=True), (B, Hq, S), "[B, Hq, S]")
    if sinks is not None:
        check_shape("sinks", check_tensor("sinks", sinks, floating=True), (Hq,), "[Hq]")
    if head_weights not in HEAD_WEIGHTS:
        raise ValueError(f"head_weights must be one of {', '.join(HEAD_WEIGHTS)}; got {head_weights!r}")
    if lse is not None and head_weights == "entropy":
        raise ValueError("head_weights='entropy' needs the scores of all visible keys; leave lse out")
    check_positive("softcap", softcap)
    check_positive("window", window)
    masks = {"prompt_mask": prompt_mask, "query_mask": query_mask, "key_mask": key_mask}
    check_same_device(q=q, k=k, **masks, segment_ids=segment_ids, turn_ids=turn_ids, lse=lse, sinks=sinks)

    impl = resolve_impl(impl, q)
    if impl == "fused" and d > FUSED_HEAD_SIZE:
        raise ValueError(
            f"impl='fused' takes head sizes up to {FUSED_HEAD_SIZE} (64, 96, 128, 192 and 256 are compiled for every "
            f"chip); q has {d}; use impl='chunked'"
        )
    scale = d**-0.5 if scale is None else scale
    position = torch.arange(S, device=q.device).expand(B, S)
    # where the run of equal ids begins: from here on, equal numbers mean the same document (or turn)
    segment_ids = None if segment_ids is None else _run_start(segment_ids, position)
    turn_ids = None if turn_ids is None else _run_start(turn_ids, position)
    key_mask = torch.ones_like(prompt_mask) if key_mask is None else key_mask
    query_mask = ~prompt_mask & key_mask if query_mask is None else query_mask & key_mask
    # torch.compile sees one operator; eager code needs none, and can be looked into
    compute = torch.ops.tokensel.prompt_mass if torch.compiler.is_compiling() else _compute_mass
    masks = (prompt_mask, query_mask, key_mask, segment_ids, turn_ids)
    with torch.autocast(q.device.type, enabled=False):  # or it would round what is float32 on purpose
        return compute(q, k, *masks, lse, float(scale), softcap, window, sinks, head_weights, impl)


def _compute_mass(
    q: Tensor,
    k: Tensor,
    prompt_mask: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    segment_ids: Tensor | None,
    turn_ids: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    head_weights: str,
    impl: str,
) -> Tensor:
    """The mass of checked arguments; ids are the positions where their runs begin."""
    B, _, S, _ = q.shape
    if impl == "reference":
        masks = (prompt_mask, query_mask, key_mask, segment_ids, turn_ids)
        return reference.prompt_mass(q, k, *masks, scale, softcap, window, sinks, head_weights)
    if impl == "fused":
        from tokensel_kernels.attention_mass import attention_mass

        position = torch.arange(S, device=q.device).expand(B, S)
        low = torch.zeros_like(position) if segment_ids is None else segment_ids
        low = low if window is None else torch.maximum(low, position - window + 1)
        prompt_end = torch.full_like(position, S) if turn_ids is None else turn_ids
        masks = (prompt_mask, query_mask, key_mask, low, prompt_end)
        options = {"scale": scale, "softcap": softcap, "sinks": sinks, "by_entropy": head_weights == "entropy"}
        return attention_mass(q, k, *masks, lse=lse, **options)
    mass = torch.zeros(B, S, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for b in range(B):
        pick = [None if t is None else t[b] for t in (segment_ids, turn_ids, lse)]
        mass[b] = _chunked_row(
            q[b], k[b], prompt_mask[b], query_mask[b], key_mask[b], *pick, scale, softcap, window, sinks, head_weights
        )
    return mass


_mass_operator = torch.library.custom_op(
    "tokensel::prompt_mass",
    _compute_mass,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor prompt_mask, Tensor query_mask, Tensor key_mask, Tensor? segment_ids, "
    "Tensor? turn_ids, Tensor? lse, float scale, float? softcap, int? window, Tensor? sinks, str head_weights, "
    "str impl) -> Tensor",
)


@_mass_operator.register_fake
def _(q, k, prompt_mask, *_):
    return torch.empty(prompt_mask.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _chunked_row(
    q, k, prompt, queries, keys, segments, turns, lse, scale, softcap, window, sinks, head_weights
) -> Tensor:
    """Mass of one sequence. q (Hq, S, d), k (Hk, S, d); masks and ids (S,); lse (Hq, S) or None -> (S,)."""
    Hq, S, d = q.shape
    Hk = k.shape[0]
    G = Hq // Hk
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.zeros(S, dtype=dtype, device=q.device)
    weighted, weights = torch.zeros_like(mass), torch.zeros_like(mass)  # of "entropy"
    rows = queries.nonzero()[:, 0]
    # With the denominator given, only prompt columns matter; without it, every valid key does.
    columns = ((keys & prompt) if lse is not None else keys).nonzero()[:, 0]
    if len(rows) == 0 or len(columns) == 0:
        return mass
    R = max(1, _BLOCK_ELEMENTS // (G * len(columns)))
    for head in range(Hk):
        k_head = k[head, columns].to(dtype)  # (C, d)
        heads = slice(head * G, (head + 1) * G)
        for i in rows.split(R):
            # causality: no column after the chunk's last row can be seen
            last = int(torch.searchsorted(columns, i[-1], right=True))
            if last == 0:
                continue
            j = columns[:last]  # (C,)
            visible = j[None, :] <= i[:, None]  # (R, C)
            if window is not None:
                visible &= i[:, None] - j[None, :] < window
            if segments is not None:
                visible &= segments[i][:, None] == segments[j][None, :]
            rows_q = q[heads, i].to(dtype).reshape(-1, d) * scale
            z = (rows_q @ k_head[:last].T).view(G, len(i), last)  # (G, R, C)
            if softcap is not None:
                z.div_(softcap).tanh_().mul_(softcap)
            if lse is None:
                z.masked_fill_(~visible, -torch.inf)
                log_all = z.logsumexp(-1) if head_weights == "entropy" or sinks is not None else None  # (G, R)
            else:
                log_all = lse[heads, i].to(dtype)
            if head_weights == "entropy":
                log_p = torch.where(visible & log_all.isfinite()[..., None], z - log_all[..., None], 0)
                entropy = -(log_p.exp() * log_p).sum(-1)  # (G, R); a key that is not seen adds exp(0) · 0
                count = visible.sum(-1).to(dtype)  # (R,)
                weight = torch.where(count > 1, 1 - entropy / count.clamp(min=2).log(), 0).clamp_(min=0)
            if log_all is None:  # PyTorch's softmax goes over a row while it is in the nearest cache
                p = torch.softmax(z, -1, out=z).masked_fill_(~visible, 0)  # a row that sees nothing has no mass
            else:
                log_all = log_all if sinks is None else torch.logaddexp(log_all, sinks[heads].to(dtype)[:, None])
                log_all = torch.where(log_all.isfinite(), log_all, torch.inf)
                p = z.masked_fill_(~visible, -torch.inf).sub_(log_all[..., None]).exp_()
            if turns is None:
                head_mass = p @ prompt[j].to(dtype)  # (G, R)
            else:
                other_turn = prompt[j] & (turns[i][:, None] != turns[j][None, :])
                head_mass = p.mul_(other_turn).sum(-1)
            mass[i] += head_mass.sum(0) / Hq
            if head_weights == "entropy":
                weighted[i] += (weight * head_mass).sum(0)
                weights[i] += weight.sum(0)
    return torch.where(weights > 0, weighted / weights, mass)


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
        first = _run_start(segment_ids, position)
    if window is not None:
        first = torch.maximum(first, position - window + 1)
    prompt = prompt_mask & key_mask
    visible_prompt, visible = visible_count(prompt), visible_count(key_mask)
    if turn_ids is not None:
        first = torch.maximum(first, _run_start(turn_ids, position))
        visible_prompt = visible_prompt - visible_count(prompt)
    return torch.where(visible > 0, visible_prompt / visible.clamp(min=1), 0).float()


def _run_start(ids: Tensor, position: Tensor) -> Tensor:
    """Position where the run of equal ids that holds each entry begins: [B, S] -> [B, S]."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return torch.where(starts, position, 0).cummax(-1).values
