"""What has to be known of a model before it scores or trains rows, and whether they fit it."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import nn

from tokensel.model import unwrap
from tokensel.ops.vocab_parallel import is_dtensor


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over name, shape, dtype and the first 64 entries of each parameter: notices a retrained model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:  # it lies on a disk
            continue
        values = parameter.full_tensor() if is_dtensor(parameter) else parameter
        digest.update(values.detach().flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


class ModelFacts(NamedTuple):
    """What has to be known of a model before it scores."""

    name: str
    dtype: str
    weights: str  # `weights_fingerprint`
    positions: int | None
    embeddings: int


def facts_of(model: nn.Module, name: str | None = None) -> ModelFacts:
    inner: Any = unwrap(model)
    return ModelFacts(
        name or str(inner.name_or_path) or type(inner).__name__,
        str(inner.dtype),
        weights_fingerprint(model),
        getattr(inner.config.get_text_config(), "max_position_embeddings", None),
        int(inner.get_input_embeddings().num_embeddings),
    )


def check_fit(name: str, longest: int, largest_id: int, model: ModelFacts, tokenizer: Any = None) -> None:
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
