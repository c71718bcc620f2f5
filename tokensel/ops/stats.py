"""Token statistics without logits (step 4): negative log-likelihood of every row, and what else one pass can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from tokensel.ops import chunked, reference
from tokensel.ops.checks import (
    check_head,
    check_label_range,
    check_labels,
    check_number,
    check_positive,
    check_same_device,
    check_same_vocabulary,
    check_tensor,
    resolve_impl,
)
from tokensel.ops.chunked import Head, Models
from tokensel.ops.operators import custom_operator
from tokensel.ops.products import on_gpu
from tokensel.ops.token_stats import EXTRAS, MOMENTS, TokenStats, stats_of_sums, sums_of, wanted_fields
from tokensel.ops.vocab_parallel import VocabShard, local_head


class StatsOptions(TypedDict, total=False):
    """Keywords that the statistics of one model and of two share; `token_stats` explains them."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    entropy: bool
    renyi2: bool
    logit_sum: bool
    rank: bool
    ignore_index: int
    impl: str
    workspace_mib: float


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    renyi2: bool = False,
    logit_sum: bool = False,
    rank: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
    workspace_mib: float = 256,
) -> TokenStats:
    """Per-token statistics of `softmax(head(hidden))` at `labels`, without [N, V] logits and without gradient.

    Logits are `softcap · tanh(logit_scale · (hidden weightᵀ + bias) / softcap)`, softcap None = no cap.

    Args:
        hidden: [..., D] final hidden states, any strides; row i predicts `labels[i]`.
        weight: [V, D] language-model head: float16, bfloat16, float32 or float64. Of another dtype than `hidden`, both
            are multiplied in the wider one, a block of the head at a time (chunked). A DTensor with Shard(0) is a head
            whose vocabulary is spread over ranks; `hidden` is then a replicated DTensor, and each rank gets the
            statistics over the whole vocabulary.
        labels: [...] int64 or int32; rows that equal `ignore_index` are not read.
        bias: [V].
        temperature: divides these logits; the statistics are of the divided ones.
        entropy: also `entropy`, `logp_var` and `top1`.
        renyi2, logit_sum, rank: also the field of that name. The label's logit is a product of its own for `rank`, so
            that logits equal to it may or may not count.
        impl: "auto", "chunked", "fused" or "reference" (see `tokensel.ops.checks.resolve_impl`).
        workspace_mib: most MiB that a block of logits may take (chunked).
    Returns:
        TokenStats with fields of shape [...].
    Raises:
        TypeError, ValueError: the argument, what was expected and what was given. A label outside [0, V) raises on
            a CPU and trips a device-side assertion elsewhere.
    """
    return _models_stats(
        [(hidden, weight)],
        labels,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        entropy=entropy,
        renyi2=renyi2,
        logit_sum=logit_sum,
        rank=rank,
        ignore_index=ignore_index,
        impl=impl,
        workspace_mib=workspace_mib,
    )[0]


@torch.no_grad()
def token_stats_pair(
    current: tuple[Tensor, Tensor], history: tuple[Tensor, Tensor], labels: Tensor, **options: Unpack[StatsOptions]
) -> tuple[TokenStats, TokenStats]:
    """`token_stats` of the current and the history model on the same labels.

    Args:
        current: (hidden [..., D], weight [V, D]).
        history: (hidden [..., D'], weight [V, D']); D' may differ, V may not.
        labels: [...] int64 or int32.
        options: keywords of `token_stats`; `bias` is added to both.
    Returns:
        (TokenStats of the current model, TokenStats of the history model).
    """
    check_same_vocabulary(current=current[1], history=history[1])
    current_stats, history_stats = _models_stats([current, history], labels, **options)
    return current_stats, history_stats


