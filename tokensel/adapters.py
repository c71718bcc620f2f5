"""PEFT's adapter layers, and whether a model without them is the base that it began with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokensel.model import unwrap

# LoRA's initialisations that leave base weights as they are. Of any other it is not known: PiSSA, OLoRA, CorDA, LoRA-GA
# and LoftQ take out of them what the adapters begin with.
_LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BASE = ("base_layer", "original_module")  # where an adapter layer keeps what it adapts
_INSTEAD = "use history 'recorded', scored under the base model, or 'frozen', the model as this run begins"


def quick_look(model: nn.Module) -> tuple[list[nn.Module], Any]:
    """(adapter layers, what two looks differ by: those, adapters, merges, trained parameters), of milliseconds."""
    modules = list(model.modules())
    layers = [m for m in modules if "_disable_adapters" in m.__dict__ or hasattr(type(m), "_disable_adapters")]
    trained = [id(p) for m in modules for p in m._parameters.values() if p is not None and p.requires_grad]
    adapters = set(getattr(unwrap(model), "peft_config", ()))
    return layers, (trained, adapters, [(id(layer), getattr(layer, "merged", False)) for layer in layers])


def adapter_layers(model: nn.Module, name: str, instead: str) -> list[nn.Module]:
    """The adapter layers of a PEFT model that trains nothing but them.

    Args:
        name: of the history that needs them. instead: what to use in its place.
    Raises:
        ValueError: there are none, or something else is trained.
    """
    layers = {path: m for path, m in model.named_modules(remove_duplicate=False) if hasattr(m, "_disable_adapters")}
    if not layers:
        raise ValueError(f"history={name!r} needs a PEFT model; this one has no adapter layers. Use {instead}")
    inside, outside, base = set(), [], []
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        parts = path.split(".")
        # an adapter layer may hold another (of several parameters of one module): the innermost is the owner
        owners = [i for i in range(1, len(parts)) if ".".join(parts[:i]) in layers]
        if not owners:
            outside.append((path, id(parameter)))
        elif parts[owners[-1]] in _BASE:
            base.append(path)
        else:
            inside.add(id(parameter))
    trained = [path for path, key in outside if key not in inside] + base
    if trained:
        raise ValueError(
            f"history={name!r} needs the base model frozen, but {trained[0]} is trained; freeze it or use {instead}"
        )
    return list(dict.fromkeys(layers.values()))


def refuse_rewritten_base(model: nn.Module, layers: list[nn.Module]) -> None:
    """Refuses adapters without which the model is not what it was before they were added.

    The untouched base is gone by then. What PEFT's config says of the initialisation counts, and what it leaves behind:
    PiSSA, OLoRA and CorDA take the directions that the new adapter writes to out of the base weight, entirely. So a
    base that was saved without them is noticed too, as long as the adapter has not been trained.

    Raises:
        ValueError: such an initialisation, or adapters that are merged into the base weights.
    """
    configs = getattr(unwrap(model), "peft_config", {})
    for adapter, settings in configs.items():
        how = getattr(settings, "init_lora_weights", True)
        if getattr(settings, "kasa_config", None) is not None:
            how = "kasa"
        if how not in _LEAVE_THE_BASE:
            raise ValueError(
                f"history='adapter_off' needs the base model as it was, but adapter {adapter!r} was initialised by "
                f"{how!r}, which rewrites base weights (or is not known to leave them); {_INSTEAD}"
            )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "history='adapter_off' needs the base model as it was, but adapters are merged into it; call "
            "model.unmerge_adapter() first"
        )
    for layer in layers:
        shares = _shares_of_base(layer)
        for adapter, share in shares.items():
            looks_for_them = getattr(configs.get(adapter), "init_lora_weights", True) == "mica"  # in an untouched base
            if share < 0.02 and not looks_for_them:
                raise ValueError(
                    "history='adapter_off' needs the base model as it was, but its weights have nothing in the "
                    f"directions of adapter {adapter!r} ({share:.1e} of what is usual), as where PiSSA, OLoRA or CorDA "
                    f"took them out; {_INSTEAD}"
                )
        if shares:
            return  # one layer tells


@torch.no_grad()
def _shares_of_base(layer: Any) -> dict[str, float]:
    """How much of the base weight W [m, n] a LoRA layer's adapters BA leave where they write, by name; about 1 for any.

    |BᵀW - its part in the rows of A| / (|B| |W|), in units of what a random B and A of rank r have; 0 where
    W = W' - BA and BA had been W' in the directions of B. Adapters that do nothing are left out.
    """
    weight = getattr(layer.get_base_layer(), "weight", None) if hasattr(layer, "lora_B") else None
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or hasattr(weight, "device_mesh"):
        return {}  # quantised or sharded: the config has to tell
    weight = (weight.T if getattr(layer, "fan_in_fan_out", False) else weight).float()
    shares = {}
    for adapter, factor in layer.lora_B.items():
        b, a = (getattr(x, "weight", x).float() for x in (factor, layer.lora_A[adapter]))  # AdaLoRA's are parameters
        if (
            weight.shape == (*b.shape[:1], *a.shape[1:])
            and len(a) < a.shape[1]
            and a.any()
            and b.any()
            and weight.any()
        ):
            rows, common = torch.linalg.qr(a.T)[0], b.T @ weight  # (n, r), (r, n)
            left = (common - common @ rows @ rows.T).norm() / (b.norm() * weight.norm())
            shares[adapter] = float(left) * (len(b) / (1 - len(a) / a.shape[1])) ** 0.5
    return shares
