"""Logits -> per-token statistics of one or two models. Each model's logits are read once: N V elements."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.primitives import head_logits, store_sums, take_logits
from tokensel_kernels.tiles import row_columns


@triton.jit
def _sweep_row(
    z_ptr, bias_ptr, sums_ptr,  # pointers
    row, label, V,  # shapes
    field_stride,  # strides
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr,  # constants
):  # fmt: skip
    """Statistics of one row of logits."""
    top = tl.full([1], -float("inf"), tl.float32)
    target = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    first = tl.zeros([1], tl.float32)
    second = tl.zeros([1], tl.float32)
    for column in range(0, V, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = columns < V
        z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        z = head_logits(z, bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, COLUMNS)
        top, total, target, first, second = take_logits(
            z, columns, V, label + tl.zeros([1], tl.int64), top, total, target, first, second, ENTROPY
        )
    one = row + tl.zeros([1], tl.int32)
    store_sums(sums_ptr, one, one >= 0, field_stride, top, total, target, first, second, ENTROPY)


@triton.jit
def _logits_stats_kernel(
    z_ptr, history_z_ptr, bias_ptr, label_ptr, sums_ptr,  # pointers
    first_column, V,  # shapes
    z_stride, history_z_stride, field_stride, model_stride,  # strides
    logit_scale, softcap, ignore_index, PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, COLUMNS: tl.constexpr,  # constants
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(label_ptr + row)
    if label == ignore_index:
        return
    label -= first_column
    at = row.to(tl.int64)
    _sweep_row(
        z_ptr + at * z_stride, bias_ptr, sums_ptr,
        row, label, V,
        field_stride,
        logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, ENTROPY, COLUMNS,
    )  # fmt: skip
    if PAIR:
        _sweep_row(
            history_z_ptr + at * history_z_stride, bias_ptr, sums_ptr + model_stride,
            row, label, V,
            field_stride,
            logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, ENTROPY, COLUMNS,
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
) -> None:
    """Sums of one or two models' logits over a share of the vocabulary, each read once.

    Args:
        logits: [N, C] of each model, any floating dtype: vocabulary columns from `first_column` on.
        labels: [N] int64 in the whole vocabulary.
        sums: [fields, models, N] float32 to write, the last dimension contiguous: one share of what `hidden_sums`
            gives. Rows to ignore are left as they are.
        bias: [C] or None.
    """
    N, C = logits[0].shape
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    z, history_z = (t if t.stride(-1) == 1 else t.contiguous() for t in (logits[0], logits[-1]))
    if N:
        _logits_stats_kernel[(N,)](
            z, history_z, bias, labels, sums,
            first_column, C,
            z.stride(0), history_z.stride(0), sums.stride(0), sums.stride(1),
            logit_scale, softcap or 1.0, ignore_index, PAIR=len(logits) == 2,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, ENTROPY=len(sums) == 5,
            COLUMNS=row_columns(z), num_warps=8,
        )  # fmt: skip
