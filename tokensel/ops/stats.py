"""Token statistics without logits (step 4): negative log-likelihood of every row, and what else one pass can tell.

The chunked implementation walks over blocks of the vocabulary, whose products are float32 whatever the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensel.ops import reference
from tokensel.ops.checks import (
    check_head,
    check_labels,
    check_number,
    check_positive,
    check_same_device,
    check_same_vocabulary,
    check_tensor,
    resolve_impl,
)
from tokensel.ops.products import exact_products, on_gpu, product
from tokensel.parallel import VocabShard, local_head


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the next-token distribution of each row, over the vocabulary or over a shard of it.

    All fields have the shape of `labels` and are float32 (float64 for float64 inputs).

    Attributes:
        lse: log-sum-exp of the logits, nats. -inf where no vocabulary was seen (an ignored row).
        target_logit: logit of the label; -inf where the label is not in the shard, or the row is ignored.
        entropy: entropy of the softmax, nats, or None.
        logp_var: variance of log p under p, nats², or None.
        top1: the largest logit, or None.
    """

    lse: Tensor
    target_logit: Tensor
    entropy: Tensor | None = None
    logp_var: Tensor | None = None
    top1: Tensor | None = None

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the label, nats; 0 on ignored rows."""
        return torch.where(self.lse == self.target_logit, 0, self.lse - self.target_logit)

    @property
    def correct(self) -> Tensor | None:
        """Whether no logit is larger than the label's (bool), or None if `top1` was not asked for."""
        return None if self.top1 is None else (self.target_logit == self.top1) & self.lse.isfinite()

    @staticmethod
    def merge(parts: Sequence[TokenStats]) -> TokenStats:
        """Joins statistics of disjoint shards of the vocabulary; the order of `parts` does not matter but for rounding.

        With weights w_s = exp(lse_s - lse), means and variances of the logits join as
        mean = Σ w_s mean_s and var = Σ w_s (var_s + (mean_s - mean)²) (Chan et al., 1979).
        An ignored row is the identity.

        Raises:
            ValueError: no parts, or parts that hold different fields.
        """
        if not parts:
            raise ValueError("parts is empty; merge needs the statistics of at least one shard")
        if len({(p.entropy is None, p.logp_var is None, p.top1 is None) for p in parts}) > 1:
            raise ValueError("parts hold different fields; compute every shard with the same entropy= setting")
        shard_lse = torch.stack([p.lse for p in parts])  # (shards, ...)
        lse = torch.logsumexp(shard_lse, 0)
        target = torch.stack([p.target_logit for p in parts]).amax(0)
        if parts[0].entropy is None:
            return TokenStats(lse, target)
        finite_lse = torch.where(lse.isfinite(), lse, 0)
        share = torch.exp(shard_lse - finite_lse)
        # relative to the joint lse, so that nothing cancels when all logits are large
        shard_mean = torch.stack([p.lse - p.entropy for p in parts]) - finite_lse
        shard_mean = torch.where(share > 0, shard_mean, 0)
        mean = (share * shard_mean).sum(0)
        spread = torch.stack([p.logp_var for p in parts]) + (shard_mean - mean) ** 2
        return TokenStats(
            lse,
            target,
            entropy=torch.where(lse.isfinite(), -mean, 0),
            logp_var=(share * spread).sum(0),
            top1=torch.stack([p.top1 for p in parts]).amax(0),
        )


GPU_COLUMNS = 8192  # of a block on a GPU: its product runs at full speed, and the head is read once a block of rows


