"""Argument checks shared by the public functions: one sentence that names the argument, what was expected,
what was given and, where there is one, the fix."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from tokensel.ops.products import HAS_TRITON, KERNEL_DTYPES
from tokensel_kernels.rates import RULE, choose

IMPLS = ("auto", "chunked", "reference", "fused")
AUTO_RULE = (
    "chunked on a CPU, in float64, with a head of another type than the hidden states, and where Triton is not "
    "installed; on a GPU, for attention mass and for existing logits, fused in half precision and chunked in float32; "
    f"there, from hidden states, {RULE}"
)


@functools.lru_cache
def _fastest(device: torch.device, work: str) -> str:
    from tokensel_kernels.tiles import chip_family

    impl: str = choose(torch.cuda.get_device_name(device), chip_family(device)[0], work)[0]
    return impl


def resolve_impl(
    impl: str, like: Tensor, shard: object = None, work: str | None = None, weight: Tensor | None = None
) -> str:
    """Turns `impl` into the implementation that runs on a tensor's device and dtype, by AUTO_RULE.

    work: "statistics" or "gradient" from hidden states, or None where `auto` has nothing to compare. weight: the head
    that hidden states are multiplied with.

    Raises:
        ValueError: an unknown name, `fused` with dtypes that it does not take, or `reference` with a part of a head
            (`shard` is not None), since it holds whole logits. ImportError: `fused` without
            Triton. What a device lacks, the kernels' tile table says (`tokensel_kernels.tiles`).
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    check_whole(impl, shard)
    other = None if weight is None or weight.dtype == like.dtype else weight.dtype
    if impl == "auto":
        if other is not None or like.device.type != "cuda" or like.dtype not in KERNEL_DTYPES or not HAS_TRITON:
            return "chunked"
        if work is None:
            return "chunked" if like.dtype == torch.float32 else "fused"
        return _fastest(like.device, work)
    if impl == "fused":
        if not HAS_TRITON:
            raise ImportError("impl='fused' needs Triton: pip install triton; or use impl='chunked'")
        if like.dtype not in KERNEL_DTYPES:
            raise ValueError(f"impl='fused' takes float16, bfloat16 or float32, not {like.dtype}; use impl='chunked'")
        if other is not None:
            raise ValueError(
                f"impl='fused' multiplies hidden states and weight of one type, not {like.dtype} and {other}; "
                "use impl='chunked'"
            )
    return impl


def check_whole(impl: str, shard: object) -> None:
    """`reference` takes no part of a head (`shard` is not None)."""
    if impl == "reference" and shard is not None:
        raise ValueError("impl='reference' holds whole logits, and weight is sharded over ranks; use impl='chunked'")


def check_tensor(name: str, value: object, *, floating: bool = False) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype; got {value.dtype}")
    return value


def check_same_device(**tensors: Tensor | None) -> None:
    (first, reference), *rest = [(n, t) for n, t in tensors.items() if t is not None]
    for name, tensor in rest:
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first} is on {reference.device}; move one with .to(device)"
            )


def check_shape(name: str, value: Tensor, shape: Sequence[int], like: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)} ({like}); got {list(value.shape)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [..., D], weight [V, D], bias [V] on one device; the hidden states, in a type that holds the weight's."""
    check_tensor("hidden", hidden, floating=True)
    check_tensor("weight", weight, floating=True)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [V, D]; got {list(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., D] with D = {weight.shape[1]} as in weight [V, D]; got {list(hidden.shape)}"
        )
    if bias is not None:
        check_shape("bias", check_tensor("bias", bias, floating=True), (weight.shape[0],), "[V]")
    check_same_device(hidden=hidden, weight=weight, bias=bias)
    return hidden.to(torch.promote_types(hidden.dtype, weight.dtype))


def check_same_vocabulary(**weights: Tensor) -> None:
    """weight [V, D] of two models, by their names: D may differ, V may not."""
    (first, reference), (name, weight) = weights.items()
    if weight.shape[0] != reference.shape[0]:
        raise ValueError(
            f"{name} weight has {weight.shape[0]} vocabulary rows but {first} weight has {reference.shape[0]}; "
            "both models need the same tokenizer"
        )


def may_read_values(like: Tensor) -> bool:
    """Whether a check may look at values of a tensor's device: always on a CPU, elsewhere if TOKENSEL_CHECK=1 asks for
    errors at once and by name, at the price of waiting for the device in every call."""
    return like.device.type == "cpu" or os.environ.get("TOKENSEL_CHECK") == "1"


def check_labels(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels of `shape`, int64 or int32, as int64."""
    check_tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be torch.int64 or torch.int32; got {labels.dtype}")
    check_shape("labels", labels, shape, "one label a row")
    return labels.long()


def check_shifted(labels: Tensor) -> None:
    """Labels [..., S] of sequences."""
    if check_tensor("labels", labels).dim() == 0:
        raise ValueError("shift=True takes labels [..., S] of sequences; got one label")


def check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Labels in [0, vocabulary) or `ignore_index`.

    The range is checked at once on a CPU or with TOKENSEL_CHECK=1, else by an asynchronous device-side assertion, so
    that the host never waits for the device. A compiled graph has no place for it. Whatever the labels are, no
    implementation but `reference` reads memory by them without a mask: a label that no logit has gives nll = inf.
    """
    if torch.compiler.is_compiling():
        return
    inside = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if not may_read_values(labels):
        torch._assert_async(inside.all(), "labels: outside [0, V) and not ignore_index; TOKENSEL_CHECK=1 names it")
    elif not bool(inside.all()):
        where = (~inside).nonzero()[0].tolist()
        raise ValueError(
            f"labels{where} is {int(labels[tuple(where)])}, outside [0, {vocabulary}) and not "
            f"ignore_index={ignore_index}"
        )


def check_seen(lse: Tensor, labels: Tensor, ignore_index: int, keep: Tensor | None) -> None:
    """Statistics, by their lse [...], have seen the vocabulary where a label counts; asked as `check_finite` asks."""
    if torch.compiler.is_compiling() or not may_read_values(labels):
        return
    unseen = (labels != ignore_index) & (lse == -torch.inf)
    if len(where := (unseen if keep is None else unseen & (keep != 0)).nonzero()):
        raise ValueError(f"stats have no lse for labels{where[0].tolist()}; make them with the same labels")


def check_finite(name: str, values: Tensor | None) -> None:
    """No infinity and no NaN; asked where the device need not be waited for (`may_read_values`)."""
    if values is None or torch.compiler.is_compiling() or not may_read_values(values):
        return
    if not bool((finite := values.isfinite()).all()):
        place = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(f"{name} is {float(values[place])} in row {place[0]}; it must be finite")


def check_token_range(input_ids: Tensor, rows: int, model: str) -> None:
    """Token ids below the number of rows that a model has for them, in embeddings and head; checked as labels are."""
    if torch.compiler.is_compiling():
        return
    if not may_read_values(input_ids):
        torch._assert_async((input_ids < rows).all(), "input_ids: a token that the model has no row for")
    elif (largest := int(input_ids.max())) >= rows:
        raise ValueError(
            f"input_ids have token {largest}, but {model} has rows for {rows} tokens; resize its embeddings, or choose "
            "a model that knows this token"
        )


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")


def check_positive(name: str, value: float | None) -> None:
    if value is not None:
        check_number(name, value)
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")
