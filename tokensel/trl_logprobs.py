"""TRL's trainers of preferences and policies with the log-probabilities of `token_logprobs`; their losses stay TRL's.

TRL asks its model for them, `model(**inputs, labels=labels, fused_lm_head=True)`, and this answers in its place: from
the base model's hidden states, inside the head's own forward, without logits. A row that has no part in the loss costs
the backward nothing.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import trl
from torch import Tensor
from transformers import Trainer

from tokensel.documents import IGNORE_INDEX, to_rows
from tokensel.model import Forward, PatchedModel, apply_to, unwrap
from tokensel.ops.loss import token_logprobs
from tokensel.ops.stats import token_stats

T = TypeVar("T", bound=Trainer)


class _Answer:
    """What a model says where TRL asks for log-probabilities; every other call goes on to `forward`."""

    def __init__(self, temperature: float, statistics: dict[str, Any], impl: str) -> None:
        self.temperature, self.statistics, self.impl = temperature, statistics, impl

    def __call__(self, model: Any, forward: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **inputs)
        if args:
            raise TypeError("with fused_lm_head=True, pass the model's inputs by keyword (input_ids=..., labels=...)")
        labels, rows = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        items = inputs.pop("num_items_in_batch", None)
        if rows is not None:
            return self.output(model._tokensel_patched, inputs, rows, items)
        answer = self.output(model._tokensel_patched, inputs, to_rows(labels, IGNORE_INDEX), items)
        per_token = {name: x for name, x in answer.items() if x is not None and x.dim() == 2}  # (B, S)
        return type(answer)(**answer | {name: x[:, :-1] for name, x in per_token.items()})  # nothing follows the last

    def output(self, patched: PatchedModel, inputs: dict, labels: Tensor, items: Any) -> Any:
        """TRL's FusedCausalLMOutput. labels: [B, S], of the token that each row predicts."""
        from trl.trainer.utils import FusedCausalLMOutput

        hidden, aux_loss = patched.backbone_and_aux_loss(inputs)
        options: dict[str, Any] = {"temperature": self.temperature, "impl": self.impl, **patched.head_options}
        entropy = "entropy" in self.statistics

        def of_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
            hidden = hidden.to(torch.promote_types(hidden.dtype, weight.dtype))  # of a head that is float32
            options["bias"] = bias
            stats = token_stats(hidden, weight, labels, **self.statistics, **options)
            log_p, entropies = token_logprobs(hidden, weight, labels, stats=stats, entropy=entropy, **options)
            mean = None if stats.logit_sum is None else stats.logit_sum / weight.shape[0]
            return log_p, entropies, None if stats.renyi2 is None else -stats.renyi2, mean, stats.correct

        log_p, entropies, squares, mean, correct = patched.with_whole_head(of_head, hidden)
        assert log_p is not None
        mask = labels != IGNORE_INDEX
        loss = -log_p.sum() / (mask.sum().clamp(min=1) if items is None else items)
        if aux_loss is not None:
            loss = loss + patched.router_weight * aux_loss
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=log_p,
            entropy=entropies,
            log_sum_sq_probs=squares,
            mean_logits=mean,
            is_top1=correct,
            label_mask=mask,
            aux_loss=aux_loss,
        )


def use_token_logprobs(trainer: T, *, impl: str = "auto") -> T:
    """Has a trainer of TRL take its log-probabilities from `token_logprobs`: DPO, KTO, GRPO and RLOO, of TRL 1.16.

    Call it once the trainer is there, before it trains. Loss, metrics and reference stay TRL's; its model, and the
    reference if there is one, are patched by `tokensel.apply_to`, which compares them with their own logits.

    Args:
        trainer: of TRL, whose models are causal language models with a plain head.
        impl: as in `token_stats`.
    Returns:
        The trainer.
    Raises:
        ValueError: a trainer that does not ask its model for log-probabilities; a model that `apply_to` refuses.
    """
    reference: Any = getattr(trainer, "ref_model", None)
    models = [unwrap(model) for model in (trainer.model, reference) if model is not None]
    for model in models:
        forward = getattr(model.forward, "__func__", model.forward)
        if "fused_lm_head" not in getattr(getattr(forward, "__code__", None), "co_varnames", ()):
            raise ValueError(
                f"{type(trainer).__name__} (TRL {trl.__version__}) does not ask its model for log-probabilities; "
                "supported are DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer of TRL 1.16, before they train"
            )
    statistics = {"entropy": True}  # what the trainer logs of its policy, and weighs by
    if isinstance(trainer, (trl.DPOTrainer, trl.KTOTrainer)):
        statistics["logit_sum"] = True
    if getattr(trainer.args, "use_weighting", False):
        statistics["renyi2"] = True
    for model, asked in zip(models, (statistics, {}), strict=False):
        answer = _Answer(getattr(trainer, "temperature", 1.0), asked, impl)
        Forward(apply_to(model).model, answer)
    return trainer
