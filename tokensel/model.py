"""The model seam (steps 1 to 3): q and k of chosen layers captured on the way, the language-model head as a place to
call into. Nothing of the model is copied; `remove` puts everything back."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tokensel.attention import prompt_attention_mass
from tokensel.reference import visible_keys
from tokensel.stats import token_stats

# The private name under which one attention module finds the capturing function. The model's own config keeps its
# name: masks are made from it, and a model-wide name without a mask entry would silently ignore padding.
_IMPLEMENTATION = "tokensel_capture"


@dataclass
class Captured:
    """q [B, Hq, S, d] and k [B, Hk, S, d] of one attention call, after rotary embedding, and the call's options."""

    q: Tensor
    k: Tensor
    options: dict  # scale, softcap, window, sinks as prompt_attention_mass takes them


@dataclass
class _Capture:
    """The state that the capturing attention function finds on its module."""

    layer: int
    config: object  # the module's own config, which the base implementation must see
    armed: bool = False
    captured: Captured | None = None
    eager_weights: Callable | None = None  # only during the self-test
    weights: Tensor | None = field(default=None, repr=False)


def _capturing_attention(module, query, key, value, attention_mask, **kwargs):
    """Delegates to the base implementation; keeps q and k while armed."""
    capture: _Capture = module._tokensel_capture
    if capture.armed:
        options = {
            "scale": kwargs.get("scaling"),
            "softcap": kwargs.get("softcap"),
            "window": kwargs.get("sliding_window"),
            "sinks": kwargs.get("s_aux"),
        }
        capture.captured = Captured(query.detach(), key.detach(), options)
    if capture.eager_weights is not None:
        seen = torch.ones(1, query.shape[2], dtype=torch.bool, device=query.device)
        hidden = ~visible_keys(seen, None, kwargs.get("sliding_window"))[:, None]  # (1, 1, S, S)
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, torch.finfo(query.dtype).min)
        capture.weights = capture.eager_weights(module, query, key, value, mask, **kwargs)[1]
    # FlashAttention's wrapper reads the implementation's name off the module, and would take ours for a Hub kernel
    ours, module.config = module.config, capture.config
    try:
        name = capture.config._attn_implementation
        base = _eager_function(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        return base(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = ours


def _eager_function(module: nn.Module) -> Callable | None:
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


class Seam:
    """What `apply_to` leaves on a causal language model.

    Attributes:
        model: the unwrapped causal language model.
        head_options: softcap and logit_scale of the model's head, as `token_stats` takes them.
        layers: indices of the layers whose attention is captured.
    """

    def __init__(self, model: PreTrainedModel, layer: int | Sequence[int]) -> None:
        self.model = model
        self._head = _plain_head(model)
        modules = _attention_modules(model, layer)
        self.layers = tuple(modules)
        self._attention = list(modules.values())
        self._captures = [_Capture(index, module.config) for index, module in modules.items()]
        config = model.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None)
        self.head_options = {
            "softcap": getattr(config, "final_logit_softcapping", None),
            "logit_scale": 1 / divisor if divisor else getattr(config, "logit_scale", None) or 1.0,
        }

    def backbone(self, inputs: dict) -> Tensor:
        """Forward of the model without its head -> final hidden states [B, S, D]."""
        given = {name: value for name, value in inputs.items() if value is not None}  # PEFT passes Nones along
        return self.model.base_model(**given | {"use_cache": False, "return_dict": True}).last_hidden_state

    @contextlib.contextmanager
    def capture(self) -> Iterator[Callable[[], list[Captured]]]:
        """Arms the layers around a forward; yields a function that hands over what each of them caught.

        Armed only here, so a checkpointed layer's recomputation in the backward is not seen.
        """
        for capture in self._captures:
            capture.armed, capture.captured = True, None
        try:
            yield self._take
        finally:
            for capture in self._captures:
                capture.armed, capture.captured = False, None

    def _take(self) -> list[Captured]:
        taken = []
        for capture in self._captures:
            if capture.captured is None:
                raise ValueError(
                    f"layer {capture.layer} of {type(self.model).__name__} made no call through transformers' "
                    "attention interface, so its attention cannot be captured; choose another layer or a method "
                    "without attention"
                )
            taken.append(capture.captured)
            capture.captured = None
        return taken

    def call_head(self, function: Callable[[Tensor, Tensor, Tensor | None], object], hidden: Tensor) -> object:
        """Runs `function(hidden, weight, bias)` inside the head's own forward.

        Calling the module is what lets a sharding wrapper (FSDP, ZeRO-3) gather the weight first.
        """
        return self._head(hidden, tokensel_function=function)

    @torch.no_grad()
    def token_nll(self, inputs: dict, labels: Tensor, *, impl: str = "auto") -> Tensor:
        """Negative log-likelihood of label-aligned `labels` [B, S], nats, 0 where ignored -> [B, S] float32."""
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # row t predicts token t + 1
        stats = self.call_head(
            lambda h, w, b: token_stats(h, w, following, bias=b, impl=impl, **self.head_options), self.backbone(inputs)
        )
        return torch.nn.functional.pad(stats.nll[:, :-1], (1, 0))

    def install(self) -> None:
        AttentionInterface.register(_IMPLEMENTATION, _capturing_attention)
        for module, capture in zip(self._attention, self._captures, strict=True):
            module._tokensel_capture = capture
            module.config = copy.copy(capture.config)
            module.config._attn_implementation_internal = _IMPLEMENTATION

        head, head_forward = self._head, self._head.forward

        @functools.wraps(head_forward)
        def patched_head(hidden: Tensor, *args, tokensel_function=None, **kwargs):
            if tokensel_function is None:
                return head_forward(hidden, *args, **kwargs)
            weight, device = head.weight, hidden.device.type
            if torch.is_autocast_enabled(device):  # as the head's own product would
                hidden, weight = (t.to(torch.get_autocast_dtype(device)) for t in (hidden, weight))
            return tokensel_function(hidden, weight, head.bias)

        model_forward = self.model.forward

        @functools.wraps(model_forward)
        def patched_forward(*args, selection=None, **kwargs):
            if selection is None:
                return model_forward(*args, **kwargs)
            if args:
                raise TypeError("with selection=, pass the model's inputs by keyword (input_ids=..., labels=...)")
            return selection(self, **kwargs)

        # an instance attribute hides the class's method; one that was already there (accelerate's) is kept for later
        self._before = (self.model.__dict__.get("forward"), head.__dict__.get("forward"))
        head.forward = patched_head
        self.model.forward = patched_forward
        self.model._tokensel_seam = self

    def uninstall(self) -> None:
        for module, before in zip((self.model, self._head), self._before, strict=True):
            if before is None:
                del module.forward
            else:
                module.forward = before
        for module, capture in zip(self._attention, self._captures, strict=True):
            module.config = capture.config
            del module._tokensel_capture
        del self.model._tokensel_seam

    @torch.no_grad()
    def self_test(self) -> None:
        """Compares statistics and attention mass with the model's own logits and eager attention on eight tokens.

        Raises:
            ValueError: they differ, i.e. the model does something to logits or scores that is not known here.
        """
        name, weight = type(self.model).__name__, self._head.weight
        eager = _eager_function(self._attention[0])
        if eager is None:
            raise ValueError(f"{name} has no eager_attention_forward to verify the captured attention against")
        ids = torch.arange(8, device=weight.device)[None] % weight.shape[0]
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        for capture in self._captures:
            capture.eager_weights = eager
        try:
            with self.capture() as take:
                hidden = self.backbone({"input_ids": ids})
                captured = take()
            for capture in self._captures:
                capture.eager_weights = None
            logits = self.model(input_ids=ids, use_cache=False).logits[0].double()  # (8, V)
        finally:
            for capture in self._captures:
                capture.eager_weights = None
            for module in training:
                module.training = True
        ours = self.call_head(
            lambda h, w, b: token_stats(h[0], w, ids[0], bias=b, impl="chunked", **self.head_options), hidden
        )
        expected = logits.logsumexp(-1) - logits.gather(-1, ids[0][:, None])[:, 0]
        rounding = torch.finfo(weight.dtype).eps
        allowed = 4 * rounding * logits.abs().max() + 64 * torch.finfo(torch.float32).eps
        difference = (ours.nll - expected).abs().max()
        if not difference <= allowed:
            raise ValueError(
                f"{name}'s own logits differ from head(hidden) with {self.head_options}: negative log-likelihoods by "
                f"{difference:.3g} nats (allowed {allowed:.3g}). The model changes its logits in a way that is not "
                "supported; use the functions (tokensel.token_stats_from_logits) instead of apply_to."
            )
        prompt = torch.arange(8, device=ids.device)[None] < 4
        for capture, attention in zip(self._captures, captured, strict=True):
            mass = prompt_attention_mass(
                attention.q, attention.k, prompt, query_mask=torch.ones_like(prompt), **attention.options
            )
            weights, capture.weights = capture.weights, None  # (1, Hq, 8, 8)
            eager_mass = weights[..., :4].double().sum(-1).mean(1)  # (1, 8)
            difference = (mass - eager_mass).abs().max()
            if not difference <= 16 * max(rounding, torch.finfo(torch.float32).eps):  # eager's softmax is float32
                raise ValueError(
                    f"attention of layer {capture.layer} of {name} cannot be reproduced from its q and k: prompt "
                    f"mass differs from eager attention by {difference:.3g}. Use a method without attention or the "
                    "functions."
                )


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        found = "none" if head is None else type(head).__name__
        raise ValueError(
            f"the head of {type(model).__name__} must be a plain torch.nn.Linear; found {found}. An adapter on "
            "the head (LoRA on lm_head, or lm_head in modules_to_save) is not supported: take it out of its targets"
        )
    if head.weight.device.type == "meta" or head.weight.numel() == 0 or not head.weight.is_floating_point():
        raise ValueError(
            f"lm_head.weight is {head.weight.dtype} on {head.weight.device} with {head.weight.numel()} elements; call "
            "apply_to on loaded, unquantised head weights, before the model is sharded"
        )
    return head


def _attention_modules(model: PreTrainedModel, layer: int | Sequence[int]) -> dict[int, nn.Module]:
    """Attention modules by layer index. Negative numbers count the full-attention layers from the end."""
    found = {
        m.layer_idx: m
        for m in model.base_model.modules()
        if getattr(m, "layer_idx", None) is not None
        and hasattr(m, "config")
        and "attention" in type(m).__name__.lower()
    }
    if not found:
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be captured: no attention module with a layer_idx and a "
            "config (Falcon, Bloom and MPT do not use transformers' attention interface)"
        )
    wanted = list(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    if not wanted or any(isinstance(i, bool) or not isinstance(i, int) for i in wanted):
        raise TypeError(f"layer must be an int or a sequence of ints, such as -1 or [-1, -2]; got {layer!r}")
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * (max(found) + 1)
    full = [i for i in sorted(found) if kinds[i] == "full_attention"] or sorted(found)
    chosen: dict[int, nn.Module] = {}
    for number in wanted:
        known = full if number < 0 else {i: i for i in found}
        try:
            index = known[number]
        except (IndexError, KeyError):
            raise ValueError(
                f"layer {number} does not exist: {type(model).__name__} has attention in layers {sorted(found)}, with "
                f"full attention in {full}; negative numbers count the latter from the end"
            ) from None
        if index in chosen:
            raise ValueError(f"layer {list(wanted)} names layer {index} of {type(model).__name__} twice; name it once")
        chosen[index] = found[index]
    return chosen


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside PEFT, torch.compile and data-parallel wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif not isinstance(model, PreTrainedModel) and hasattr(model, "module"):
            model = model.module
        else:
            break
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be (a wrapper of) a transformers PreTrainedModel; got {type(model).__name__}")
    return model


def apply_to(model: nn.Module, layer: int | Sequence[int] = -1) -> Seam:
    """Gives a causal language model an opt-in `selection=` keyword in its forward.

    Without the keyword the model computes what it did, bit for bit. With it (`tokensel.Selection`) the head's logits
    are never made. On eight tokens, statistics and attention are compared with the model's own.

    Args:
        model: a transformers causal language model, or a PEFT model around it.
        layer: whose attention is captured; -1 = the last layer with full attention. Of several, [-1, -2], the prompt
            mass is the mean.
    Returns:
        The seam; `tokensel.remove(model)` undoes it.
    Raises:
        TypeError: not a transformers model; layer is neither an int nor a sequence of ints. ValueError: patched
        already, an adapter on the head, a layer that does not exist or is named twice, attention that cannot be
        captured, logits that cannot be reproduced.
    """
    base = unwrap(model)
    if hasattr(base, "_tokensel_seam"):
        raise ValueError(f"{type(base).__name__} is patched already; call tokensel.remove(model) first")
    seam = Seam(base, layer)
    seam.install()
    try:
        seam.self_test()
    except BaseException:
        seam.uninstall()
        raise
    return seam


def remove(model: nn.Module) -> None:
    """Undoes `apply_to`.

    Raises:
        ValueError: the model is not patched.
    """
    base = unwrap(model)
    if not hasattr(base, "_tokensel_seam"):
        raise ValueError(f"{type(base).__name__} is not patched; there is nothing to remove")
    base._tokensel_seam.uninstall()