def vocabulary_blocks(
    rows: int, vocabulary: int, workspace_mib: float, columns: int = 2048, models: int = 1
) -> tuple[int, int]:
    """(rows, columns) of a float32 block of each model's logits that fits the workspace.

    2,048 columns keep a block of some thousand rows near the cache and its product at full speed (measured on two
    AMX cores, D = 1024: 313 GFLOP/s in float32 at 2,048 columns, 249 at 8,192).

    Raises:
        ValueError: a workspace that is too small for one row.
    """
    columns = min(vocabulary, columns)
    row_bytes = 4 * columns * models
    most_rows = int(workspace_mib * 2**20) // row_bytes
    if most_rows < 1:
        raise ValueError(
            f"workspace_mib={workspace_mib:g} holds no row of {models} x {columns} float32 logits; it needs at least "
            f"{math.ceil(row_bytes / 2**10) / 2**10:.4f}"
        )
    return min(max(rows, 1), most_rows), columns


def logits_block(
    x: Tensor, w: Tensor, b: Tensor | None, softcap: float | None, logit_scale: float, out: Tensor
) -> Tensor:
    """z of `reference.head_logits` for a block, written into `out`. x (R, D), w (C, D), out (R, C)."""
    torch.mm(x, w.T, out=out)
    if b is not None:
        out += b
    if logit_scale != 1.0:
        out *= logit_scale
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)
    return out


def widened(block: Tensor, wide: Tensor) -> Tensor:
    """A block of the head in the dtype of `wide`: itself, or copied there, so that no block is allocated anew."""
    return block if block.dtype == wide.dtype else wide[: len(block)].copy_(block)


# exp of less than this is denormal, which costs a CPU twenty times as long, and adds nothing to a sum that holds exp(0)
SMALLEST_EXPONENT = -80.0


_CACHE_BYTES = 2**22  # of logits at once, which are read several times


def block_stats(z: Tensor, labels: Tensor, moments: bool) -> TokenStats:
    """Statistics of a block of logits, which is overwritten. z (R, C); labels (R,) counted from the block's start."""
    inside = (labels >= 0) & (labels < z.shape[1])
    target = z.gather(1, torch.where(inside, labels, 0)[:, None])[:, 0]
    target = torch.where(inside, target, -torch.inf)
    top1 = z.amax(1)  # (R,)
    if not moments:
        # PyTorch's softmax goes over a row while it is in the nearest cache; its largest value is 1 / Σ exp(z - top1)
        largest = torch.softmax(z, 1, out=z).amax(1)
        return TokenStats(torch.where(top1.isfinite(), top1 - largest.log(), top1), target)
    pivot = torch.where(top1.isfinite(), top1, 0)
    z.sub_(pivot[:, None])
    z.clamp_(min=SMALLEST_EXPONENT)
    p = z.exp()
    total = p.sum(1)
    p /= total[:, None]
    mean = (p * z).sum(1)  # E[z] - pivot
    variance = p.mul_(z.sub_(mean[:, None]).square_()).sum(1)
    lse = torch.where(top1.isfinite(), pivot + total.log(), top1)
    return TokenStats(lse, target, entropy=total.log() - mean, logp_var=variance, top1=top1)


def _empty(labels: Tensor, dtype: torch.dtype, moments: bool) -> TokenStats:
    none = torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device)
    zero = torch.zeros_like(none)
    if not moments:
        return TokenStats(none, none.clone())
    return TokenStats(none, none.clone(), entropy=zero, logp_var=zero.clone(), top1=none.clone())


