"""Rows that take part: found, gathered to the front, and put back. How many they are stays on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.primitives import LOG2_E
from tokensel_kernels.tiles import empty_rows, interpreting, on_device

MOVED = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}  # what a program moves at once


@triton.jit
def _kept_rows_kernel(
    mask_ptr, order_ptr, count_ptr,  # pointers
    N,  # shapes
    BLOCK: tl.constexpr,  # constants
):  # fmt: skip
    """One program, which reads a byte a row: order[:count] = rows where the mask is set, ascending."""
    count = tl.zeros([], tl.int32)
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        kept = (tl.load(mask_ptr + rows, mask=rows < N, other=0) != 0).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(order_ptr + place, rows, mask=kept != 0)
        count += tl.sum(kept)
    tl.store(count_ptr, count)


@triton.jit
def _has_coefficient(coefficient_ptr, terms_ptr, rows, N, TERMS: tl.constexpr):
    """Whether any coefficient of a row is not 0."""
    kept = tl.load(coefficient_ptr + rows, mask=rows < N, other=0.0) != 0
    if TERMS:
        for term in tl.static_range(3):
            kept = kept | (tl.load(terms_ptr + term * N + rows, mask=rows < N, other=0.0) != 0)
    return kept


@triton.jit
def _gather_kept_kernel(
    x_ptr, label_ptr, lse_ptr, coefficient_ptr, terms_ptr, place_ptr, count_ptr,  # pointers
    kept_x_ptr, kept_label_ptr, kept_lse_ptr, kept_coefficient_ptr, kept_terms_ptr,  # pointers
    N, V, D,  # shapes
    x_stride, kept_stride,  # strides
    logit_scale, TERMS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCANNED: tl.constexpr,  # constants
):  # fmt: skip
    """Rows with a coefficient that is not 0 to the front, in their order, as the products read them.

    place[i] = where row i went, or -1. Hidden states are zero to the end of the last tile of TILE rows; what follows
    is not written. A label outside the vocabulary is -1, lse is in units of log 2, and the coefficient that of z.
    """
    start = tl.program_id(0) * ROWS
    # every program counts for itself, so that none waits for another: N floats from L2
    all_kept = tl.zeros([SCANNED], tl.int32)
    kept_before = tl.zeros([SCANNED], tl.int32)
    for first in range(0, N, SCANNED):
        scanned = first + tl.arange(0, SCANNED)
        kept = _has_coefficient(coefficient_ptr, terms_ptr, scanned, N, TERMS).to(tl.int32)
        all_kept += kept
        kept_before += tl.where(scanned < start, kept, 0)
    count = tl.sum(all_kept)
    if start == 0:
        tl.store(count_ptr, count)
    rows = start + tl.arange(0, ROWS)
    coefficient = tl.load(coefficient_ptr + rows, mask=rows < N, other=0.0)
    kept = _has_coefficient(coefficient_ptr, terms_ptr, rows, N, TERMS)
    place = tl.sum(kept_before) + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(place_ptr + rows, tl.where(kept, place, -1), mask=rows < N)
    label = tl.load(label_ptr + rows, mask=kept, other=-1)
    tl.store(kept_label_ptr + place, tl.where((label >= 0) & (label < V), label, -1).to(tl.int32), mask=kept)
    tl.store(kept_lse_ptr + place, tl.load(lse_ptr + rows, mask=kept, other=0.0) * LOG2_E, mask=kept)
    tl.store(kept_coefficient_ptr + place, coefficient * logit_scale, mask=kept)
    if TERMS:
        for term in tl.static_range(3):
            value = tl.load(terms_ptr + term * N + rows, mask=kept, other=0.0)
            tl.store(kept_terms_ptr + term * N + place, value, mask=kept)
    beyond = count + rows
    padding = beyond < min(tl.cdiv(count, TILE) * TILE, N)
    for column in range(0, D, COLUMNS):
        c = (column + tl.arange(0, COLUMNS))[None, :]
        moved, cleared = kept[:, None] & (c < D), padding[:, None] & (c < D)
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + c, mask=moved, other=0.0)
        tl.store(kept_x_ptr + place.to(tl.int64)[:, None] * kept_stride + c, x, mask=moved)
        tl.store(kept_x_ptr + beyond.to(tl.int64)[:, None] * kept_stride + c, tl.zeros_like(x), mask=cleared)


@triton.jit
def _scatter_kept_kernel(
    dx_ptr, place_ptr, out_ptr,  # pointers
    N, D,  # shapes
    dx_stride, out_stride,  # strides
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # constants
):  # fmt: skip
    """out[i] = dx[place[i]], in out's type; zeros for rows that went nowhere."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.load(place_ptr + rows, mask=rows < N, other=-1).to(tl.int64)
    for column in range(0, D, COLUMNS):
        c = (column + tl.arange(0, COLUMNS))[None, :]
        dx = tl.load(dx_ptr + place[:, None] * dx_stride + c, mask=(place >= 0)[:, None] & (c < D), other=0.0)
        at = rows.to(tl.int64)[:, None] * out_stride + c
        tl.store(out_ptr + at, dx.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (c < D))


