"""Ways of doing each work: tokensel, the published code's, and what people would use instead. A way that cannot run
here raises `Absent` with the reason, which is recorded in its place.

Each entry of WAYS[work] takes a case's inputs (`benchmarks.speed.inputs`), prepares what is not to be timed, and returns the
function that is.
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
from benchmarks.speed.cases import Case
from benchmarks.speed.inputs import AttentionInputs, HeadInputs, Inputs, LogitsInputs, ModelInputs, eager_mass
from tokensel.model import PatchedModel
from tokensel.ops.products import exact_products, gradient_product_dtype
from tokensel.ops.stats import vocabulary_blocks


class Absent(Exception):
    """Why a way cannot run here."""


def _need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("needs a GPU")


def _tokensel_impl(impl: str, device: torch.device) -> str:
    if impl == "fused" and device.type != "cuda":
        from tokensel_kernels.tiles import interpreting

        if not interpreting():
            raise Absent("needs a GPU, or TRITON_INTERPRET=1")
    return impl


# Losses from hidden states and head: each way says how it gets the losses of all rows under both models, and the loss
# of kept rows, which may use what the first has found (`known`).


class Tokensel:
    def __init__(self, impl: str) -> None:
        self.impl = impl

    def losses(self, s: HeadInputs) -> tuple[Tensor, Tensor, object]:
        models = ((s.hidden, s.weight), (s.old_hidden, s.old_weight))
        now, old = tokensel.token_stats_pair(*models, s.labels, impl=self.impl)
        return now.nll, old.nll, now

    def kept_loss(self, s: HeadInputs, keep: Tensor, known: object) -> Tensor:
        return tokensel.selected_cross_entropy(s.hidden, s.weight, s.labels, keep, stats=known, impl=self.impl)


class Published:
    """As the published code: [N, V] logits of both models, float32 cross-entropy, masked mean over all rows."""

    def _nll(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    def losses(self, s: HeadInputs) -> tuple[Tensor, Tensor, object]:
        with torch.no_grad():
            old = self._nll(s.old_hidden, s.old_weight, s.labels)
        nll = self._nll(s.hidden, s.weight, s.labels)
        return nll.detach(), old, nll

    def kept_loss(self, s: HeadInputs, keep: Tensor, known: object) -> Tensor:
        nll = known if isinstance(known, Tensor) else self._nll(s.hidden, s.weight, s.labels)
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
        return nll.float(), self.each(s.old_hidden, s.old_weight, s.labels).float(), None

    def kept_loss(self, s: HeadInputs, keep: Tensor, known: object) -> Tensor:
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
    _need_gpu(device)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    return LinearLoss(functools.partial(loss, reduction="none"), loss)


def _liger_scaled(device: torch.device) -> LinearLoss:
    _need_gpu(device)
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as loss

    return LinearLoss(loss.apply, lambda *args: loss.apply(*args).mean())


def _cce(device: torch.device) -> LinearLoss:
    _need_gpu(device)
    from cut_cross_entropy import linear_cross_entropy as loss

    return LinearLoss(functools.partial(loss, reduction="none"), loss)


def _quack(device: torch.device) -> LinearLoss:
    _need_gpu(device)
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
    "tokensel fused": lambda device: Tokensel(_tokensel_impl("fused", device)),
    "published": lambda device: Published(),
    **OTHER_LOSSES,
}


def _pair_stats(make: Callable, s: HeadInputs) -> Callable:
    way = make(s.device)
    return torch.no_grad()(lambda: {"nll": way.losses(s)[:2]})


def _kept_backward(make: Callable, s: HeadInputs) -> Callable:
    way = make(s.device)
    known = way.losses(s)[2] if isinstance(way, Tokensel) else None

    def run() -> dict:
        loss = way.kept_loss(s, s.given_keep, known)
        loss.backward()
        return {"loss": loss.detach(), "keep": s.given_keep}

    return run


def _selection_step(make: Callable, s: HeadInputs) -> Callable:
    way = make(s.device)

    def run() -> dict:
        nll, old_nll, known = way.losses(s)
        s.mark("statistics")
        keep = s.keep(nll, old_nll)
        s.mark("selection")
        loss = way.kept_loss(s, keep, known)
        loss.backward()
        s.mark("backward")
        return {"loss": loss.detach(), "keep": keep}

    return run


def _head_floor(work: str, s: HeadInputs, native: bool = False) -> Callable:
    """The matrix products of the work and nothing else: on a GPU the library's own, whole; on a CPU in tokensel's
    blocks and precision, or as on a GPU (`native`): in the inputs' type, half precision in and half precision out."""
    x, old_x, w, old_w = (t.detach() for t in (s.hidden, s.old_hidden, s.weight, s.old_weight))
    kept = x[: int(s.given_keep.sum())]
    narrow_kept, narrow_w = kept, w  # what the gradient of the logits is multiplied with
    (N, D), V = x.shape, len(w)
    R, C = N, V
    if s.device.type == "cpu" and not native:
        narrow = gradient_product_dtype(s.dtype)
        narrow_kept, narrow_w = kept.to(narrow), w.to(narrow)
        x, old_x, w, old_w, kept = (t.float() for t in (x, old_x, w, old_w, kept))
        R, C = vocabulary_blocks(N, V, 256)
    z, narrow_z = x.new_empty(R, C), torch.randn(R, C, device=s.device).to(narrow_kept.dtype)
    dx, dw = torch.zeros_like(narrow_kept), narrow_kept.new_empty(C, D)
    models = [] if work == "kept_backward" else [(x, w), (old_x, old_w)]
    backward = work != "pair_stats"

    def run() -> None:
        with exact_products(s.dtype):
            for start in range(0, V, C):
                columns = slice(start, start + C)
                for rows, head in [*models, *([(kept, w)] if backward else [])]:
                    for part in rows.split(R):
                        torch.mm(part, head[columns].T, out=z[: len(part), : len(head[columns])])
                for first in range(0, len(kept) if backward else 0, R):
                    part, head = narrow_kept[first : first + R], narrow_w[columns]
                    dz = narrow_z[: len(part), : len(head)]
                    dx[first : first + R].addmm_(dz, head)
                    torch.mm(dz.T, part, out=dw[: len(head)])

    return run


