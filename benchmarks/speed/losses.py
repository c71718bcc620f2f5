"""Losses from hidden states and head, by tokensel, by the published code and by what people would use instead.

Each way says how it gets the losses of all rows under both models, and the loss of kept rows. The second may use what
the first has computed and handed on (`first`). A way that cannot run here raises `Absent`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokensel
from benchmarks.speed.inputs import HeadInputs, capped

TRL_COLUMNS = 32768  # of the vocabulary at once, as its trainers take


class Absent(Exception):
    """Why a way cannot run here."""


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("needs a GPU")


def no_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise Absent("has no softcap")


def available(impl: str, device: torch.device) -> str:
    """The implementation of tokensel's, where it can run."""
    if impl == "fused" and device.type != "cuda":
        from tokensel_kernels.tiles import interpreting

        if not interpreting():
            raise Absent("needs a GPU, or TRITON_INTERPRET=1")
    return impl


class Tokensel:
    def __init__(self, impl: str, softcap: float | None = None) -> None:
        self.head = {"impl": impl, "softcap": softcap}

    def losses(self, s: HeadInputs) -> tuple[Tensor, Tensor, object]:
        models = ((s.hidden, s.weight), (s.history_hidden, s.history_weight))
        current, history = tokensel.token_stats_pair(*models, s.labels, **self.head)
        return current.nll, history.nll, current

    def kept_loss(self, s: HeadInputs, keep: Tensor, first: object) -> Tensor:
        return tokensel.selected_cross_entropy(s.hidden, s.weight, s.labels, keep, stats=first, **self.head)


