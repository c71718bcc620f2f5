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
    b = b.to(a.dtype)  # of a head of another type
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, *_float32(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> Tensor:
    """total = beta · total + a @ b, beta 0 or 1 (what is not written yet counts for nothing with 0).

    a (M, K), b (K, N), total (M, N) of their type or float32. On a CPU half-precision products are rounded before they
    are added, since its library has no others.
    """
    b = b.to(a.dtype)  # of a head of another type
    if a.dtype == total.dtype:
        return total.addmm_(a, b, beta=beta)
    if total.device.type != "cpu":
        return torch.addmm(total, a, b, *_float32(), beta=beta, out=total)
    return total.add_(torch.mm(a, b)) if beta else total.copy_(torch.mm(a, b))


def _float32() -> tuple[torch.dtype]:
    if "dtype_out" not in torch.ops.aten.mm.overloads():
        raise ImportError(
            "impl='chunked' on a GPU needs PyTorch 2.8 or newer, whose half-precision products can give float32; "
            "upgrade torch, or use impl='fused'"
        )
    return (torch.float32,)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has products of bfloat16 (AVX512-BF16, as every CPU with AMX has, too).

    Others emulate them, slower than float32's (an AVX-512 CPU without: 40 to 65 GFLOP/s, float32 190).
    """
    return torch.cpu._is_avx512_bf16_supported()


def gradient_product_dtype(hidden: torch.dtype) -> torch.dtype:
    """The type in which a CPU multiplies the gradient of logits with the hidden states and the head.

    That gradient is computed in float32 and, like the results, as large as its own rounding: bfloat16, where the CPU
    has it at twice the speed of float32 (measured on AVX512-BF16: 430 and 215 GFLOP/s), costs the eager precision.
    """
    native = hidden == torch.bfloat16 and multiplies_bfloat16()
    return hidden if native else torch.promote_types(hidden, torch.float32)


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets the CPU multiply float32 tensors that hold bfloat16 values as what they are.

    A product of two bfloat16 numbers is exact in float32, so bfloat16 units with float32 accumulation and output
    give full-precision logits, at two to three times the speed of float32 units where the CPU has AMX.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or matmul is None or not multiplies_bfloat16():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