# From logits.


def _logits_tokensel(impl: str, s: LogitsInputs) -> Callable:
    _tokensel_impl(impl, s.device)

    def run() -> dict:
        now, old = tokensel.token_stats_from_logits(s.logits, s.labels, s.old_logits, impl=impl)
        return {"nll": (now.nll, old.nll)}

    return run


def _logits_torch(wrap: Callable, s: LogitsInputs) -> Callable:
    nll = wrap(lambda z: F.cross_entropy(z.float(), s.labels, reduction="none"))
    return torch.no_grad()(lambda: {"nll": (nll(s.logits), nll(s.old_logits))})


def _logits_floor(s: LogitsInputs) -> Callable:
    """A copy of one model's logits moves as many bytes as reading both models'."""
    copy = torch.empty_like(s.logits)

    def run() -> None:
        copy.copy_(s.logits)

    return run


# Attention mass.


def _mass_tokensel(impl: str, with_lse: bool, s: AttentionInputs) -> Callable:
    _tokensel_impl(impl, s.device)
    lse = s.lse if with_lse else None
    return lambda: {"mass": tokensel.prompt_attention_mass(s.q, s.k, s.prompt, lse=lse, impl=impl)}


def _mass_eager(s: AttentionInputs) -> Callable:
    """As the published code: the [S, S] softmax of every head, in float32."""
    return lambda: {"mass": eager_mass(s.q, s.expanded_k, s.prompt)}


def _mass_indicator(s: AttentionInputs) -> Callable:
    """SDPA whose value says whether a key is prompt: any kernel of PyTorch's gives the mass."""
    value = s.prompt[:, None, :, None].to(s.q.dtype).expand(*s.q.shape).contiguous()  # expanded takes a slow path

    def run() -> dict:
        mass = F.scaled_dot_product_attention(s.q, s.expanded_k, value, is_causal=True)[..., 0]
        return {"mass": mass.float().mean(1) * ~s.prompt}

    return run


def _flash(s: AttentionInputs) -> Callable:
    """The attention itself: what the mass is measured against."""

    def run() -> None:
        s.flash()

    return run


def _cudnn(s: AttentionInputs) -> Callable:
    """The same by cuDNN, the faster one on a Hopper GPU."""
    _need_gpu(s.device)

    def run() -> None:
        torch.ops.aten._scaled_dot_product_cudnn_attention(s.q, s.k, s.k, None, False, 0.0, True)

    return run


def _square_floor(s: AttentionInputs | ModelInputs) -> Callable:
    """A square product: its rate turns the work's operations into seconds."""
    a, b = torch.randn(2, s.square, s.square, device=s.device).to(s.dtype)
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)

    return run


# A whole model's step.


def _plain_step(make: Callable | None, s: ModelInputs) -> Callable:
    """Supervised fine-tuning on every response token, by a loss of others or by the model's own full logits."""
    loss_of = make(s.device) if make else None

    def run() -> dict:
        if loss_of is None:
            loss = s.model(input_ids=s.input_ids, labels=s.labels, use_cache=False).loss
        else:
            hidden = s.model.model(input_ids=s.input_ids, use_cache=False).last_hidden_state[:, :-1]
            labels = s.labels[:, 1:][s.response]
            loss = loss_of.mean(hidden[s.response], s.model.lm_head.weight, labels)
        loss.backward()
        return {"loss": loss.detach()}

    return run


