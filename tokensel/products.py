"""Matrix products of half-precision inputs with float32 results, as each device does them best.

bfloat16 logits (spacing 0.125 at a logit of 20) are as coarse as the losses being compared, so no product of the head
is ever rounded to the type of its inputs.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(like: Tensor) -> bool:
    """Whether the chunked implementation runs as products of the GPU's library with a Triton kernel behind each."""
    return like.device.type == "cuda" and HAS_TRITON and like.dtype in KERNEL_DTYPES


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b on a GPU into float32 `out`. a (M, K), b (K, N), out (M, N).

    Raises:
        ImportError: half-precision inputs on a PyTorch older than 2.8.
    """
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, *_float32(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b on a GPU, total float32. a (M, K), b (K, N), total (M, N)."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, *_float32(), out=total)


def _float32() -> tuple[torch.dtype]:
    if "dtype_out" not in torch.ops.aten.mm.overloads():
        raise ImportError(
            "impl='chunked' on a GPU needs PyTorch 2.8 or newer, whose half-precision products can give float32; "
            "upgrade torch, or use impl='fused'"
        )
    return (torch.float32,)


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets the CPU multiply float32 tensors that hold bfloat16 values as what they are.

    A product of two bfloat16 numbers is exact in float32, so bfloat16 units with float32 accumulation and output
    give full-precision logits, at two to three times the speed of float32 units where the CPU has AMX.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
