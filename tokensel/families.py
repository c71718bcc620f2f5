"""What model families do differently: their base model, their head, what they add to logits and to the loss."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel


class RouterLoss:
    """What balances a mixture of experts, by the function of its own module; unweighted, as the model's `aux_loss`.

    Its settings are read when they are used, for a trainer may change them.
    """

    def __init__(self, model: PreTrainedModel, function: Callable) -> None:
        self._model, self._function = model, function

    def _setting(self, *names: str) -> Any:
        places = (self._model, self._model.config.get_text_config())
        return next(getattr(place, name) for place in places for name in names if hasattr(place, name))

    @property
    def weight(self) -> float:
        """What it is multiplied by before the model adds it to its loss."""
        return self._setting("router_aux_loss_coef", "aux_loss_coef")

    def __call__(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        experts, chosen = self._setting("num_experts"), self._setting("num_experts_per_tok")
        return self._function(router_logits, experts, chosen, attention_mask)


def router_loss_of(model: PreTrainedModel) -> RouterLoss | None:
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]
    functions = [m.load_balancing_loss_func for m in modules if hasattr(m, "load_balancing_loss_func")]
    return RouterLoss(model, functions[0]) if functions else None


def refuse_other_aux_loss(model: PreTrainedModel, ours: Tensor | None, own: Tensor | None) -> None:
    if ours is None and own is None:
        return
    if ours is None or own is None or not (ours - own).abs() <= 0.01 * ours.abs():
        raise ValueError(
            f"the router loss of {type(model).__name__} is not known here; set config.output_router_logits=False to "
            "train without it"
        )


def possible_head_options(model: PreTrainedModel) -> list[dict]:
    """What the config may say of softcap and scale of the logits, likeliest first.

    Families use one name for a factor and for a divisor (`logits_scaling`), or have a name and do not use it. The
    self-test tells which it is.
    """
    config = model.config.get_text_config()
    names = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier", "output_multiplier")
    scales: list[Any] = [getattr(config, n, None) for n in names]
    scales = [x for x in scales if isinstance(x, (int, float)) and x not in (0, 1)]
    width: Any = getattr(config, "dim_model_base", None)  # muP, MiniCPM
    scales += [config.hidden_size / width] if width else []
    caps = [getattr(config, n, None) for n in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")]
    caps = [x for x in caps if x]
    return [
        {"softcap": cap, "logit_scale": scale}
        for cap, scale in itertools.product([*caps, None], [y for x in scales for y in (x, 1 / x)] + [1.0])
    ]


def refuse_fused_loss(model: PreTrainedModel) -> None:
    """Libraries replace a model's forward by one that makes the loss, on the instance or on its class."""
    forward: Any = model.forward
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


def plain_head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        kind = "none" if head is None else type(head).__name__
        raise ValueError(
            f"the head of {type(model).__name__} must be a plain torch.nn.Linear; got {kind}. An adapter on "
            "the head (LoRA on lm_head, or lm_head in modules_to_save) is not supported: take it out of its targets"
        )
    if head.weight.is_meta and hasattr(head, "_hf_hook"):
        raise ValueError(
            "lm_head.weight is offloaded by its device_map; keep the head on a device, by a device_map of your own, or "
            "with fewer bits (load_in_8bit) have room for it"
        )
    if head.weight.device.type == "meta" or head.weight.numel() == 0 or not head.weight.is_floating_point():
        raise ValueError(
            f"lm_head.weight is {head.weight.dtype} on {head.weight.device} with {head.weight.numel()} elements; call "
            "apply_to on loaded, unquantised head weights, before the model is sharded"
        )
    return head


def model_without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; token selection takes decoders alone")
    if model.base_model is not model:
        return cast(PreTrainedModel, model.base_model)
    # the attribute that base_model looks for may not exist (Llama 4)
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise ValueError(
            f"{type(model).__name__} has no model without its head inside; patch its language model, a causal language "
            "model of its own"
        )
    return inner[0]