def _store(into: TokenStats, rows: Tensor, part: TokenStats) -> None:
    for name in ("lse", "target_logit", "entropy", "logp_var", "top1"):
        if getattr(into, name) is not None:
            getattr(into, name)[rows] = getattr(part, name)


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
    workspace_mib: float = 256,
) -> TokenStats:
    """Per-token statistics of `softmax(head(hidden))` at `labels`, without [N, V] logits and without gradient.

    Logits are `softcap · tanh(logit_scale · (hidden weightᵀ + bias) / softcap)`, softcap None = no cap.

    Args:
        hidden: [..., D] final hidden states, any strides; row i predicts `labels[i]`.
        weight: [V, D] language-model head, of hidden's dtype (float16, bfloat16, float32 or float64). A DTensor with
            Shard(0) is a head whose vocabulary is spread over ranks; `hidden` is then a replicated DTensor, and each
            rank gets the statistics over the whole vocabulary.
        labels: [...] int64; rows that equal `ignore_index` are not read.
        bias: [V].
        entropy: also `entropy`, `logp_var` and `top1`.
        impl: "auto", "chunked", "fused" or "reference" (see `tokensel.ops.checks.resolve_impl`).
        workspace_mib: most MiB that a block of logits may take (chunked).
    Returns:
        TokenStats with fields of shape [...].
    Raises:
        TypeError, ValueError: the argument, what was expected and what was found. A label outside [0, V) raises on
            a CPU and trips a device-side assertion elsewhere.
    """
    options = (bias, softcap, logit_scale, entropy, ignore_index, impl, workspace_mib)
    return _models_stats([(hidden, weight)], labels, *options)[0]


def _models_stats(
    models: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    impl: str,
    workspace_mib: float,
    contrast: float | None = None,
) -> list[TokenStats]:
    """The statistics of each (hidden, weight) on the same labels, or with `contrast` of the two models' contrast."""
    local = []
    for hidden, weight in models:
        x, w, b, shard = local_head(hidden, weight, bias)
        check_head(x, w, b)
        check_labels(labels, x.shape[:-1], weight.shape[0], ignore_index)
        check_same_device(hidden=x, labels=labels)
        local.append((x, w))
    models, bias = local, b
    impl = resolve_impl(impl, models[0][0], shard)
    dtypes = {hidden.dtype for hidden, _ in models}
    if len(dtypes) > 1 and (impl == "fused" or contrast is not None):
        found = " and ".join(sorted(map(str, dtypes)))
        raise TypeError(f"both models must have one dtype here; got {found}; cast one of them")
    check_positive("softcap", softcap)
    check_positive("workspace_mib", workspace_mib)
    y = labels.reshape(-1)  # (N,)
    if shard is not None:
        y, ignore_index = shard.labels(y, ignore_index), shard.IGNORED
    hidden, weight = [h.reshape(-1, h.shape[-1]) for h, _ in models], [w for _, w in models]  # (N, D), (V, D)
    # torch.compile sees one operator; eager code needs none, and can be looked into
    compute = torch.ops.tokensel.models_stats if torch.compiler.is_compiling() else _compute_stats
    options = (float(logit_scale), entropy, ignore_index, impl, float(workspace_mib), contrast)
    with torch.autocast(labels.device.type, enabled=False):  # or it would round what is float32 on purpose
        fields = compute(hidden, weight, y, bias, softcap, *options)
    count = 5 if entropy else 2
    found = [TokenStats(*fields[i : i + count]) for i in range(0, len(fields), count)]
    if shard is not None:
        found = [_merge_ranks(stats, shard) for stats in found]
    return [_reshape(stats, labels.shape) for stats in found]


def _merge_ranks(stats: TokenStats, shard: VocabShard) -> TokenStats:
    """The statistics over the whole vocabulary; the same bits on all ranks, which join the parts in one order."""
    known = {name: field for name, field in vars(stats).items() if field is not None}
    everybody = shard.gather(torch.stack(list(known.values())))  # (fields, N) of each rank
    return TokenStats.merge([TokenStats(**dict(zip(known, fields, strict=True))) for fields in everybody])