@torch.no_grad()
def token_stats_contrast(
    positive: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    beta: float = 1.0,
    **options: Unpack[StatsOptions],
) -> TokenStats:
    """`token_stats` of the contrast of two models, softmax((1 + beta) z_positive - beta z_negative), without logits.

    cDPO's contrastive estimate of how much a token belongs to the positive model and not to the negative one is the
    label's probability, exp(-nll); 1 minus it marks critical tokens (arXiv 2411.19943). Log-probabilities in place of
    the logits z would give the same softmax.

    Args:
        positive: (hidden [..., D], weight [V, D]) of the model trained on right answers.
        negative: (hidden [..., D'], weight [V, D']) of the one trained on wrong answers; D' may differ, V may not.
        labels: [...] int64 or int32.
        beta: not negative; 0 is the positive model alone.
        options: keywords of `token_stats`; `bias` is added to both. `impl` "auto" is "chunked" on every device.
    Returns:
        TokenStats of the contrast; `lse`, `target_logit` and `top1` are in units of its logits.
    Raises:
        TypeError, ValueError: as `token_stats`; also models of two dtypes, and impl "fused", which has no contrast.
    """
    check_number("beta", beta)
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative; got {beta}")
    check_same_vocabulary(positive=positive[1], negative=negative[1])
    if options.setdefault("impl", "auto") == "auto":
        options["impl"] = "chunked"
    if options["impl"] == "fused":
        raise ValueError("impl='fused' has no contrast of two models; use impl='chunked'")
    return _models_stats(
        [positive, negative], labels, contrast=float(beta), names=("positive hidden", "negative hidden"), **options
    )[0]


def _models_stats(
    models: Models,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    renyi2: bool = False,
    logit_sum: bool = False,
    rank: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
    workspace_mib: float = 256,
    contrast: float | None = None,
    names: tuple[str, str] = ("current hidden", "history hidden"),
) -> list[TokenStats]:
    """The statistics of each (hidden, weight) on the same labels, or with `contrast` of the two models' contrast."""
    hidden, weight = [], []
    for name, (whole_hidden, whole_weight) in zip(names if len(models) > 1 else ("hidden",), models, strict=True):
        x, w, local_bias, shard = local_head(whole_hidden, whole_weight, bias)
        check_same_device(**{name: check_tensor(name, x), "labels": check_tensor("labels", labels)})
        x = check_head(x, w, local_bias)
        labels = check_labels(labels, x.shape[:-1])
        hidden.append(x.reshape(-1, x.shape[-1]))  # (N, D)
        weight.append(w)  # (V, D)
    check_label_range(labels, models[0][1].shape[0], ignore_index)
    wanted = wanted_fields(entropy, renyi2, logit_sum, rank)
    pairs = list(zip(hidden, weight, strict=True))
    x, w = next((pair for pair in pairs if pair[0].dtype != pair[1].dtype), pairs[0])
    impl = resolve_impl(impl, x, shard, "statistics", w)
    dtypes = {x.dtype for x in hidden}
    if len(dtypes) > 1 and (impl == "fused" or contrast is not None):
        both = " and ".join(sorted(map(str, dtypes)))
        raise TypeError(f"both models must have one dtype here; got {both}; cast one of them")
    check_positive("softcap", softcap)
    check_number("temperature", temperature)
    check_positive("temperature", temperature)
    check_positive("workspace_mib", workspace_mib)
    y = labels.reshape(-1)  # (N,)
    if shard is not None:
        y, ignore_index = shard.labels(y, ignore_index), shard.IGNORED
    head = Head(local_bias, softcap, float(logit_scale)).tempered(temperature)
    mib = float(workspace_mib)
    with torch.autocast(labels.device.type, enabled=False):  # or it would round what is float32 on purpose
        label_logit = None
        if rank:
            label_logit = chunked.label_logits(pairs, y, head, contrast)
            if shard is not None:
                label_logit = torch.stack(shard.gather(label_logit)).amax(0)
        if contrast is None:
            tensors = _compute_stats(
                hidden,
                weight,
                y,
                label_logit,
                head.bias,
                head.softcap,
                head.logit_scale,
                wanted,
                ignore_index,
                impl,
                mib,
            )
        else:
            tensors = _compute_contrast(pairs, y, label_logit, contrast, head, wanted, ignore_index, impl, mib)
    count = 2 + len(wanted)
    of_models = (tensors[i : i + count] for i in range(0, len(tensors), count))
    stats = [TokenStats(*fields[:2], **dict(zip(wanted, fields[2:], strict=True))) for fields in of_models]
    if shard is not None:
        stats = [_merge_ranks(part, shard) for part in stats]
    return [part.view(labels.shape) for part in stats]