def kept_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(order [N] int32, count [1] int32) of a mask [N] bool: order[:count] are its rows, the rest is not written."""
    N = len(mask)
    order = torch.empty(N, dtype=torch.int32, device=mask.device)
    count = torch.empty(1, dtype=torch.int32, device=mask.device)
    with on_device(mask):
        _kept_rows_kernel[(1,)](
            mask.contiguous().view(torch.uint8), order, count,
            N,
            BLOCK=16 if interpreting() else 4096, num_warps=8,
        )  # fmt: skip
    return order, count


class KeptRows(NamedTuple):
    """What `gather_rows` gives; of the first `count` of N rows, unless said otherwise."""

    x: Tensor  # (N, D) hidden states; zero to the end of the last tile
    label: Tensor  # (N,) int32, -1 outside the vocabulary
    lse: Tensor  # (N,) float32, in units of log 2
    coefficient: Tensor  # (N,) float32, of the logits before the scale
    terms: Tensor | None  # (3, N) float32, as they were given
    place: Tensor  # (N,) int32, of all rows: where each went, or -1
    count: Tensor  # (1,) int32


def gather_rows(
    hidden: Tensor,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    V: int,
    logit_scale: float,
    tile: int,
    terms: Tensor | None = None,
) -> KeptRows:
    """Rows with a coefficient that is not 0, in their order, by one launch.

    Args:
        hidden: [N, D], last dimension contiguous; labels: [N] of a vocabulary of V; coefficient, lse: [N] float32.
        tile: rows of a product's tile. terms: other coefficients, [3, N] float32, for which a row is kept, too.
    """
    N, D = hidden.shape

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=hidden.device)

    kept = KeptRows(
        empty_rows(N, D, hidden),
        empty(N, dtype=torch.int32),
        empty(N, dtype=torch.float32),
        empty(N, dtype=torch.float32),
        None if terms is None else empty(3, N, dtype=torch.float32),
        empty(N, dtype=torch.int32),
        empty(1, dtype=torch.int32),
    )
    _gather_kept_kernel[(triton.cdiv(N, MOVED["ROWS"]),)](
        hidden, labels.contiguous(), lse.contiguous(), coefficient.contiguous(), terms, kept.place, kept.count,
        kept.x, kept.label, kept.lse, kept.coefficient, kept.terms,
        N, V, D,
        hidden.stride(0), kept.x.stride(0),
        logit_scale, TERMS=terms is not None, TILE=tile, SCANNED=1024, **MOVED,
    )  # fmt: skip
    return kept


def scatter_rows(dx: Tensor, place: Tensor, like: Tensor) -> Tensor:
    """Rows of dx [K, D] to where they came from, by one launch: [N, D], zero elsewhere, in the type of `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    N, D = out.shape
    _scatter_kept_kernel[(triton.cdiv(N, MOVED["ROWS"]),)](
        dx, place, out,
        N, D,
        dx.stride(0), out.stride(0),
        **MOVED,
    )  # fmt: skip
    return out
