"""Which history a run has, by its settings or by "auto", and what each costs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tokensel.arguments import HISTORIES, parse_recorded
from tokensel.history import AdapterEMA, AdapterOff, LastSeen, LiveHistory, ModelCopy, OtherModel, load_reference
from tokensel.parallel import is_first_rank


def auto_history(model: nn.Module) -> LiveHistory:
    """The history that "auto" means in a loop of your own: `AdapterOff` where the model has adapters, else frozen.

    Prints which it is and what it costs. A frozen history is the model as it is now: call this before training.

    Args:
        model: the model that is trained, before anything shards it.
    Raises:
        ValueError: what `AdapterOff` or `ModelCopy` refuses.
    """
    name = _without_store(model)
    _tell(name)
    return AdapterOff(model) if name == "adapter_off" else ModelCopy(model)


def choose_history(settings, model: nn.Module, needs: Iterable[str]) -> str:
    """The name of the history that `SelectionArguments` ask for; where they say "auto", chosen and printed.

    Recorded where a store is given, none where the method asks for none, else as `auto_history`. Args: as below.
    """
    if settings.history != "auto":
        return settings.history
    if settings.history_store is not None:
        name = "recorded"
    elif "history_nll" not in needs or "history" in parse_recorded(settings.recorded):
        return "none"
    else:
        name = _without_store(model)
    _tell(name)
    return name


def _without_store(model: nn.Module) -> str:
    return "adapter_off" if any(hasattr(m, "_disable_adapters") for m in model.modules()) else "frozen"


def _tell(name: str) -> None:
    if is_first_rank():
        what, costs = HISTORIES[name]
        print(f"history 'auto' is {name!r}: {what}; it costs {costs}", flush=True)


def live_history(settings, model: nn.Module, tokenizer, needs: Iterable[str], sharded: bool) -> LiveHistory | None:
    """The history that `SelectionArguments` ask for, or None where it is recorded or there is none.

    Args:
        settings: the trainer's arguments. needs: of the method. sharded: whether FSDP or DeepSpeed splits the weights.
    Raises:
        ValueError: a history that the run cannot have.
    """
    name = settings.history
    if name in ("adapter_ema", "frozen", "ema") and sharded:
        raise ValueError(
            f"history={name!r} copies weights, which is not supported where FSDP or DeepSpeed shards them; use "
            "history 'recorded', 'last_seen' or 'adapter_off'"
        )
    decay = 0.99 if settings.history_decay is None else settings.history_decay
    offload = settings.history_device == "cpu"
    device = settings.history_device if settings.history_device and not offload else None
    if name == "adapter_off":
        return AdapterOff(model)
    if name == "adapter_ema":
        return AdapterEMA(model, decay)
    if name in ("frozen", "ema"):
        return ModelCopy(model, 1.0 if name == "frozen" else decay, device, offload)
    if name == "last_seen":
        if settings.max_steps <= 0 and settings.num_train_epochs <= 1:
            raise ValueError(
                "history='last_seen' knows nothing of a document before its second visit; set num_train_epochs above "
                f"1 (it is {settings.num_train_epochs}) or use another history"
            )
        return LastSeen()
    if name == "reference":
        reference = load_reference(settings.history_model_name_or_path, tokenizer, eight_bit=settings.history_8bit)
        # a method that knows no reference compares with it as with a history
        signal = "reference_nll" if "reference_nll" in needs else "history_nll"
        return OtherModel(reference, signal, device or settings.device, offload)
    return None
