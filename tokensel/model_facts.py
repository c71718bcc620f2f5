"""What has to be known of a model before it scores or trains rows, and whether they fit it."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import nn

from tokensel.model import unwrap
from tokensel.ops.vocab_parallel import is_dtensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over name, shape, dtype, the sum of all bits and some entries of each parameter, and over which
    adapters are on: notices a model that has been trained."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if hasattr(module, "_disable_adapters"):  # a layer of PEFT
            digest.update(f"{name} {module._disable_adapters} {module.active_adapters}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:  # it lies on a disk
            continue
        values = parameter.full_tensor() if is_dtensor(parameter) else parameter
        bits = values.detach().contiguous().view(_BITS[values.element_size()])
        some = bits.flatten()[:: max(bits.numel() // 64, 1)]
        digest.update(f"{int(bits.sum(dtype=torch.int64))} {some.tolist()}".encode())
    return digest.hexdigest()


class Limits(NamedTuple):
    """What rows have to fit."""

    name: str  # of the model
    positions: int | None
    embeddings: int


class ModelFacts(NamedTuple):
    """What has to be known of a model before it scores."""

    limits: Limits
    dtype: str  # also of autocast, where it is on
    weights: str  # `weights_fingerprint`


def limits_of(model: nn.Module, name: str | None = None) -> Limits:
    inner: Any = unwrap(model)
    return Limits(
        name or str(inner.name_or_path) or type(inner).__name__,
        getattr(inner.config.get_text_config(), "max_position_embeddings", None),
        int(inner.get_input_embeddings().num_embeddings),
    )


def facts_of(model: nn.Module, name: str | None = None) -> ModelFacts:
    inner: Any = unwrap(model)
    device = inner.device.type
    cast = f", autocast to {torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else ""
    return ModelFacts(limits_of(model, name), f"{inner.dtype}{cast}", weights_fingerprint(model))


def check_fit(name: str, longest: int, largest_id: int, model: Limits, tokenizer: Any = None) -> None:
    """Refuses what fails in the forward with an index error that names nothing, or, with rotary positions, not at all.

    Raises:
        ValueError: rows longer than the model has positions, or a token without an embedding.
    """
    if model.positions is not None and longest > model.positions:
        raise ValueError(
            f"{name} has rows of up to {longest} tokens, but {model.name} has {model.positions} positions; cut them "
            f"with --max_length {model.positions}, or, if its positions reach further (YaRN and the like), raise "
            "max_position_embeddings in its config.json"
        )
    needed = max(largest_id, getattr(tokenizer, "pad_token_id", None) or 0)
    if needed >= model.embeddings:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(needed)!r})"
        raise ValueError(
            f"token {needed}{token} has no embedding: {model.name} has {model.embeddings}. The tokenizer belongs to "
            "another model, or tokens were added without model.resize_token_embeddings"
        )