class _SameModel:
    """A live history that is the model itself, so that it costs what every live history does: a forward."""

    signal, shares_head = "history_nll", True

    @torch.no_grad()
    def hidden(self, patched: PatchedModel, batch: dict) -> Tensor:
        return patched.backbone(batch)


def _selective_step(impl: str, history: str, s: ModelInputs) -> Callable:
    """ssToken with a recorded history or a live one, whose second forward the floor does not hold."""
    _tokensel_impl(impl, s.device)
    method = tokensel.methods.get("sstoken", gamma=0.5, rho=s.rho)
    live = _SameModel() if history == "live" else None
    select = tokensel.Selection(method, history=live, impl=impl)
    recorded = {} if live else {"history_nll": s.history_nll}

    def run() -> dict:
        out = s.model(input_ids=s.input_ids, labels=s.labels, selection=select, use_cache=False, **recorded)
        out.loss.backward()
        return {"loss": out.loss.detach(), "keep": out.weights[:, 1:] != 0, "live": live is not None}

    return run


def _published_step(s: ModelInputs) -> Callable:
    """As the published code: full logits, and the last layer's [S, S] attention computed again from its input."""
    mass = torch.no_grad()(s.mass)

    def run() -> dict:
        out = s.model(input_ids=s.input_ids, use_cache=False, output_hidden_states=True)
        logits = out.logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), s.labels[:, 1:].flatten(), reduction="none").view_as(s.response)
        keep = s.keep(nll.detach(), mass(out.hidden_states[-2])[:, 1:])
        loss = (nll * keep).sum() / keep.sum()
        loss.backward()
        return {"loss": loss.detach(), "keep": keep}

    return run


WAYS: dict[str, dict[str, Callable]] = {
    "pair_stats": {name: functools.partial(_pair_stats, make) for name, make in HEAD_WAYS.items()},
    "kept_backward": {name: functools.partial(_kept_backward, make) for name, make in HEAD_WAYS.items()},
    "selection_step": {name: functools.partial(_selection_step, make) for name, make in HEAD_WAYS.items()},
    "stats_from_logits": {
        "tokensel chunked": functools.partial(_logits_tokensel, "chunked"),
        "tokensel fused": functools.partial(_logits_tokensel, "fused"),
        "published": functools.partial(_logits_torch, lambda function: function),
        "compiled": functools.partial(_logits_torch, torch.compile),
    },
    "attention_mass": {
        "tokensel chunked": functools.partial(_mass_tokensel, "chunked", False),
        "tokensel chunked, lse": functools.partial(_mass_tokensel, "chunked", True),
        "tokensel fused": functools.partial(_mass_tokensel, "fused", False),
        "tokensel fused, lse": functools.partial(_mass_tokensel, "fused", True),
        "published": _mass_eager,
        "SDPA, indicator": _mass_indicator,
        "flash forward": _flash,
        "cuDNN forward": _cudnn,
    },
    "training_step": {
        "tokensel chunked, recorded": functools.partial(_selective_step, "chunked", "recorded"),
        "tokensel chunked, live": functools.partial(_selective_step, "chunked", "live"),
        "tokensel fused, recorded": functools.partial(_selective_step, "fused", "recorded"),
        "tokensel fused, live": functools.partial(_selective_step, "fused", "live"),
        "published": _published_step,
        "SFT": functools.partial(_plain_step, None),
        **{f"SFT, {name}": functools.partial(_plain_step, make) for name, make in OTHER_LOSSES.items()},
    },
}
FLOORS: dict[str, Callable] = {
    **{work: functools.partial(_head_floor, work) for work in ("pair_stats", "kept_backward", "selection_step")},
    "stats_from_logits": _logits_floor,
    "attention_mass": _square_floor,
    "training_step": _square_floor,
}


def native_floor(s: Inputs) -> Callable | None:
    """The floor of a head's work in the inputs' type, where it is another than FLOORS has: half precision on a CPU."""
    if isinstance(s, HeadInputs) and s.device.type == "cpu" and s.dtype != torch.float32:
        return _head_floor(s.case.work, s, native=True)
    return None


def ways_of(case: Case) -> dict[str, Callable]:
    """The ways of a case's work; where it grows, only tokensel's and the published one."""
    ways = WAYS[case.work]
    return {n: w for n, w in ways.items() if case.group != "growth" or n.startswith(("tokensel", "published"))}
