"""Losses from hidden states and head, by tokensel, by the published code and by what people would use instead.

Each way says how it gets the losses of all rows under both models, and the loss of kept rows. The second may use what
the first has computed and handed on (`first`). A way that cannot run here raises `Absent`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokensel
from benchmarks.speed.inputs import HeadInputs


class Absent(Exception):
    """Why a way cannot run here."""


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("needs a GPU")


def available(impl: str, device: torch.device) -> str:
    """The implementation of tokensel's, where it can run."""
    if impl == "fused" and device.type != "cuda":
        from tokensel_kernels.tiles import interpreting

        if not interpreting():
            raise Absent("needs a GPU, or TRITON_INTERPRET=1")
    return impl


class Tokensel:
    def __init__(self, impl: str) -> None:
        self.impl = impl

    def losses(self, s: HeadInputs) -> tuple[Tensor, Tensor, object]:
        models = ((s.hidden, s.weight), (s.history_hidden, s.history_weight))
        current, history = tokensel.token_stats_pair(*models, s.labels, impl=self.impl)
        return current.nll, history.nll, current

    def kept_loss(self, s: HeadInputs, keep: Tensor, first: object) -> Tensor:
        return tokensel.selected_cross_entropy(s.hidden, s.weight, s.labels, keep, stats=first, impl=self.impl)


class Published:
    """As the published code: [N, V] logits of both models, float32 cross-entropy, masked mean over all rows."""

    def _nll(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

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


def _torch(device: torch.device, chunked: bool) -> LinearLoss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"PyTorch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return LinearLoss(*(functools.partial(F.linear_cross_entropy, reduction=r, **options) for r in ("none", "mean")))


def _compiled(device: torch.device) -> LinearLoss:
    """Row chunks of 1,024 through torch.compile, their logits computed again in the backward."""

    @torch.compile
    def chunk(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), y, reduction="none")

    def each(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        pieces = zip(hidden.split(1024), labels.split(1024), strict=True)
        return torch.cat([checkpoint(chunk, x, weight, y, use_reentrant=False) for x, y in pieces])

    return LinearLoss(each, lambda *args: each(*args).mean())


def _liger(device: torch.device) -> LinearLoss:
    need_gpu(device)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    return LinearLoss(functools.partial(loss, reduction="none"), loss)


def _liger_scaled(device: torch.device) -> LinearLoss:
    need_gpu(device)
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as loss

    return LinearLoss(loss.apply, lambda *args: loss.apply(*args).mean())


def _cce(device: torch.device) -> LinearLoss:
    need_gpu(device)
    from cut_cross_entropy import linear_cross_entropy as loss

    return LinearLoss(functools.partial(loss, reduction="none"), loss)


def _quack(device: torch.device) -> LinearLoss:
    need_gpu(device)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    # not its fastest use: its chunked form gives no loss of each row, and this one holds bfloat16 logits, [N, V]
    def each(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy_func(hidden, weight, None, labels, reduction="none")

    return LinearLoss(each, chunked_linear_cross_entropy)


OTHER_LOSSES: dict[str, Callable[[torch.device], LinearLoss]] = {
    "torch": functools.partial(_torch, chunked=False),
    "torch chunked": functools.partial(_torch, chunked=True),
    "compiled chunks": _compiled,
    "Liger": _liger,
    "Liger scaled": _liger_scaled,
    "CCE": _cce,
    "QuACK": _quack,
}
HEAD_WAYS: dict[str, Callable[[torch.device], object]] = {
    "tokensel chunked": lambda device: Tokensel("chunked"),
    "tokensel fused": lambda device: Tokensel(available("fused", device)),
    "published": lambda device: Published(),
    **OTHER_LOSSES,
}
