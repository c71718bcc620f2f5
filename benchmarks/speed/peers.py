"""Ways of doing each work: tokensel, the published code's, and what people would use instead. A way that cannot run
here raises `Absent` with the reason, which is recorded in its place.

Each entry of WAYS[work] takes a case's inputs (`benchmarks.speed.inputs`), prepares what is not to be timed, and
returns the function that is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import tokensel
from benchmarks.speed.cases import Case
from benchmarks.speed.inputs import AttentionInputs, HeadInputs, LogitsInputs, ModelInputs, eager_mass
from benchmarks.speed.losses import HEAD_WAYS, OTHER_LOSSES, Tokensel, available, need_gpu
from tokensel.history import LiveHistory
from tokensel.model import PatchedModel

# From hidden states and head.


def _pair_stats(make: Callable, s: HeadInputs) -> Callable:
    way = make(s.device, s.softcap)
    return torch.no_grad()(lambda: {"nll": way.losses(s)[:2]})


def _kept_backward(make: Callable, s: HeadInputs) -> Callable:
    way = make(s.device, s.softcap)
    stats = way.losses(s)[2] if isinstance(way, Tokensel) else None

    def run() -> dict:
        loss = way.kept_loss(s, s.given_keep, stats)
        loss.backward()
        return {"loss": loss.detach(), "keep": s.given_keep}

    return run


def _selection_step(make: Callable, s: HeadInputs) -> Callable:
    way = make(s.device, s.softcap)

    def run() -> dict:
        nll, history_nll, first = way.losses(s)
        s.mark("statistics")
        keep = s.keep(nll, history_nll)
        s.mark("selection")
        loss = way.kept_loss(s, keep, first)
        loss.backward()
        s.mark("backward")
        return {"loss": loss.detach(), "keep": keep}

    return run


# From logits.


def _logits_tokensel(impl: str, s: LogitsInputs) -> Callable:
    available(impl, s.device)

    def run() -> dict:
        current, history = tokensel.token_stats_from_logits(s.logits, s.labels, s.history_logits, impl=impl)
        return {"nll": (current.nll, history.nll)}

    return run


def _logits_torch(wrap: Callable, s: LogitsInputs) -> Callable:
    nll = wrap(lambda z: F.cross_entropy(z.float(), s.labels, reduction="none"))
    return torch.no_grad()(lambda: {"nll": (nll(s.logits), nll(s.history_logits))})


# Attention mass.


def _mass_tokensel(impl: str, with_lse: bool, s: AttentionInputs) -> Callable:
    available(impl, s.device)
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


def _mass_varlen(with_lse: bool, s: AttentionInputs) -> Callable:
    """From the layout of FlashAttention's variable-length functions: [T, H, d], documents one after the other."""
    available("fused", s.device)
    q, k = (t[0].transpose(0, 1) for t in (s.q, s.k))
    borders = torch.tensor([0, len(q)], dtype=torch.int32, device=s.device)
    lse = s.lse[0] if with_lse else None
    mass = functools.partial(tokensel.prompt_attention_mass_varlen, q, k, s.prompt[0], borders, lse=lse, impl="fused")
    return lambda: {"mass": mass()[None]}


def _flash(s: AttentionInputs) -> Callable:
    """The attention itself: what the mass is measured against."""

    def run() -> None:
        s.flash()

    return run


def _flash_attention(module: str, s: AttentionInputs) -> Callable:
    """The same by FlashAttention's own packages: 2 (PyTorch's is one, too) or 3, which is for Hopper."""
    need_gpu(s.device)
    attention = importlib.import_module(module).flash_attn_func
    q, k = (t.transpose(1, 2) for t in (s.q, s.k))  # (1, S, H, d)

    def run() -> None:
        attention(q, k, k, causal=True)

    return run


def _cudnn(s: AttentionInputs) -> Callable:
    """The same by cuDNN, the faster one on a Hopper GPU."""
    need_gpu(s.device)

    def run() -> None:
        torch.ops.aten._scaled_dot_product_cudnn_attention(s.q, s.k, s.k, None, False, 0.0, True)

    return run


# A whole model's step.


def _plain_step(make: Callable | None, s: ModelInputs) -> Callable:
    """Supervised fine-tuning on every response token, by a loss of others or by the model's own full logits."""
    loss_of = make(s.device, None) if make else None

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


class _SameModel(LiveHistory):
    """A live history that is the model itself, so that it costs what every live history does: a forward."""

    signal, shares_head = "history_nll", True

    @torch.no_grad()
    def hidden(self, patched: PatchedModel, batch: dict) -> Tensor:
        return patched.backbone(batch)


def _selective_step(impl: str, history: str, s: ModelInputs) -> Callable:
    """ssToken with a recorded history or a live one, whose second forward the floor does not hold."""
    available(impl, s.device)
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
        "tokensel fused, varlen": functools.partial(_mass_varlen, False),
        "tokensel fused, varlen, lse": functools.partial(_mass_varlen, True),
        "published": _mass_eager,
        "SDPA, indicator": _mass_indicator,
        "flash forward": _flash,
        "FlashAttention 2 forward": functools.partial(_flash_attention, "flash_attn"),
        "FlashAttention 3 forward": functools.partial(_flash_attention, "flash_attn_interface"),
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


def ways_of(case: Case) -> dict[str, Callable]:
    """The ways of a case's work; where it grows, only tokensel's and the published one."""
    ways = WAYS[case.work]
    return {n: w for n, w in ways.items() if case.group != "growth" or n.startswith(("tokensel", "published"))}
