"""The model patched (steps 1 to 3): q and k of chosen layers captured on the way, the language-model head as a place to
call into. Nothing of the model is copied; `remove` puts everything back."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tokensel.ops.prompt_mass import prompt_attention_mass
from tokensel.ops.stats import token_stats
from tokensel.parallel import replicated_as, spreading_group

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
    group: object | None = None  # the ranks that the heads are spread over (tensor parallel)


@dataclass
class _Capture:
    """The state that the capturing attention function finds on its module."""

    layer: int
    config: object  # the module's own config, which the base implementation must see
    window: int | None  # by config.layer_types; some families have it in their mask and not in the call (Qwen2-MoE)
    armed: bool = False
    captured: Captured | None = None
    probe: Tensor | None = None  # [B, S] bool, only during the self-test: keys whose mass is wanted of the base itself
    probed: Tensor | None = None  # [B, S] float64


def _capturing_attention(module, query, key, value, attention_mask, **kwargs):
    """Delegates to the base implementation; keeps q and k while armed."""
    capture: _Capture = module._tokensel_capture
    if capture.armed:
        options = {
            "scale": kwargs.get("scaling"),
            "softcap": kwargs.get("softcap"),
            "window": kwargs.get("sliding_window", capture.window),
            "sinks": kwargs.get("s_aux"),
        }
        capture.captured = Captured(query.detach(), key.detach(), options, spreading_group(module))
    # FlashAttention's wrapper reads the implementation's name off the module, and would take ours for a Hub kernel
    ours, module.config = module.config, capture.config
    try:
        base = _base_attention(module)
        if capture.probe is not None:
            _refuse_unknown(module, kwargs)
            # with a value of 1 for some keys and 0 for the others, the output is the mass on the former
            indicator = capture.probe[:, None, :, None].to(value.dtype).expand(value.shape).contiguous()
            out = base(module, query, key, indicator, attention_mask, **kwargs)[0]  # (B, S, Hq, d)
            capture.probed = out.double().mean((2, 3))
        return base(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = ours


def _base_attention(module: nn.Module) -> Callable:
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


def _refuse_unknown(module: nn.Module, kwargs: dict) -> None:
    """Raises for what would show on longer rows than the self-test's alone."""
    unknown = [n for n, value in kwargs.items() if isinstance(value, Tensor) and n not in ("s_aux", "position_ids")]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention, which prompt_attention_mass does "
            f"not know; {_WITHOUT}"
        )
    config, layer = module.config, module.layer_idx
    window = getattr(config, "sliding_window", None)
    if "sliding_window" in kwargs or _layer_type(config, layer) is not None or window is None:
        return
    if window < getattr(config, "max_position_embeddings", 0):
        raise ValueError(
            f"config.sliding_window is {window}, but {type(module).__name__} does not say whether it has it; set it to "
            "None or to config.max_position_embeddings if rows are no longer than the window"
        )


def _layer_type(config, layer: int) -> str | None:
    types = getattr(config, "layer_types", None) or []
    return types[layer] if layer < len(types) else None


class _PastHooks:
    """What was computed in a tensor-parallel head, on its way out: the head's hooks take its output for a DTensor of
    logits, which they would redistribute or make local."""

    placements = None

    def __init__(self, result: object) -> None:
        self._result = result

    def redistribute(self, *_, **__) -> _PastHooks:
        return self

    def to_local(self) -> object:
        return self._result


