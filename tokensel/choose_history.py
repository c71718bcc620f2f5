"""Which history a run has, by its settings or by "auto", and what each costs; the reference, by its name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokensel.arguments import HISTORIES, parse_recorded
from tokensel.files import check_directory, naming_model
from tokensel.history import AdapterEMA, AdapterOff, LastSeen, LiveHistory, ModelCopy, OtherModel
from tokensel.parallel import is_first_rank
from tokensel.select.method import SelectionMethod
from tokensel.store import tokenizer_fingerprint


def auto_history(model: nn.Module, method: SelectionMethod | None = None) -> LiveHistory | None:
    """The history that "auto" means in a loop of your own: `AdapterOff` where the model has adapters, else frozen.

    Prints which it is and what it costs. A frozen history is the model as it is now: call this before training.

    Args:
        model: the model that is trained, before anything shards it.
        method: one that compares with no history gets None, which costs nothing.
    Raises:
        ValueError: what `AdapterOff` or `ModelCopy` refuses.
    """
    if method is not None and "history_nll" not in method.needs:
        return None
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


def load_reference(
    name_or_path: str, tokenizer, *, device: torch.device | str | None = None, eight_bit: bool = False
) -> nn.Module:
    """Loads a model for `OtherModel` whose tokenizer is the training run's.

    Args:
        name_or_path: directory or hub name of a causal language model with its tokenizer.
        tokenizer: the training run's. Vocabulary and special tokens must be equal; the head may have fewer rows than
            they have entries (Gemma 3), as long as each token that is used has one.
        eight_bit: linear layers but the head in 8 bits, by torchao.
    Raises:
        ValueError: no such model, a damaged one or one with code of its own, another tokenizer, torchao not installed.
    """
    if tokenizer is None:
        raise ValueError("history='reference' compares tokenizers: give the trainer processing_class=tokenizer")
    options: dict[str, Any] = {"trust_remote_code": False}  # left out, transformers would ask
    if eight_bit:
        if importlib.util.find_spec("torchao") is None:
            raise ValueError("history_8bit needs torchao: pip install torchao, or leave it out")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    try:
        check_directory("history_model_name_or_path", name_or_path)
        with naming_model(f"history_model_name_or_path {str(name_or_path)!r}"):
            other = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype="auto", **options)
    except OSError as error:
        raise ValueError(f"history_model_name_or_path {str(name_or_path)!r} cannot be loaded: {error}") from error
    if tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"history_model_name_or_path {str(name_or_path)!r} has another tokenizer than this run ({len(other)} and "
            f"{len(tokenizer)} tokens), so its losses would be of other tokens; choose a model of the same tokenizer"
        )
    return model if device is None or eight_bit else model.to(device)  # type: ignore[arg-type]
