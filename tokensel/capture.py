"""q and k of chosen attention layers, caught on the way through a forward (step 3)."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tokensel.ops.prompt_mass import prompt_attention_mass
from tokensel.parallel import spreading_group

# The private name under which one attention module finds the capturing function. The model's own config keeps its
# name: masks are made from it, and a model-wide name without a mask entry would silently ignore padding.
_IMPLEMENTATION = "tokensel_capture"

# What config.layer_types calls attention to all earlier keys, and to a window of them. "hybrid" layers have a
# recurrent part beside their attention.
_FULL = ("full_attention", "attention", "hybrid")
_WINDOWED = ("sliding_attention", "hybrid_sliding")
_WITHOUT = "use a method that does not measure attention, with apply_to(model, layer=None)"


@dataclass
class Captured:
    """q [B, Hq, S, d] and k [B, Hk, S, d] of one attention call, after rotary embedding, and the call's options."""

    q: Tensor
    k: Tensor
    options: dict  # scale, softcap, window, sinks as prompt_attention_mass takes them
    group: ProcessGroup | None = None  # the ranks that the heads are spread over (tensor parallel)


@dataclass
class _Layer:
    """The state that the capturing attention function finds on its module."""

    index: int
    config: Any  # the module's own config, which the base implementation must see
    window: int | None  # by config.layer_types; some families have it in their mask and not in the call (Qwen2-MoE)
    armed: bool = False
    captured: Captured | None = None
    probe: Tensor | None = None  # [B, S] bool, only during the self-test: keys whose mass is wanted of the base itself
    probed: Tensor | None = None  # [B, S] float64


def _capturing_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Delegates to the base implementation; keeps q and k while armed."""
    layer: _Layer = module._tokensel_capture
    if layer.armed:
        options = {
            "scale": kwargs.get("scaling"),
            "softcap": kwargs.get("softcap"),
            "window": kwargs.get("sliding_window", layer.window),
            "sinks": kwargs.get("s_aux"),
        }
        layer.captured = Captured(query.detach(), key.detach(), options, spreading_group(module))
    # FlashAttention's wrapper reads the implementation's name off the module, and would take ours for a Hub kernel
    ours, module.config = module.config, layer.config
    try:
        base = _base_attention(module)
        if layer.probe is not None:
            _refuse_unknown(module, layer, kwargs)
            # with a value of 1 for some keys and 0 for the others, the output is the mass on the former
            indicator = layer.probe[:, None, :, None].to(value.dtype).expand(value.shape).contiguous()
            out = base(module, query, key, indicator, attention_mask, **kwargs)[0]  # (B, S, Hq, d)
            layer.probed = out.double().mean((2, 3))
        return base(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = ours


AttentionInterface.register(_IMPLEMENTATION, _capturing_attention)  # here, for a patched model that is loaded whole


def _base_attention(module: Any) -> Callable:
    """The attention function that a module would call if it were not captured."""
    name = module.config._attn_implementation
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    try:
        return sys.modules[type(module).__module__].eager_attention_forward
    except AttributeError:
        raise ValueError(
            f"{type(module).__name__} has no eager_attention_forward to capture; load the model with "
            "attn_implementation='sdpa'"
        ) from None


def _refuse_unknown(module: Any, layer: _Layer, kwargs: dict[str, Any]) -> None:
    """Raises for what would show on longer rows than the self-test's alone."""
    unknown = [n for n, value in kwargs.items() if isinstance(value, Tensor) and n not in ("s_aux", "position_ids")]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention, which prompt_attention_mass does "
            f"not know; {_WITHOUT}"
        )
    config = module.config
    window, called = getattr(config, "sliding_window", None), kwargs.get("sliding_window", layer.window)
    if layer.window is not None and called != layer.window:  # masks follow the type, FlashAttention the call
        raise ValueError(
            f"config.layer_types gives layer {layer.index} a window of {layer.window}, but {type(module).__name__} "
            f"calls its attention with sliding_window={called}; make them agree (config.use_sliding_window=True, or "
            f"the layer 'full_attention'), or {_WITHOUT}"
        )
    if "sliding_window" in kwargs or _layer_type(config, layer.index) is not None or window is None:
        return
    if window < getattr(config, "max_position_embeddings", 0):
        raise ValueError(
            f"config.sliding_window is {window}, but {type(module).__name__} does not say whether it has it; set it to "
            "None or to config.max_position_embeddings if rows are no longer than the window"
        )


def _layer_type(config: Any, layer: int) -> str | None:
    types = getattr(config, "layer_types", None) or []
    return types[layer] if layer < len(types) else None