def _merge_ranks(stats: TokenStats, shard: VocabShard) -> TokenStats:
    """The statistics over the whole vocabulary; the same bits on all ranks, which join the parts in one order."""
    fields = stats.fields()
    everybody = shard.gather(torch.stack(list(fields.values())))  # (fields, N) of each rank
    return TokenStats.merge([TokenStats(**dict(zip(fields, theirs, strict=True))) for theirs in everybody])


def _empty_stats(
    hidden: list[Tensor], weight: list[Tensor], labels: Tensor, label_logit: Tensor | None, *rest: Any
) -> list[Tensor]:
    wanted: Sequence[str] = rest[3]
    dtypes = [torch.promote_types(x.dtype, torch.float32) for x in hidden for _ in range(2 + len(wanted))]
    return [torch.empty(labels.shape, dtype=dtype, device=labels.device) for dtype in dtypes]


@custom_operator(
    "models_stats",
    "(Tensor[] hidden, Tensor[] weight, Tensor labels, Tensor? label_logit, Tensor? bias, float? softcap, "
    "float logit_scale, str[] wanted, int ignore_index, str impl, float workspace_mib) -> Tensor[]",
    fake=_empty_stats,
)
def _compute_stats(
    hidden: list[Tensor],
    weight: list[Tensor],
    labels: Tensor,
    label_logit: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    wanted: Sequence[str],
    ignore_index: int,
    impl: str,
    workspace_mib: float,
) -> list[Tensor]:
    """The fields of each model's TokenStats, one model after the other, (N,) each."""
    models, head = list(zip(hidden, weight, strict=True)), Head(bias, softcap, logit_scale)
    if impl == "fused":
        from tokensel_kernels.vocab_stats import hidden_stats

        asked = {"entropy": "entropy" in wanted, "more": not set(wanted).isdisjoint(EXTRAS), "label_logit": label_logit}
        fields = hidden_stats(models, labels, ignore_index=ignore_index, **asked, **head._asdict())
        names = ("lse", "target_logit", *MOMENTS, *EXTRAS)
        return [of_model[names.index(name)] for of_model in fields.unbind(1) for name in (*names[:2], *wanted)]
    options = (wanted, ignore_index, workspace_mib)
    if impl == "chunked" and on_gpu(hidden[0]):
        stats = chunked.hidden_stats_on_gpu(models, labels, head, *options, label_logit=label_logit)
    elif impl == "chunked":
        of_labels = [None] * len(models) if label_logit is None else label_logit.unbind()
        pairs = zip(models, of_labels, strict=True)
        stats = [chunked.hidden_stats([m], labels, head, *options, label_logit=of_label) for m, of_label in pairs]
    else:
        logits = (reference.head_logits(x, w, *head) for x, w in models)
        stats = [_reference_stats(z, labels, wanted, ignore_index) for z in logits]
    return [field for part in stats for field in _in_order(part, wanted)]


def _compute_contrast(
    models: Models,
    labels: Tensor,
    label_logit: Tensor | None,
    contrast: float,
    head: Head,
    wanted: Sequence[str],
    ignore_index: int,
    impl: str,
    mib: float,
) -> list[Tensor]:
    """The fields of the contrast's TokenStats, (N,) each. It is made before training, so it needs no operator."""
    options = (wanted, ignore_index, mib, contrast)
    if impl == "chunked" and on_gpu(models[0][0]):
        (stats,) = chunked.hidden_stats_on_gpu(models, labels, head, *options, label_logit)
    elif impl == "chunked":
        of_label = None if label_logit is None else label_logit[0]
        stats = chunked.hidden_stats(models, labels, head, *options, of_label)
    else:
        positive, negative = (reference.head_logits(x, w, *head) for x, w in models)
        logits = reference.contrast_logits(positive, negative, contrast)
        stats = _reference_stats(logits, labels, wanted, ignore_index)
    return _in_order(stats, wanted)


