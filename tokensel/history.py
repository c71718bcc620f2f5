"""Where the history's statistics come from (step 2): recorded in a store, or a live pass of an earlier model.

| name          | the history is                                    | costs                     |
| `recorded`    | NLL computed once by `tokensel score`             | nothing per step          |
| `adapter_off` | the same model with its adapters disabled         | one forward, no memory    |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from tokensel.documents import IGNORE_INDEX, segments_from_positions
from tokensel.model import Seam
from tokensel.store import HistoryStore


class RecordedLosses:
    """A data collator that adds recorded losses [B, S] from stores to what another collator makes.

    Looking up by document hash happens on the loader's side, where token ids are still on the host.
    """

    def __init__(self, collator: Callable[[list], dict], stores: dict[str, HistoryStore]) -> None:
        """Args: stores: by the name of the signal that they hold, "history_nll" or another of `RECORDED`."""
        self.collator, self.stores = collator, stores

    def __call__(self, features: list) -> dict:
        batch = self.collator(features)
        segments, mask = segments_and_mask(batch.get("attention_mask"), batch.get("position_ids"))
        where = {"segment_ids": segments, "key_mask": mask}
        for name, store in self.stores.items():
            batch[name] = store.lookup(batch["input_ids"], batch["labels"], **where)
        return batch


class RecordedWeights:
    """A data collator that brings the weights of a store into `token_weights` [B, S], as factors on response tokens."""

    def __init__(self, collator: Callable[[list], dict], store: HistoryStore) -> None:
        self.collator, self.store = collator, store

    def __call__(self, features: list) -> dict:
        batch = self.collator(features)
        segments, mask = segments_and_mask(batch.get("attention_mask"), batch.get("position_ids"))
        weights = self.store.lookup(batch["input_ids"], batch["labels"], segment_ids=segments, key_mask=mask)
        given = batch.get("token_weights")
        if given is not None:  # a weight on a prompt token trains it, whatever was selected of the response
            weights = torch.where(batch["labels"] == IGNORE_INDEX, given, given * weights)
        batch["token_weights"] = weights
        return batch


def segments_and_mask(
    attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(packing boundaries or None, padding mask or None), by the rule of transformers' masks.

    Positions that restart mean packed documents only where there is no 2-D mask; with one, the model itself would
    let documents see each other, which is refused.
    """
    if attention_mask is None:
        return (None if position_ids is None else segments_from_positions(position_ids)), None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [B, S] (1 = token, 0 = padding); got {list(attention_mask.shape)}")
    mask = attention_mask.bool()
    if position_ids is not None:
        restarts = (position_ids[:, 1:] <= position_ids[:, :-1]) & mask[:, 1:] & mask[:, :-1]
        together = ~restarts.any()
        if mask.device.type != "cpu":
            torch._assert_async(together, "position_ids restart although attention_mask is given")
        elif not bool(together):
            raise ValueError(
                "position_ids restart inside a row although attention_mask is given: the packed documents would see "
                "each other. Leave attention_mask out of packed batches"
            )
    return None, mask


class LiveHistory(Protocol):
    """A history that runs in the step: another state of the model, or another model.

    Attributes:
        signal: name of the TokenSignals field that it answers for.
        shares_head: whether its head is the current model's, so that one launch serves both; it then has
            `hidden(seam, batch) -> [B, S, D]`, and otherwise `token_nll(batch, labels) -> [B, S]`, nats.
    """

    signal: str
    shares_head: bool


class AdapterOff:
    """The history is the base model: a pass with every adapter disabled and dropout off.

    Equal to PEFT's `disable_adapter()`, by the layers' own flag, without toggling `requires_grad` in each step.
    """

    signal, shares_head = "history_nll", True

    def __init__(self, model: nn.Module) -> None:
        """Args: model: a PEFT model whose trained parameters are all in its adapters.

        Raises:
            ValueError: no adapter, or trained parameters that disabling the adapters would not undo.
        """
        self.model = model
        self.switches = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
        if not self.switches:
            raise ValueError("history='adapter_off' needs a PEFT model; this one has no adapter layers to disable")
        inside = {id(p) for m in self.switches for p in m.parameters()}
        outside = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        base = [n for n, p in model.named_parameters() if p.requires_grad and ".base_layer." in n]
        if outside or base:
            raise ValueError(
                f"history='adapter_off' needs the base model frozen, but {(outside + base)[0]} is trained; freeze it "
                "or use history='recorded'"
            )

    def hidden(self, seam: Seam, batch: dict) -> Tensor:
        """Final hidden states under the history, [B, S, D]."""
        with self():
            return seam.backbone(batch)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The model is its history inside: adapters disabled, eval mode, no gradient."""
        training = [m for m in self.model.modules() if m.training]
        for module in training:
            module.training = False
        for switch in self.switches:
            switch._disable_adapters = True
        try:
            with torch.no_grad():
                yield
        finally:
            for switch in self.switches:
                switch._disable_adapters = False
            for module in training:
                module.training = True
