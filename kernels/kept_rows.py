"""Which rows take part, found on the device: their numbers in order, and how many, without the host waiting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensel_kernels.tiles import interpreting, on_device


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