class PatchedModel:
    """What `apply_to` leaves on a causal language model.

    Attributes:
        model: the unwrapped causal language model.
        head_options: softcap and logit_scale of the model's head, as `token_stats` takes them; found by the self-test.
        layers: indices of the layers whose attention is captured.
        keeps_documents_apart: whether the model's masks follow position_ids that restart (packing).
    """

    def __init__(self, model: PreTrainedModel, layer: int | Sequence[int] | None) -> None:
        self.model = model
        _refuse_fused_loss(model)
        self._head = _plain_head(model)
        self._base = _base_model(model)
        modules = {} if layer is None else _attention_modules(model, self._base, layer)
        self.layers = tuple(modules)
        self._attention = list(modules.values())
        self._captures = []
        self.keeps_documents_apart = False  # until the self-test has seen it
        for index, module in modules.items():
            windowed = _layer_type(module.config, index) in _WINDOWED
            self._captures.append(_Capture(index, module.config, module.config.sliding_window if windowed else None))
        self._router_loss = _router_loss(model)
        self.head_options: dict = {}

    def backbone(self, inputs: dict) -> Tensor:
        """Forward of the model without its head -> final hidden states [B, S, D]."""
        return self.backbone_and_router_loss(inputs)[0]

    def backbone_and_router_loss(self, inputs: dict) -> tuple[Tensor, Tensor | None]:
        """(final hidden states [B, S, D], what the model adds to its own loss to balance its experts, or None).

        The latter is scalar, and there where `config.output_router_logits` is on.

        Raises:
            ValueError: packing, in a model that lets packed documents see each other.
        """
        given = {name: value for name, value in inputs.items() if value is not None}  # PEFT passes Nones along
        if "position_ids" in given and "attention_mask" not in given and not self.keeps_documents_apart:
            raise ValueError(
                f"{type(self.model).__name__} lets packed documents see each other: its attention mask does not follow "
                "position_ids. Pad the rows instead (packing false, and an attention_mask)"
            )
        given |= {"use_cache": False, "return_dict": True}
        if self._router_loss is None:
            return self._base(**given).last_hidden_state, None
        out = self._base(**given, output_router_logits=True)
        return out.last_hidden_state, self._router_loss(out.router_logits, given.get("attention_mask"))

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
        if not self._captures:
            raise ValueError("the method measures attention, but apply_to was told to capture none (layer=None)")
        taken = []
        for capture in self._captures:
            if capture.captured is None:
                raise ValueError(
                    f"layer {capture.layer} of {type(self.model).__name__} made no call through transformers' "
                    f"attention interface, so its attention cannot be captured; {_WITHOUT}"
                )
            taken.append(capture.captured)
            capture.captured = None
        return taken

    def call_head(self, function: Callable[[Tensor, Tensor, Tensor | None], object], hidden: Tensor) -> object:
        """Runs `function(hidden, weight, bias)` inside the head's own forward.

        Calling the module is what lets a sharding wrapper (FSDP, ZeRO-3) gather the weight first.
        """
        result = self._head(hidden, tokensel_function=function)
        return result.to_local() if isinstance(result, _PastHooks) else result

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
            if not hasattr(weight, "device_mesh"):
                return tokensel_function(hidden, weight, head.bias)
            return _PastHooks(tokensel_function(replicated_as(weight, hidden), weight, head.bias))

        model_forward = self.model.forward

        @functools.wraps(model_forward)
        def patched_forward(*args, selection=None, **kwargs):
            if selection is None:
                return model_forward(*args, **kwargs)
            if args:
                raise TypeError("with selection=, pass the model's inputs by keyword (input_ids=..., labels=...)")
            missing = [name for name in ("input_ids", "labels") if kwargs.get(name) is None]
            if missing:
                raise ValueError(
                    f"with selection=, the model needs {' and '.join(missing)}; adapters that hand over embeddings "
                    "(prompt and prefix tuning) are not supported"
                )
            return selection(self, **kwargs)

        # an instance attribute hides the class's method; one that was already there (accelerate's) is kept for later
        self._before = (self.model.__dict__.get("forward"), head.__dict__.get("forward"))
        head.forward = patched_head
        self.model.forward = patched_forward
        self.model._tokensel_patched = self

    def uninstall(self) -> None:
        for module, before in zip((self.model, self._head), self._before, strict=True):
            if before is None:
                del module.forward
            else:
                module.forward = before
        for module, capture in zip(self._attention, self._captures, strict=True):
            module.config = capture.config
            del module._tokensel_capture
        del self.model._tokensel_patched

    @torch.no_grad()
    def self_test(self) -> None:
        """Compares statistics and attention mass with the model's own, on seven tokens and one of padding.

        The padding has the model make its mask. Finds `head_options`.

        Raises:
            ValueError: they differ, i.e. the model does something to logits or scores that is not known here.
        """
        weight = self._head.weight
        position = torch.arange(8, device=weight.device)[None]
        ids, valid, prompt = position % weight.shape[0], (position < 7).long(), position % 3 == 0  # (1, 8)
        inputs = {"input_ids": ids, "attention_mask": valid}
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        for capture in self._captures:
            capture.probe = prompt
        try:
            with self.capture() as take:
                hidden, router_loss = self.backbone_and_router_loss(inputs)
                captured = take() if self._captures else []
            for capture in self._captures:
                capture.probe = None
            own = self.model(**inputs, use_cache=False, return_dict=True)
            self.keeps_documents_apart = self._documents_stay_apart(ids)
        finally:
            for capture in self._captures:
                capture.probe = None
            for module in training:
                module.training = True
        if getattr(own, "logits", None) is None:
            raise ValueError(
                f"the forward of {type(self.model).__name__} returns no logits: a library that makes the loss itself "
                "has replaced it; switch that off"
            )
        if hasattr(weight, "device_mesh") and own.logits.shape[-1] != weight.shape[0]:
            raise ValueError(
                f"the head of {type(self.model).__name__} is spread over ranks already, and hands out "
                f"{own.logits.shape[-1]} of {weight.shape[0]} logits; call apply_to before the model is sharded"
            )
        self._find_head_options(hidden, ids, valid, own.logits)
        self._compare_router_loss(router_loss, getattr(own, "aux_loss", None))
        self._compare_mass(captured, prompt, valid.bool())

    def _documents_stay_apart(self, ids: Tensor) -> bool:
        """Whether the second of two packed documents, ids[:, 4:], is the same whatever the first one is."""
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            return False
        positions = torch.arange(4, device=ids.device).repeat(2)[None]
        one, other = (
            self._base(input_ids=packed, position_ids=positions, use_cache=False, return_dict=True).last_hidden_state
            for packed in (ids, torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1))
        )
        # masked keys weigh exactly 0, but other rows may change how a mixture of experts rounds
        return bool((one - other)[:, 4:].abs().max() <= 4 * torch.finfo(one.dtype).eps * one.abs().max())

    def _find_head_options(self, hidden: Tensor, ids: Tensor, valid: Tensor, logits: Tensor) -> None:
        """Of what the config may mean, takes what reproduces the model's own logits [1, 8, V]."""
        logits = logits.double()
        expected = logits.logsumexp(-1) - logits.gather(-1, ids[..., None])[..., 0]  # (1, 8)
        allowed = (
            4 * torch.finfo(self._head.weight.dtype).eps * logits.abs().max() + 64 * torch.finfo(torch.float32).eps
        )
        name, width = type(self.model).__name__, self._head.weight.shape[1]
        if hidden.shape[-1] != width:
            raise ValueError(
                f"{name}'s hidden states are {hidden.shape[-1]} wide, its head {width}: it transforms them in between, "
                "which is not supported"
            )
        differences = []
        for options in _head_options(self.model):
            stats = self.call_head(
                lambda h, w, b, options=options: token_stats(h, w, ids, bias=b, impl="chunked", **options), hidden
            )
            differences.append((stats.nll - expected)[valid.bool()].abs().max())
            if differences[-1] <= allowed:
                self.head_options = options
                return
        raise ValueError(
            f"{name}'s own logits differ from head(hidden), tried with "
            f"{' and '.join(map(str, _head_options(self.model)))}: negative log-likelihoods by at least "
            f"{min(differences):.3g} nats (allowed {allowed:.3g}). The model changes its logits in a way that is not "
            "supported; use the functions (tokensel.token_stats_from_logits) instead of apply_to."
        )

    def _compare_router_loss(self, ours: Tensor | None, own: Tensor | None) -> None:
        """What the model adds to its loss for its experts; `own` is not yet weighted."""
        if ours is None and own is None:
            return
        if ours is None or own is None or not (ours - self._router_loss.weight * own).abs() <= 0.01 * ours.abs():
            raise ValueError(
                f"the router loss of {type(self.model).__name__} is not known here; set "
                "config.output_router_logits=False to train without it"
            )

    def _compare_mass(self, captured: list[Captured], prompt: Tensor, valid: Tensor) -> None:
        """Mass of the captured q and k against what the model's own attention function puts on the prompt, [1, 8]."""
        for capture, attention in zip(self._captures, captured, strict=True):
            if capture.probed.shape != prompt.shape:
                raise ValueError(
                    f"layer {capture.layer} of {type(self.model).__name__} gives attention of shape "
                    f"{list(capture.probed.shape)} for {list(prompt.shape)} tokens; choose another layer"
                )
            mass = prompt_attention_mass(
                attention.q, attention.k, prompt, query_mask=valid, key_mask=valid, impl="chunked", **attention.options
            )
            difference = (mass - capture.probed)[valid].abs().max()
            capture.probed = None
            # the softmax is float32 at best
            if not difference <= 16 * max(torch.finfo(t).eps for t in (attention.q.dtype, torch.float32)):
                raise ValueError(
                    f"attention of layer {capture.layer} of {type(self.model).__name__} cannot be reproduced from its "
                    f"q and k: prompt mass differs from the model's by {difference:.3g}. It may not be causal, or have "
                    f"a bias; {_WITHOUT}"
                )