class Published:
    """As the published code: [N, V] logits of both models, float32 cross-entropy, masked mean over all rows."""

    def __init__(self, softcap: float | None = None) -> None:
        self.softcap = softcap

    def _nll(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(capped((hidden @ weight.T).float(), self.softcap), labels, reduction="none")

    def losses(self, s: HeadInputs) -> tuple[Tensor, Tensor, object]:
        with torch.no_grad():
            history_nll = self._nll(s.history_hidden, s.history_weight, s.labels)
        nll = self._nll(s.hidden, s.weight, s.labels)
        return nll.detach(), history_nll, nll

    def kept_loss(self, s: HeadInputs, keep: Tensor, first: object) -> Tensor:
        nll = first if isinstance(first, Tensor) else self._nll(s.hidden, s.weight, s.labels)
        return (nll * keep).sum() / keep.sum()


@dataclass(frozen=True)
class LinearLoss:
    """A linear cross-entropy of others. One call with a gradient for every row would form all rows' gradients, so
    losses come first, without, and a second call on the kept rows: its fastest use (but see `_quack`)."""

    each: Callable[[Tensor, Tensor, Tensor], Tensor]  # (N, D), (V, D), (N,) -> (N,)
    mean: Callable[[Tensor, Tensor, Tensor], Tensor]  # the same -> scalar

    @torch.no_grad()
    def losses(self, s: HeadInputs) -> tuple[Tensor, Tensor, object]:
        nll = self.each(s.hidden.detach(), s.weight.detach(), s.labels)
        return nll.float(), self.each(s.history_hidden, s.history_weight, s.labels).float(), None

    def kept_loss(self, s: HeadInputs, keep: Tensor, first: object) -> Tensor:
        return self.mean(s.hidden[keep], s.weight, s.labels[keep])


def _mean_of(each: Callable[..., Tensor]) -> LinearLoss:
    return LinearLoss(each, lambda *args: each(*args).mean())


def _torch(device: torch.device, softcap: float | None, chunked: bool) -> LinearLoss:
    no_softcap(softcap)
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"PyTorch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return LinearLoss(*(functools.partial(F.linear_cross_entropy, reduction=r, **options) for r in ("none", "mean")))


def _compiled(device: torch.device, softcap: float | None) -> LinearLoss:
    """Row chunks of 1,024 through torch.compile, their logits computed again in the backward."""

    @torch.compile
    def chunk(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(capped((x @ weight.T).float(), softcap), y, reduction="none")

    def each(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        pieces = zip(hidden.split(1024), labels.split(1024), strict=True)
        return torch.cat([checkpoint(chunk, x, weight, y, use_reentrant=False) for x, y in pieces])

    return _mean_of(each)


def _liger(device: torch.device, softcap: float | None, backend: str | None) -> LinearLoss:
    """Liger's fused loss: its Triton kernels, or those that LIGER_KERNEL_IMPL would put in their place."""
    need_gpu(device)
    functional = importlib.import_module("liger_kernel.transformers.functional")
    name = "LigerFusedLinearCrossEntropyFunction"
    package = f"liger_kernel.ops.{backend}.ops" if backend else "liger_kernel.ops"
    kernels = getattr(importlib.import_module(f"{package}.fused_linear_cross_entropy"), name)

    def loss(*args: Tensor, reduction: str) -> Tensor:
        with mock.patch.object(functional, name, kernels):
            return functional.liger_fused_linear_cross_entropy(*args, reduction=reduction, softcap=softcap)

    return LinearLoss(*(functools.partial(loss, reduction=r) for r in ("none", "mean")))


def _liger_scaled(device: torch.device, softcap: float | None, backend: str | None) -> LinearLoss:
    """Its newer loss: CuTe kernels on Hopper by its own choice, or cuTile's."""
    need_gpu(device)
    no_softcap(softcap)
    package = f"liger_kernel.ops.{backend}.ops" if backend else "liger_kernel.ops"
    module = importlib.import_module(f"{package}.fused_linear_scaled_cross_entropy")
    return _mean_of(module.LigerFusedLinearScaledCrossEntropyFunction.apply)


def _cce(device: torch.device, softcap: float | None) -> LinearLoss:
    need_gpu(device)
    from cut_cross_entropy import linear_cross_entropy

    return LinearLoss(
        *(functools.partial(linear_cross_entropy, softcap=softcap, reduction=r) for r in ("none", "mean"))
    )


def _quack(device: torch.device, softcap: float | None) -> LinearLoss:
    need_gpu(device)
    no_softcap(softcap)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    # not its fastest use: its chunked form gives no loss of each row, and this one holds bfloat16 logits, [N, V]
    def each(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy_func(hidden, weight, None, labels, reduction="none")

    return LinearLoss(each, chunked_linear_cross_entropy)


def _trl(device: torch.device, softcap: float | None) -> LinearLoss:
    """TRL's chunked log-probabilities, log p alone: library products, folded by a Triton kernel, on CPUs by PyTorch."""
    from trl.kernels import ChunkedLogProbFunction

    def each(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_COLUMNS, softcap, 1.0, ())[0]

    return _mean_of(each)


# What makes each loss, from the device and the softcap of the case.
OTHER_LOSSES: dict[str, Callable[[torch.device, float | None], LinearLoss]] = {
    "torch": functools.partial(_torch, chunked=False),
    "torch chunked": functools.partial(_torch, chunked=True),
    "compiled chunks": _compiled,
    "Liger": functools.partial(_liger, backend=None),
    "Liger, cuTile": functools.partial(_liger, backend="cutile"),
    "Liger, CuTe": functools.partial(_liger, backend="cutedsl"),
    "Liger scaled": functools.partial(_liger_scaled, backend=None),
    "Liger scaled, cuTile": functools.partial(_liger_scaled, backend="cutile"),
    "TRL chunked": _trl,
    "CCE": _cce,
    "QuACK": _quack,
}
HEAD_WAYS: dict[str, Callable[[torch.device, float | None], object]] = {
    "tokensel chunked": lambda device, softcap: Tokensel("chunked", softcap),
    "tokensel fused": lambda device, softcap: Tokensel(available("fused", device), softcap),
    "published": lambda device, softcap: Published(softcap),
    **OTHER_LOSSES,
}