def _in_order(stats: TokenStats, wanted: Sequence[str]) -> list[Tensor]:
    fields = stats.fields()
    return [fields[name] for name in ("lse", "target_logit", *wanted)]


def _reference_stats(logits: Tensor, labels: Tensor, wanted: Sequence[str], ignore_index: int) -> TokenStats:
    fields = reference.logits_stats(logits, labels, ignore_index)
    return TokenStats(**{name: fields[name] for name in ("lse", "target_logit", *wanted)})


@torch.no_grad()
def token_stats_from_logits(
    logits: Tensor,
    labels: Tensor,
    history_logits: Tensor | None = None,
    *,
    entropy: bool = False,
    renyi2: bool = False,
    logit_sum: bool = False,
    rank: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
    workspace_mib: float = 256,
) -> tuple[TokenStats, TokenStats | None]:
    """Statistics for trainers that already hold logits; a float32 copy of the whole is never made (chunked).

    Args:
        logits: [..., V], any floating dtype; softcap and scale already applied.
        labels: [...] int64 or int32, aligned: logits[i] predicts labels[i].
        history_logits: [..., V] of the history model, or None.
        entropy, renyi2, logit_sum, rank, ignore_index, impl, workspace_mib: as in `token_stats`; here every
            implementation has all statistics, and `rank` counts what is larger exactly.
    Returns:
        (TokenStats of `logits`, TokenStats of `history_logits` or None).
    """
    check_tensor("logits", logits, floating=True)
    impl = resolve_impl(impl, logits)
    labels = check_labels(labels, logits.shape[:-1])
    check_label_range(labels, logits.shape[-1], ignore_index)
    check_positive("workspace_mib", workspace_mib)
    if history_logits is not None and check_tensor("history_logits", history_logits).shape != logits.shape:
        raise ValueError(
            f"history_logits must have the shape of logits {list(logits.shape)}; got {list(history_logits.shape)}"
        )
    check_same_device(logits=logits, labels=labels, history_logits=history_logits)
    y = labels.reshape(-1)
    flat = [z.reshape(-1, z.shape[-1]) for z in (logits, history_logits) if z is not None]  # (N, V)
    wanted, label_logit = wanted_fields(entropy, renyi2, logit_sum, rank), None
    if rank:
        inside = (y >= 0) & (y < logits.shape[-1])  # a label that no logit has is no place to read from
        at = torch.where(inside, y, 0)[:, None]
        own = [z.gather(1, at)[:, 0].to(torch.promote_types(z.dtype, torch.float32)) for z in flat]
        label_logit = torch.where(inside, torch.stack(own), torch.inf)
    if impl == "fused" or (impl == "chunked" and on_gpu(logits)):
        from tokensel_kernels.logits_stats import write_logits_sums

        sums = torch.empty(sums_of(wanted), len(flat), 1, len(y), dtype=torch.float32, device=y.device)
        write_logits_sums(flat, y, sums[:, :, 0], ignore_index=ignore_index, label_logit=label_logit)
        stats = stats_of_sums(sums, y, ignore_index, wanted)
    elif impl == "chunked":
        of_labels = [None] * len(flat) if label_logit is None else label_logit.unbind()
        options = (wanted, ignore_index, workspace_mib)
        stats = [chunked.logits_stats(z, y, *options, of) for z, of in zip(flat, of_labels, strict=True)]
    else:
        wide = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in flat)
        stats = [_reference_stats(z, y, wanted, ignore_index) for z in wide]
    current, *history = (part.view(labels.shape) for part in stats)
    return current, history[0] if history else None