class _RouterLoss:
    """What a mixture of experts adds to its loss, by the function of its own module."""

    def __init__(self, model: PreTrainedModel, function: Callable) -> None:
        def setting(*names: str):
            places = (model, model.config.get_text_config())
            return next(getattr(place, name) for place in places for name in names if hasattr(place, name))

        self._function = function
        self._experts, self._chosen = setting("num_experts"), setting("num_experts_per_tok")
        self.weight = setting("router_aux_loss_coef", "aux_loss_coef")

    def __call__(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        return self.weight * self._function(router_logits, self._experts, self._chosen, attention_mask)


def _router_loss(model: PreTrainedModel) -> _RouterLoss | None:
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return None
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]
    functions = [m.load_balancing_loss_func for m in modules if hasattr(m, "load_balancing_loss_func")]
    return _RouterLoss(model, functions[0]) if functions else None


def _head_options(model: PreTrainedModel) -> list[dict]:
    """What the config may say of softcap and scale of the logits, likeliest first.

    Families use one name for a factor and for a divisor (`logits_scaling`), or have a name and do not use it. The
    self-test tells which it is.
    """
    config = model.config.get_text_config()
    names = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier", "output_multiplier")
    scales = [getattr(config, n, None) for n in names]
    scales = [x for x in scales if isinstance(x, (int, float)) and x not in (0, 1)]
    width = getattr(config, "dim_model_base", None)  # muP, MiniCPM
    scales += [config.hidden_size / width] if width else []
    caps = [getattr(config, n, None) for n in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")]
    caps = [x for x in caps if x]
    return [
        {"softcap": cap, "logit_scale": scale}
        for cap, scale in itertools.product([*caps, None], [y for x in scales for y in (x, 1 / x)] + [1.0])
    ]


def _refuse_fused_loss(model: PreTrainedModel) -> None:
    """Libraries replace a model's forward by one that makes the loss, on the instance or on its class."""
    forward = model.forward
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        library = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]  # __module__ may be copied
        if library in ("liger_kernel", "cut_cross_entropy"):
            raise ValueError(
                f"the forward of {type(model).__name__} has been replaced by {library}'s, which makes the loss itself. "
                "Switch that loss off (liger_kernel_config={'fused_linear_cross_entropy': False}, or no "
                "use_liger_kernel); the library's other kernels may stay on"
            )
        forward = getattr(function, "__wrapped__", None)


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


