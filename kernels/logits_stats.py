"""Logits -> per-token statistics of one or two models. Each model's logits are read once: N V elements.

A program owns a row of one model. Each of its threads takes 16 bytes at a time and keeps sums of its own, so that the
loop has neither a barrier nor an exchange between threads; they are joined once, at the end of the row. The label's
logit is read by one load of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels import tiles
from tokensel_kernels.primitives import LN_2, LOG2_E, NOTHING, softcap_kind, tanh

LOWEST_PIVOT = tl.constexpr(-1e38)  # finite, so that no difference of two pivots is NaN
BLOCKS_AT_ONCE = 2  # loads of 16 bytes that a thread has under way


@triton.jit
def _logit(
    product, bias_ptr, column, mask, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The logits of products, elementwise; tanh |x| as (1 - e) / (1 + e), e = exp(-2 |x|), to an ulp or two of 1.

    The one expression for the columns of the loop and for the label: the same numbers, so that they compare as equal.
    """
    z = product.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=mask).to(tl.float32)
    if HAS_SCALE:
        z *= logit_scale
    if SOFTCAP == "small":
        e = tl.exp2(tl.abs(z) * (-2.0 * LOG2_E / softcap))
        capped = softcap * ((1.0 - e) / (1.0 + e))
        z = tl.where(z < 0, -capped, capped)
    if SOFTCAP == "large":
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _take(z, top, pivot, total, first, second, square, ENTROPY: tl.constexpr, MORE: tl.constexpr):
    """Takes each thread's logits into its sums, relative to its own largest, in powers of two.

    With p = top · log2 e: total = Σ 2^u, first = Σ 2^u u, second = Σ 2^u u², square = Σ 2^2u, u = z · log2 e - p.
    (THREADS, VECTOR), (THREADS,) -> (THREADS,) each.
    """
    top = tl.maximum(top, tl.max(z, 1))
    before, pivot = pivot, tl.maximum(top * LOG2_E, LOWEST_PIVOT)
    shift = tl.maximum(before - pivot, NOTHING)
    rescale = tl.exp2(shift)
    u = z * LOG2_E - pivot[:, None]
    if ENTROPY:
        u = tl.maximum(u, NOTHING, propagate_nan=tl.PropagateNan.ALL)  # a NaN among the logits must show
    e = tl.exp2(u)
    if ENTROPY:
        second = rescale * (second + shift * (2.0 * first + shift * total))
        first = rescale * (first + shift * total)
        weighted = e * u
        first += tl.sum(weighted, 1)
        second += tl.sum(weighted * u, 1)
    if MORE:
        square = rescale * rescale * square + tl.sum(e * e, 1)
    total = rescale * total + tl.sum(e, 1)
    return top, pivot, total, first, second, square


@triton.jit
def _compare(z, column, V, label, label_logit, logits, above, WHOLE: tl.constexpr):
    """Adds up each thread's logits, and how many of them exceed the label's; WHOLE: all these columns exist."""
    larger = (z > label_logit) & (column != label)
    if not WHOLE:
        inside = (column >= 0) & (column < V)
        z = tl.where(inside, z, 0.0)
        larger = larger & inside
    return logits + tl.sum(z, 1), above + tl.sum(larger.to(tl.float32), 1)