def _compute_stats(
    hidden: list[Tensor],
    weight: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    impl: str,
    workspace_mib: float,
    contrast: float | None,
) -> list[Tensor]:
    """The fields of each model's TokenStats, one model after the other, (N,) each; of the contrast's, if asked for."""
    models = list(zip(hidden, weight, strict=True))
    head = (bias, softcap, logit_scale)
    if impl == "fused":
        found = _fused_stats(models, labels, *head, entropy, ignore_index, contrast)
    elif impl == "chunked" and on_gpu(hidden[0]):
        found = _gpu_chunked_stats(models, labels, *head, entropy, ignore_index, workspace_mib, contrast)
    elif impl == "chunked":
        together = [models] if contrast is not None else [[model] for model in models]
        found = [_chunked_stats(m, labels, *head, entropy, ignore_index, workspace_mib, contrast) for m in together]
    else:
        logits = (reference.head_logits(x, w, *head) for x, w in models)
        logits = logits if contrast is None else [reference.contrast_logits(*logits, contrast)]
        found = [_reference_stats(z, labels, entropy, ignore_index) for z in logits]
    return [field for stats in found for field in vars(stats).values() if field is not None]


_stats_operator = torch.library.custom_op(
    "tokensel::models_stats",
    _compute_stats,
    mutates_args=(),
    schema="(Tensor[] hidden, Tensor[] weight, Tensor labels, Tensor? bias, float? softcap, float logit_scale, "
    "bool entropy, int ignore_index, str impl, float workspace_mib, float? contrast) -> Tensor[]",
)


@_stats_operator.register_fake
def _(hidden, weight, labels, bias, softcap, logit_scale, entropy, ignore_index, impl, workspace_mib, contrast):
    results = hidden if contrast is None else hidden[:1]
    dtypes = [torch.promote_types(x.dtype, torch.float32) for x in results for _ in range(5 if entropy else 2)]
    return [torch.empty(labels.shape, dtype=dtype, device=labels.device) for dtype in dtypes]


def _reference_stats(logits: Tensor, labels: Tensor, entropy: bool, ignore_index: int) -> TokenStats:
    fields = reference.logits_stats(logits, labels, ignore_index)
    return TokenStats(**(fields if entropy else {name: fields[name] for name in ("lse", "target_logit")}))


def _fused_stats(
    models: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    contrast: float | None,
) -> list[TokenStats]:
    """One launch for all models; shares of the vocabulary are joined here, in their order."""
    from tokensel_kernels.vocab_stats import hidden_sums

    options = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "contrast": contrast}
    sums = hidden_sums(models, labels, moments=entropy, ignore_index=ignore_index, **options)
    return _stats_of_sums(sums, labels, ignore_index)


def _stats_of_sums(sums: Tensor, labels: Tensor, ignore_index: int) -> list[TokenStats]:
    """Joins a kernel's sums over shares of the vocabulary, in their order. [fields, models, shares, N] -> per model.

    Relative to the largest logit, as the sums are, so that nothing is lost where all logits are large; `merge` would
    start from shards' lse, which are rounded.
    """
    valid = labels != ignore_index  # rows without a label may not have been written
    nothing = _empty(labels, torch.float32, len(sums) == 5)
    found = []
    for model in range(sums.shape[1]):
        share_top, share_total, share_target, *moments = sums[:, model]  # (shares, N) each
        top = share_top.amax(0)
        shift = share_top - top
        scale = shift.exp()
        total = (scale * share_total).sum(0)
        fields = [top + total.log(), share_target.amax(0)]
        if moments:
            share_first, share_second = moments
            mean = (scale * (share_first + shift * share_total)).sum(0) / total
            square = (scale * (share_second + 2 * shift * share_first + shift**2 * share_total)).sum(0) / total
            fields += [total.log() - mean, square - mean**2, top]
        known = zip(fields, vars(nothing).values(), strict=False)
        found.append(TokenStats(*(torch.where(valid, field, none) for field, none in known)))
    return found


def _reshape(stats: TokenStats, shape: torch.Size) -> TokenStats:
    return TokenStats(*(None if f is None else f.view(shape) for f in vars(stats).values()))


