"""What DPO needs beside its policy: a reference without a model, and the weights of a method on both answers' tokens.

TRL asks its policy and then its reference for log-probabilities of the same labels, and adds them up over an answer.
With weights, what it adds up is Σ w (log π - log π_ref).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokensel.documents import BatchLayout, to_labels
from tokensel.ops.stats import StatsOptions
from tokensel.ops.token_stats import MOMENTS, TokenStats
from tokensel.select.methods import SelectionMethod
from tokensel.select.signals import MEASURED, RECORDED, TokenSignals
from tokensel.store import HistoryStore

_OF_THE_HEAD = {"nll", "entropy", "logp_var", "renyi2", "rank", "key", "vocab_size"}  # there without attention


class PairWeights:
    """The weights that a method gives the tokens of a batch of TRL's DPOTrainer: chosen answers, then rejected ones.

    Each answer is a sample. The policy's pass makes the weights, constants for the gradient; the reference's pass about
    the same labels gets them again.

    Attributes:
        statistics: keywords of `token_stats` that the method needs of the policy.
    """

    def __init__(self, method: SelectionMethod, trainer: Any, stores: dict[str, HistoryStore]) -> None:
        """stores: of recorded signals ("history_nll", ...), by name.

        Raises:
            ValueError: a method that needs another signal, ranks more than a micro-batch, or moves with the steps.
        """
        for name in sorted(method.needs - _OF_THE_HEAD - stores.keys()):
            how = RECORDED.get(name, "attention, which is not measured here")
            if name in RECORDED:
                where = "reference=STORE, or " if name == "history_nll" else ""
                how = f"a store by {where}recorded={{{name.removesuffix('_nll')!r}: STORE}}"
            raise ValueError(f"method {method.name!r} needs {name}: {how}")
        if method.scope not in ("sample", "micro_batch"):
            raise ValueError(
                f"method {method.name!r} ranks over scope {method.scope!r}, but pairs are weighed as TRL asks for "
                "them; give it scope='sample' or 'micro_batch'"
            )
        if hasattr(method.rule, "after_step"):
            raise ValueError(f"method {method.name!r} moves with each optimizer step, which pairs do not; use another")
        if getattr(method.rule, "per_sample", False):  # a log-ratio is a sum, whatever the answer's length
            method = replace(method, rule=replace(method.rule, per_sample=False))  # type: ignore[arg-type]
        needs = method.needs
        self.statistics: StatsOptions = {"renyi2": "renyi2" in needs, "rank": "rank" in needs}
        self.statistics["entropy"] = not needs.isdisjoint(MOMENTS)
        self._method, self._trainer, self._stores = method, trainer, stores
        self._waiting: tuple[Tensor, Tensor] | None = None  # (labels, weights) for the reference

    def __call__(self, layout: BatchLayout, stats: TokenStats, vocab_size: int) -> Tensor:
        """The weights of the policy's tokens, by row-aligned statistics [B, S] -> [B, S] float32, label-aligned."""
        measured: dict[str, Any] = {
            name: to_labels(of) for name, of in ({"nll": stats.nll} | stats.fields()).items() if name in MEASURED
        }
        device = layout.labels.device
        recorded: dict[str, Any] = {
            name: store.lookup_layout(layout).to(device) for name, store in self._stores.items()
        }
        side = torch.ones(layout.labels.shape, device=device)
        side[len(side) // 2 :] = -1  # what tells rejected answers, as weights of the data do
        signals = TokenSignals(
            layout.response,
            layout.sample,
            weight=side,
            key=layout.token_keys() if "key" in self._method.needs else None,
            vocab_size=vocab_size,
            step=self._trainer.state.global_step,
            **measured,
            **recorded,
        )
        weights = self._method(signals) * side
        self._waiting = layout.labels, weights
        return weights

    def again(self, labels: Tensor) -> Tensor | None:
        """The weights that the policy's tokens were given, once; None where the policy was not asked about `labels`."""
        waiting, self._waiting = self._waiting, None
        return waiting[1] if waiting is not None and torch.equal(waiting[0], labels) else None


class RecordedReference:
    """A reference's losses in a store, called as TRL calls its reference model.

    Attributes:
        store: of `tokensel score --both_answers true`, or of `record_losses(reference, trainer.train_dataset, ...)`.
        weights: by which its log-probabilities are multiplied, or None.
    """

    def __init__(self, store: HistoryStore, weights: PairWeights | None) -> None:
        self.store, self.weights = store, weights

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, fused_lm_head: bool, **_: Any
    ) -> Any:
        """-> TRL's FusedCausalLMOutput with log_probs [B, S - 1], float32, nats, of labels [B, S].

        Raises:
            HistoryMissError: a document that is not in the store, or was scored with other response tokens.
        """
        from trl.trainer.utils import FusedCausalLMOutput

        layout = BatchLayout.from_batch({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
        log_p = -self.store.lookup_layout(layout).to(labels.device)
        if self.weights is not None:
            weights = self.weights.again(labels)
            if weights is None:
                raise RuntimeError("the reference was asked before the policy; this TRL is not one that is supported")
            log_p = log_p * weights
        return FusedCausalLMOutput(log_probs=log_p[:, 1:])