@triton.jit
def _sweep_row(
    z_ptr, bias_ptr, label_logit_ptr, sums_ptr,  # pointers
    row, label, V,  # shapes
    z_stride, field_stride,  # strides
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, MORE: tl.constexpr, ALIGNED: tl.constexpr, THREADS: tl.constexpr,
    BLOCKS: tl.constexpr,  # constants
):  # fmt: skip
    """Statistics of one row of logits."""
    VECTOR: tl.constexpr = 128 // z_ptr.dtype.element_ty.primitive_bitwidth
    BLOCK: tl.constexpr = THREADS * VECTOR
    STEP: tl.constexpr = BLOCKS * BLOCK
    top = tl.full([THREADS], -float("inf"), tl.float32)
    pivot = tl.full([THREADS], LOWEST_PIVOT, tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    first = tl.zeros([THREADS], tl.float32)
    second = tl.zeros([THREADS], tl.float32)
    square = tl.zeros([THREADS], tl.float32)
    logits = tl.zeros([THREADS], tl.float32)
    above = tl.zeros([THREADS], tl.float32)
    label_logit = 0.0
    if MORE:
        label_logit = tl.load(label_logit_ptr + row)
    at = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    offset = row.to(tl.int64) * z_stride
    # a row that begins between two multiples of 16 bytes is read from the one before
    begin = 0 if ALIGNED else (offset % VECTOR).to(tl.int32)
    source = z_ptr + offset // VECTOR * VECTOR
    stop = V + begin
    start = 0
    if not ALIGNED:
        inside = (at >= begin) & (at < stop)
        z = tl.load(source + at, mask=inside, other=0.0)
        z = _logit(z, bias_ptr, at - begin, inside, logit_scale, softcap, HAS_BIAS, HAS_SCALE, SOFTCAP)
        if MORE:
            logits, above = _compare(z, at - begin, V, label, label_logit, logits, above, False)
        z = tl.where(inside, z, -float("inf"))
        top, pivot, total, first, second, square = _take(z, top, pivot, total, first, second, square, ENTROPY, MORE)
        start = BLOCK
    whole = start + tl.maximum(stop - start, 0) // STEP * STEP
    for column in range(start, whole, STEP):
        for block in tl.static_range(BLOCKS):
            c = column + block * BLOCK + at
            z = tl.load(source + c)
            z = _logit(z, bias_ptr, c - begin, None, logit_scale, softcap, HAS_BIAS, HAS_SCALE, SOFTCAP)
            if MORE:
                logits, above = _compare(z, c - begin, V, label, label_logit, logits, above, True)
            top, pivot, total, first, second, square = _take(z, top, pivot, total, first, second, square, ENTROPY, MORE)
    for column in range(whole, stop, BLOCK):
        inside = at < stop - column
        z = tl.load(source + column + at, mask=inside, other=0.0)
        z = _logit(z, bias_ptr, column + at - begin, inside, logit_scale, softcap, HAS_BIAS, HAS_SCALE, SOFTCAP)
        if MORE:
            logits, above = _compare(z, column + at - begin, V, label, label_logit, logits, above, False)
        z = tl.where(inside, z, -float("inf"))
        top, pivot, total, first, second, square = _take(z, top, pivot, total, first, second, square, ENTROPY, MORE)

    # relative to the row's largest, in nats
    row_top = tl.max(top, 0)
    shift = tl.maximum(pivot - tl.maximum(row_top * LOG2_E, LOWEST_PIVOT), NOTHING)
    rescale = tl.exp2(shift)
    row_first, row_second = 0.0, 0.0
    if ENTROPY:
        row_second = LN_2 * LN_2 * tl.sum(rescale * (second + shift * (2.0 * first + shift * total)), 0)
        row_first = LN_2 * tl.sum(rescale * (first + shift * total), 0)
    row_total = tl.sum(rescale * total, 0)
    # a row whose logits are all below the pivots, such as one that is masked with the lowest number: its largest counts
    below = (row_total == 0.0) & (row_top > -float("inf"))
    row_total = tl.where(below, 1.0, row_total)
    # a label that no column has reads nothing, and its target logit is -inf
    real = (label >= 0) & (label < V)
    target = tl.load(z_ptr + offset + label, mask=real, other=0.0)
    target = _logit(target, bias_ptr, label, real, logit_scale, softcap, HAS_BIAS, HAS_SCALE, SOFTCAP)
    target = tl.where(real, target, -float("inf"))
    tl.store(sums_ptr + row, row_top)
    tl.store(sums_ptr + field_stride + row, row_total)
    tl.store(sums_ptr + 2 * field_stride + row, target)
    if ENTROPY:
        tl.store(sums_ptr + 3 * field_stride + row, row_first)
        tl.store(sums_ptr + 4 * field_stride + row, row_second)
    if MORE:
        row_square = tl.sum(rescale * rescale * square, 0)
        tl.store(sums_ptr + 5 * field_stride + row, tl.where(below, 1.0, row_square))
        tl.store(sums_ptr + 6 * field_stride + row, tl.sum(logits, 0))
        tl.store(sums_ptr + 7 * field_stride + row, tl.sum(above, 0))


@triton.jit
def _logits_stats_kernel(
    z_ptr, history_z_ptr, bias_ptr, label_ptr, label_logit_ptr, sums_ptr,  # pointers
    first_column, V,  # shapes
    z_stride, history_z_stride, label_logit_stride, field_stride, model_stride,  # strides
    logit_scale, softcap, ignore_index, PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MORE: tl.constexpr, ALIGNED: tl.constexpr, THREADS: tl.constexpr,
    BLOCKS: tl.constexpr,  # constants
):  # fmt: skip
    MODELS: tl.constexpr = 2 if PAIR else 1
    row, model = tl.program_id(0) // MODELS, tl.program_id(0) % MODELS
    label = tl.load(label_ptr + row)
    if label == ignore_index:
        return
    label -= first_column
    if model == 0:
        _sweep_row(
            z_ptr, bias_ptr, label_logit_ptr, sums_ptr,
            row, label, V,
            z_stride, field_stride,
            logit_scale, softcap, HAS_BIAS, HAS_SCALE, SOFTCAP, ENTROPY, MORE, ALIGNED, THREADS, BLOCKS,
        )  # fmt: skip
    if PAIR:
        if model == 1:
            if MORE:
                label_logit_ptr += label_logit_stride
            _sweep_row(
                history_z_ptr, bias_ptr, label_logit_ptr, sums_ptr + model_stride,
                row, label, V,
                history_z_stride, field_stride,
                logit_scale, softcap, HAS_BIAS, HAS_SCALE, SOFTCAP, ENTROPY, MORE, ALIGNED, THREADS, BLOCKS,
            )  # fmt: skip


def write_logits_sums(
    logits: list[Tensor],
    labels: Tensor,
    sums: Tensor,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int,
    label_logit: Tensor | None = None,
) -> None:
    """Sums of one or two models' logits over a share of the vocabulary, each read once.

    Args:
        logits: [N, C] of each model, any floating dtype: vocabulary columns from `first_column` on.
        labels: [N] int64 in the whole vocabulary.
        sums: [sums, models, N] float32 to write, the last dimension contiguous: the largest logit; Σ exp(u) for
            u = z - largest; the label's logit (-inf where it is in another share); of five sums Σ exp(u) u and
            Σ exp(u) u²; of eight Σ exp(u)², Σ z, and how many other logits exceed `label_logit`. Rows to ignore are
            left as they are.
        bias: [C] or None.
        label_logit: [models, N] float32, the label's logit in the whole vocabulary; needed for the last sum alone.
    """
    N, C = logits[0].shape
    if not N:
        return
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    z, history_z = (t if t.stride(-1) == 1 else t.contiguous() for t in (logits[0], logits[-1]))
    more = len(sums) == 8
    if more and label_logit is None:  # nothing exceeds it
        label_logit = torch.full((len(logits), N), torch.inf, dtype=torch.float32, device=z.device)
    threads = 32 if tiles.interpreting() else 256  # few, so that a test of ragged shapes is more than one block
    warps = 4 if tiles.chip_family(z.device)[0] == "gfx942" else 8  # whose warps have 64 threads
    with tiles.on_device(z):
        _logits_stats_kernel[(N * len(logits),)](
            z, history_z, bias, labels, label_logit if more else None, sums,
            first_column, C,
            z.stride(0), history_z.stride(0), label_logit.stride(0) if more else 0, sums.stride(0), sums.stride(1),
            logit_scale, softcap or 1.0, ignore_index, PAIR=len(logits) == 2,
            HAS_BIAS=bias is not None, HAS_SCALE=logit_scale != 1.0, SOFTCAP=softcap_kind(softcap),
            ENTROPY=len(sums) >= 5, MORE=more,
            ALIGNED=not any(t.stride(0) * t.element_size() % 16 for t in (z, history_z)),
            THREADS=threads, BLOCKS=BLOCKS_AT_ONCE, num_warps=warps,
        )  # fmt: skip