def _base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; token selection takes decoders alone")
    if model.base_model is not model:
        return model.base_model
    # the attribute that base_model looks for may not exist (Llama 4)
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise ValueError(
            f"{type(model).__name__} has no model without its head inside; patch its language model, a causal language "
            "model of its own"
        )
    return inner[0]


def _attention_modules(
    model: PreTrainedModel, base: PreTrainedModel, layer: int | Sequence[int]
) -> dict[int, nn.Module]:
    """Attention modules by layer index. Negative numbers count the full-attention layers from the end."""
    name = type(model).__name__
    found: dict[int, nn.Module] = {}
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base  # without a vision tower
    for m in decoder.modules():
        index = getattr(m, "layer_idx", None)
        named = "attention" in type(m).__name__.lower() or hasattr(m, "scaling")  # LongcatFlashMLA
        if index is not None and hasattr(m, "config") and named:
            if index in found:
                raise ValueError(
                    f"the attention of {name} cannot be captured: {type(found[index]).__name__} and {type(m).__name__} "
                    f"are both of layer {index}, as where there is cross-attention; {_WITHOUT}"
                )
            found[index] = m
    if not found:
        raise ValueError(
            f"the attention of {name} cannot be captured: it has no attention module with a layer_idx and a config, so "
            f"it does not use transformers' attention interface; {_WITHOUT}"
        )
    wanted = list(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    if not wanted or any(isinstance(i, bool) or not isinstance(i, int) for i in wanted):
        raise TypeError(f"layer must be an int or a sequence of ints, such as -1 or [-1, -2]; got {layer!r}")
    kinds = {i: _layer_type(found[i].config, i) or _FULL[0] for i in sorted(found)}
    known = [i for i in kinds if kinds[i] in _FULL + _WINDOWED]
    full = [i for i in known if kinds[i] in _FULL] or known
    if not known:
        raise ValueError(
            f"the attention of {name} cannot be captured: its layers are {', '.join(sorted(set(kinds.values())))}, but "
            f"prompt mass is known of {', '.join(_FULL + _WINDOWED)}; {_WITHOUT}"
        )
    chosen: dict[int, nn.Module] = {}
    for number in wanted:
        try:
            index = full[number] if number < 0 else {i: i for i in known}[number]
        except (IndexError, KeyError):
            kind = f" (it is of type {kinds[number]})" if number in kinds else ""
            raise ValueError(
                f"layer {number} does not exist{kind}: {name} has attention in layers {known}, with full attention in "
                f"{full}; negative numbers count the latter from the end"
            ) from None
        if index in chosen:
            raise ValueError(f"layer {list(wanted)} names layer {index} of {name} twice; name it once")
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


def refuse_patched(model: nn.Module) -> PreTrainedModel:
    """The unwrapped model. Raises ValueError if it is patched already."""
    base = unwrap(model)
    if hasattr(base, "_tokensel_patched"):
        raise ValueError(f"{type(base).__name__} is patched already; call tokensel.remove(model) first")
    return base


def apply_to(model: nn.Module, layer: int | Sequence[int] | None = -1) -> PatchedModel:
    """Gives a causal language model an opt-in `selection=` keyword in its forward.

    Without the keyword the model computes what it did, bit for bit. With it (`tokensel.Selection`) the head's logits
    are never made. On eight tokens, statistics and attention are compared with the model's own.

    Args:
        model: a transformers causal language model, or a PEFT model around it.
        layer: whose attention is captured; -1 = the last layer with full attention. Of several, [-1, -2], the prompt
            mass is the mean. None = capture nothing, for methods that do not measure attention: then models that do
            not use transformers' attention interface are supported, too.
    Returns:
        The patched; `tokensel.remove(model)` undoes it.
    Raises:
        TypeError: not a transformers model; layer is neither an int nor a sequence of ints. ValueError: patched
        already, an adapter on the head or of virtual tokens, a layer that does not exist or is named twice, attention
        that cannot be captured, logits that cannot be reproduced.
    """
    base = refuse_patched(model)
    peft = getattr(model, "active_peft_config", None)
    if peft is not None and peft.is_prompt_learning:
        raise ValueError(
            f"{type(peft).__name__} puts virtual tokens before the batch's, whose losses and prompts would be off by "
            "their number; use LoRA"
        )
    patched = PatchedModel(base, layer)
    patched.install()
    try:
        patched.self_test()
    except BaseException:
        patched.uninstall()
        raise
    return patched


def remove(model: nn.Module) -> None:
    """Undoes `apply_to`.

    Raises:
        ValueError: the model is not patched.
    """
    base = unwrap(model)
    if not hasattr(base, "_tokensel_patched"):
        raise ValueError(f"{type(base).__name__} is not patched; there is nothing to remove")
    base._tokensel_patched.uninstall()