def _attention_modules(name: str, base: PreTrainedModel, layer: int | Sequence[int]) -> dict[int, Any]:
    """Attention modules by layer index. Negative numbers count the full-attention layers from the end."""
    modules: dict[int, Any] = {}
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base  # without a vision tower
    for m in decoder.modules():
        index = getattr(m, "layer_idx", None)
        named = "attention" in type(m).__name__.lower() or hasattr(m, "scaling")  # LongcatFlashMLA
        if index is not None and hasattr(m, "config") and named:
            if index in modules:
                raise ValueError(
                    f"the attention of {name} cannot be captured: {type(modules[index]).__name__} and "
                    f"{type(m).__name__} are both of layer {index}, as where there is cross-attention; {_WITHOUT}"
                )
            modules[index] = m
    if not modules:
        raise ValueError(
            f"the attention of {name} cannot be captured: it has no attention module with a layer_idx and a config, so "
            f"it does not use transformers' attention interface; {_WITHOUT}"
        )
    wanted = list(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    if not wanted or any(isinstance(i, bool) or not isinstance(i, int) for i in wanted):
        raise TypeError(f"layer must be an int or a sequence of ints, such as -1 or [-1, -2]; got {layer!r}")
    kinds = {i: _layer_type(modules[i].config, i) or _FULL[0] for i in sorted(modules)}
    attending = [i for i in kinds if kinds[i] in _FULL + _WINDOWED]
    full = [i for i in attending if kinds[i] in _FULL] or attending
    if not attending:
        raise ValueError(
            f"the attention of {name} cannot be captured: its layers are {', '.join(sorted(set(kinds.values())))}, but "
            f"prompt mass is known of {', '.join(_FULL + _WINDOWED)}; {_WITHOUT}"
        )
    chosen: dict[int, Any] = {}
    for number in wanted:
        try:
            index = full[number] if number < 0 else {i: i for i in attending}[number]
        except (IndexError, KeyError):
            kind = f" (it is of type {kinds[number]})" if number in kinds else ""
            raise ValueError(
                f"layer {number} does not exist{kind}: {name} has attention in layers {attending}, with full attention "
                f"in {full}; negative numbers count the latter from the end"
            ) from None
        if index in chosen:
            raise ValueError(f"layer {list(wanted)} names layer {index} of {name} twice; name it once")
        chosen[index] = modules[index]
    return chosen


class AttentionCapture:
    """The chosen attention layers of a model, each with a function of its own that keeps q and k while armed.

    Attributes:
        layers: indices of the layers.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, layer: int | Sequence[int] | None) -> None:
        """Args: base: the model without its head. layer: as in `tokensel.apply_to`."""
        self._of = type(model).__name__
        modules: dict[int, Any] = {} if layer is None else _attention_modules(self._of, base, layer)
        self.layers = tuple(modules)
        self._modules = list(modules.values())
        self._states = []
        for index, module in modules.items():
            windowed = _layer_type(module.config, index) in _WINDOWED
            self._states.append(_Layer(index, module.config, module.config.sliding_window if windowed else None))

    def install(self) -> None:
        for module, state in zip(self._modules, self._states, strict=True):
            module._tokensel_capture = state
            module.config = copy.copy(state.config)
            module.config._attn_implementation_internal = _IMPLEMENTATION

    def uninstall(self) -> None:
        for module, state in zip(self._modules, self._states, strict=True):
            module.config = state.config
            del module._tokensel_capture

    @contextlib.contextmanager
    def armed(self) -> Iterator[Callable[[], list[Captured]]]:
        """Arms the layers around a forward; yields a function that hands over what each of them caught.

        Armed only here, so a checkpointed layer's recomputation in the backward is not seen.
        """
        for state in self._states:
            state.armed, state.captured = True, None
        try:
            yield self._take
        finally:
            for state in self._states:
                state.armed, state.captured = False, None

    def _take(self) -> list[Captured]:
        if not self._states:
            raise ValueError("the method measures attention, but apply_to was told to capture none (layer=None)")
        taken = []
        for state in self._states:
            if state.captured is None:
                raise ValueError(
                    f"layer {state.index} of {self._of} made no call through transformers' attention interface, so "
                    f"its attention cannot be captured. If it was replaced after apply_to, call that again; else "
                    f"{_WITHOUT}"
                )
            taken.append(state.captured)
            state.captured = None
        return taken

    @contextlib.contextmanager
    def probing(self, prompt: Tensor) -> Iterator[None]:
        """Asks the layers' own attention functions for their mass on `prompt` [B, S] in each forward inside."""
        for state in self._states:
            state.probe = prompt
        try:
            yield
        finally:
            for state in self._states:
                state.probe = None

    def compare_mass(self, captured: list[Captured], prompt: Tensor, valid: Tensor) -> None:
        """Mass of the captured q and k against what the model's own attention function put on the prompt, [1, 8].

        Raises:
            ValueError: they differ.
        """
        for state, attention in zip(self._states, captured, strict=True):
            if state.probed is None or state.probed.shape != prompt.shape:
                shape = None if state.probed is None else list(state.probed.shape)
                raise ValueError(
                    f"layer {state.index} of {self._of} gives attention of shape "
                    f"{shape} for {list(prompt.shape)} tokens; choose another layer"
                )
            mass = prompt_attention_mass(
                attention.q, attention.k, prompt, query_mask=valid, key_mask=valid, impl="chunked", **attention.options
            )
            difference = (mass - state.probed)[valid].abs().max()
            state.probed = None
            # the softmax is float32 at best
            if not difference <= 16 * max(torch.finfo(t).eps for t in (attention.q.dtype, torch.float32)):
                raise ValueError(
                    f"attention of layer {state.index} of {self._of} cannot be reproduced from its "
                    f"q and k: prompt mass differs from the model's by {difference:.3g}. It may not be causal, or have "
                    f"a bias; {_WITHOUT}"
                )