def _chunked_stats(
    models: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    workspace_mib: float,
    contrast: float | None,
) -> TokenStats:
    """Of one model, or of the contrast of two."""
    hidden, weight = models[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    V = weight.shape[0]
    stats = _empty(labels, dtype, entropy)
    kept = (labels != ignore_index).nonzero()[:, 0]
    R, C = vocabulary_blocks(len(kept), V, workspace_mib, models=len(models))
    workspace = torch.empty(len(models), R * C, dtype=dtype, device=hidden.device)
    wide = [torch.empty(C, w.shape[1], dtype=dtype, device=w.device) for _, w in models]
    with exact_products(hidden.dtype):
        for rows in kept.split(R):
            inputs, y = [x[rows].to(dtype) for x, _ in models], labels[rows]
            running: TokenStats | None = None
            for start in range(0, V, C):
                b = None if bias is None else bias[start : start + C].to(dtype)
                block = []
                for x, (_, head), space, room in zip(inputs, models, workspace, wide, strict=True):
                    w = widened(head[start : start + C], room)  # (C, D)
                    out = space[: len(rows) * len(w)].view(len(rows), len(w))
                    block.append(logits_block(x, w, b, softcap, logit_scale, out))
                z, *other = block
                if contrast is not None:
                    z.mul_(1 + contrast).sub_(other[0], alpha=contrast)
                part = block_stats(z, y - start, entropy)
                running = part if running is None else TokenStats.merge([running, part])
            _store(stats, rows, running)
    return stats


def _gpu_chunked_stats(
    models: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    workspace_mib: float,
    contrast: float | None,
) -> list[TokenStats]:
    """Blocks of all models' logits in one workspace, which a kernel reads once.

    Ignored rows are multiplied too: to leave them out, the host would have to wait for their number.
    """
    from tokensel_kernels.vocab_stats import write_logits_sums

    N, V = len(labels), models[0][1].shape[0]
    R, C = vocabulary_blocks(N, V, workspace_mib, columns=GPU_COLUMNS, models=len(models))
    workspace = torch.empty(len(models), R * C, dtype=torch.float32, device=labels.device)
    results = 1 if contrast is not None else len(models)
    sums = torch.empty(5 if entropy else 3, results, -(-V // C), N, dtype=torch.float32, device=labels.device)
    options = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index, "contrast": contrast}
    for first in range(0, N, R):
        rows = slice(first, min(first + R, N))
        for share, start in enumerate(range(0, V, C)):
            block = []
            for (x, w), space in zip(models, workspace, strict=True):
                x, w = x[rows], w[start : start + C]
                block.append(product(x, w.T, space[: len(x) * len(w)].view(len(x), len(w))))
            b = None if bias is None else bias[start : start + C]
            write_logits_sums(block, labels[rows], sums[:, :, share, rows], bias=b, first_column=start, **options)
    return _stats_of_sums(sums, labels, ignore_index)


@torch.no_grad()
def token_stats_pair(
    current: tuple[Tensor, Tensor],
    history: tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
    workspace_mib: float = 256,
) -> tuple[TokenStats, TokenStats]:
    """`token_stats` of the current and the history model on the same labels.

    Args:
        current: (hidden [..., D], weight [V, D]).
        history: (hidden [..., D'], weight [V, D']); D' may differ, V may not. `bias` is added to both.
        labels, bias, softcap, logit_scale, entropy, ignore_index, impl, workspace_mib: as in `token_stats`.
    Returns:
        (TokenStats of the current model, TokenStats of the history model).
    """
    check_same_vocabulary(current=current[1], history=history[1])
    options = (bias, softcap, logit_scale, entropy, ignore_index, impl, workspace_mib)
    now, before = _models_stats([current, history], labels, *options)
    return now, before


@torch.no_grad()
def token_stats_contrast(
    positive: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
    workspace_mib: float = 256,
) -> TokenStats:
    """`token_stats` of the contrast of two models, softmax((1 + beta) z_positive - beta z_negative), without logits.

    cDPO's contrastive estimate of how much a token belongs to the positive model and not to the negative one is the
    label's probability, exp(-nll); 1 minus it marks critical tokens (arXiv 2411.19943). Log-probabilities in place of
    the logits z would give the same softmax.

    Args:
        positive: (hidden [..., D], weight [V, D]) of the model trained on right answers.
        negative: (hidden [..., D'], weight [V, D']) of the one trained on wrong answers; D' may differ, V may not.
            `bias` is added to both.
        beta: not negative; 0 is the positive model alone.
        labels, bias, softcap, logit_scale, entropy, ignore_index, impl, workspace_mib: as in `token_stats`.
    Returns:
        TokenStats of the contrast; `lse`, `target_logit` and `top1` are in units of its logits.
    """
    check_number("beta", beta)
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative; got {beta}")
    check_same_vocabulary(positive=positive[1], negative=negative[1])
    options = (bias, softcap, logit_scale, entropy, ignore_index, impl, workspace_mib, float(beta))
    return _models_stats([positive, negative], labels, *options)[0]


@torch.no_grad()
def token_stats_from_logits(
    logits: Tensor,
    labels: Tensor,
    history_logits: Tensor | None = None,
    *,
    entropy: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
    workspace_mib: float = 256,
) -> tuple[TokenStats, TokenStats | None]:
    """Statistics for trainers that already hold logits; a float32 copy of the whole is never made (chunked).

    Args:
        logits: [..., V], any floating dtype; softcap and scale already applied.
        labels: [...] int64, aligned: logits[i] predicts labels[i].
        history_logits: [..., V] of the history model, or None.
        entropy, ignore_index, impl, workspace_mib: as in `token_stats`.
    Returns:
        (TokenStats of `logits`, TokenStats of `history_logits` or None).
    """
    check_tensor("logits", logits, floating=True)
    impl = resolve_impl(impl, logits)
    check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index)
    check_positive("workspace_mib", workspace_mib)
    if history_logits is not None and check_tensor("history_logits", history_logits).shape != logits.shape:
        raise ValueError(
            f"history_logits must have the shape of logits {list(logits.shape)}; got {list(history_logits.shape)}"
        )
    check_same_device(logits=logits, labels=labels, history_logits=history_logits)
    y = labels.reshape(-1)
    flat = [z.reshape(-1, z.shape[-1]) for z in (logits, history_logits) if z is not None]  # (N, V)
    if impl == "fused" or (impl == "chunked" and on_gpu(logits)):
        from tokensel_kernels.vocab_stats import write_logits_sums

        sums = torch.empty(5 if entropy else 3, len(flat), 1, len(y), dtype=torch.float32, device=y.device)
        write_logits_sums(flat, y, sums[:, :, 0], ignore_index=ignore_index)
        found = _stats_of_sums(sums, y, ignore_index)
    elif impl == "chunked":
        found = [_chunked_logits_stats(z, y, entropy, ignore_index, workspace_mib) for z in flat]
    else:
        wide = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in flat)
        found = [_reference_stats(z, y, entropy, ignore_index) for z in wide]
    now, *before = (_reshape(stats, labels.shape) for stats in found)
    return now, before[0] if before else None


def _chunked_logits_stats(
    logits: Tensor, labels: Tensor, entropy: bool, ignore_index: int, workspace_mib: float
) -> TokenStats:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stats = _empty(labels, dtype, entropy)
    V = logits.shape[1]
    rows_at_once, _ = vocabulary_blocks(len(labels), V, workspace_mib, columns=V)
    rows_at_once = min(rows_at_once, max(1, _CACHE_BYTES // (4 * V)))
    workspace = torch.empty(rows_at_once, V, dtype=dtype, device=logits.device)
    for rows in (labels != ignore_index).nonzero()[:, 0].split(rows_at_once):
        copy = workspace[: len(rows)]  # the caller's logits are never overwritten
        if logits.dtype == dtype:
            torch.index_select(logits, 0, rows, out=copy)
        else:
            copy.copy_(logits[rows])
        _store(stats, rows, block_stats(copy, labels[rows], entropy))
    return stats
