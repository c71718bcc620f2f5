"""TRL's trainers of preferences and policies with the log-probabilities of `token_logprobs`; their losses stay TRL's.

TRL asks its model for them, `model(**inputs, labels=labels, fused_lm_head=True)`, and this answers in its place: from
the base model's hidden states, inside the head's own forward, without logits.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import trl
from torch import Tensor
from transformers import Trainer

from tokensel.arguments import parse_recorded
from tokensel.documents import IGNORE_INDEX, BatchLayout, to_rows
from tokensel.model import Forward, PatchedModel, apply_to, remove, unwrap
from tokensel.ops.loss import token_logprobs
from tokensel.ops.stats import token_stats
from tokensel.preferences import PairWeights, RecordedReference
from tokensel.select.methods import SelectionMethod
from tokensel.store import HistoryStore, content_of

T = TypeVar("T", bound=Trainer)


class _Answer:
    """What a patched model says where TRL asks for log-probabilities: TRL's FusedCausalLMOutput.

    Attributes:
        statistics: keywords of `token_stats`, what the trainer logs or weighs by beside log-probabilities.
        dtype: of mixed precision, or None; TRL's own forward of a reference stands inside it.
        weights: by which log-probabilities are multiplied, or None.
    """

    def __init__(
        self,
        temperature: float,
        statistics: dict[str, Any],
        dtype: torch.dtype | None,
        impl: str,
        weights: PairWeights | None,
    ) -> None:
        self.temperature, self.statistics, self.dtype, self.impl = temperature, statistics, dtype, impl
        self.weights = weights

    def __call__(self, patched: PatchedModel, *args: Any, fused_lm_head: bool, **inputs: Any) -> Any:
        if args:
            raise TypeError("with fused_lm_head=True, pass the model's inputs by keyword (input_ids=..., labels=...)")
        labels, rows = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        items = inputs.pop("num_items_in_batch", None)
        with torch.autocast(patched.model.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            if rows is not None:
                if self.weights is not None:
                    raise ValueError(
                        "method weighs whole answers, which context and sequence parallelism cut; use neither"
                    )
                return self.output(patched, inputs, rows, items)
            answer = self.output(patched, inputs, to_rows(labels, IGNORE_INDEX), items, labels)
        per_token = {name: x for name, x in answer.items() if x is not None and x.dim() == 2}  # (B, S)
        return type(answer)(**answer | {name: x[:, :-1] for name, x in per_token.items()})  # nothing follows the last

    def output(
        self, patched: PatchedModel, inputs: dict, labels: Tensor, items: Any, of_tokens: Tensor | None = None
    ) -> Any:
        """labels: [B, S], of the token that each row predicts; of_tokens: of each token itself, for weights."""
        from trl.trainer.utils import FusedCausalLMOutput

        hidden, aux_loss = patched.backbone_and_aux_loss(inputs)
        options: dict[str, Any] = {"temperature": self.temperature, "impl": self.impl, **patched.head_options}
        entropy = "entropy" in self.statistics

        def of_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
            options["bias"] = bias
            stats = token_stats(hidden, weight, labels, **self.statistics, **options)
            log_p, entropies = token_logprobs(hidden, weight, labels, stats=stats, entropy=entropy, **options)
            if self.weights is not None and of_tokens is not None:
                weights = self.weights.again(of_tokens)
                if weights is None:
                    layout = BatchLayout.from_batch(inputs | {"labels": of_tokens})
                    weights = self.weights(layout, stats, weight.shape[0])
                log_p = log_p * to_rows(weights, 0)
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


def _asks(model: Any) -> bool:
    """Whether a trainer of TRL has had the model answer `fused_lm_head`; accelerate may have wrapped that since."""
    forward: Any = model.forward
    while forward is not None:
        if isinstance(forward, Forward):  # of an earlier call
            forward = forward.inner
            continue
        function = getattr(forward, "__func__", forward)
        if "fused_lm_head" in getattr(getattr(function, "__code__", None), "co_varnames", ()):
            return True
        forward = getattr(function, "__wrapped__", None)
    return False


def _opened(trainer: Any, reference: Any, method: SelectionMethod | None, recorded: Any) -> dict[str, HistoryStore]:
    """The stores by the signals that they hold, "history_nll" that of the reference; refuses what they are not for."""
    name = type(trainer).__name__
    files = {f"{each}_nll": file for each, file in parse_recorded(recorded).items()}
    if reference is not None:
        if not isinstance(trainer, (trl.DPOTrainer, trl.KTOTrainer)):
            raise ValueError(
                f"{name} samples its answers as it trains, so no losses of a reference can be recorded for it; leave "
                "reference out (beta=0 needs none)"
            )
        for setting in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(trainer.args, setting, False):
                raise ValueError(f"reference and {setting}=True are two references; leave one out")
        if "history_nll" in files:
            raise ValueError("reference and recorded['history'] are two stores of one signal; leave one out")
        mode = getattr(trainer.args, "truncation_mode", "keep_start")
        if mode != "keep_start":
            raise ValueError(
                f"truncation_mode={mode!r} cuts answers in front, and stores hold whole "
                "beginnings; set it to 'keep_start'"
            )
        files["history_nll"] = reference
    if recorded and method is None:
        raise ValueError("recorded losses are for a method; give method=tokensel.methods.get(...)")
    if method is not None:
        if not isinstance(method, SelectionMethod):
            raise TypeError(f"method must come from tokensel.methods.get(...); got {method!r}")
        if "sft" in getattr(trainer.args, "loss_type", ()):
            raise ValueError(
                "loss_type 'sft' is a mean over all tokens of the chosen answer, which a method would shrink; leave it "
                "out, or the method"
            )
        if not isinstance(trainer, trl.DPOTrainer):
            raise ValueError(f"method chooses among the tokens of both answers of DPOTrainer; leave it out of {name}")
        for setting in ("precompute_ref_log_probs", "use_weighting"):
            if getattr(trainer.args, setting):
                raise ValueError(
                    f"{setting}=True takes the log-probabilities of all tokens, and a method weighs them; set it to "
                    "False (a reference without a model: reference=STORE)"
                )
    if files and getattr(trainer, "_is_vision_dataset", False):
        raise ValueError("stores know documents by their token ids, which do not tell images; use a live reference")
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    stores = {
        signal: HistoryStore.open(file, tokenizer=tokenizer, content=content_of(signal))
        for signal, file in files.items()
    }
    for store in stores.values():
        store.repair = (
            "Run `tokensel score --both_answers true` with the same tokenizer, chat template, max_length and dataset "
            "as this run, or record the trainer's rows: tokensel.record_losses(reference, trainer.train_dataset, PATH, "
            "max_length=trainer.args.max_length)"
        )
    return stores


def use_token_logprobs(
    trainer: T,
    *,
    reference: str | os.PathLike[str] | None = None,
    method: SelectionMethod | None = None,
    recorded: dict[str, str] | None = None,
    impl: str = "auto",
) -> T:
    """Has a trainer of TRL take its log-probabilities from `token_logprobs`: DPO, KTO, GRPO and RLOO, of TRL 1.16.

    Call it once the trainer is there, before it trains. Loss and metrics stay TRL's; its model, and the reference if
    there is one, are patched by `tokensel.apply_to`, which compares them with their own logits.

    Args:
        trainer: of TRL, whose models are causal language models with a plain head. A reference that the trainer has
            sharded already (FSDP, ZeRO-3) cannot be patched: use adapters, `reference` or `precompute_ref_log_probs`.
        reference: of DPO and KTO, a store of the reference's losses, by `tokensel score --both_answers true` or by
            `record_losses(reference, trainer.train_dataset, ...)`. A model that the trainer has loaded is let go.
        method: of DPO, from `tokensel.methods.get`: with its weights w, detached, an answer's log-ratio is
            Σ w (log π - log π_ref). It looks at the policy, and at the recorded reference as `history_nll`.
        recorded: further losses that the method needs, {"contrast": STORE}, of the same documents.
        impl: as in `token_stats`.
    Returns:
        The trainer.
    Raises:
        ValueError: a trainer that does not ask its model for log-probabilities; models that `apply_to` refuses, or that
            it patched before the trainer was made; `cast_lm_head_to_fp32`; a store made with another tokenizer, or for
            a trainer that samples its answers; a method whose signals are not there. Nothing is changed then.
    """
    if getattr(trainer.args, "cast_lm_head_to_fp32", False):
        raise ValueError(
            "cast_lm_head_to_fp32 is not supported here, where the head's products are float32 in any case; set it to "
            "False, and bf16=False if the hidden states should be float32, too"
        )
    live: Any = getattr(trainer, "ref_model", None)
    if isinstance(live, RecordedReference) and reference is None:
        reference = live.store.path  # of an earlier call
    live = None if reference is not None else live
    models: list[Any] = [unwrap(model) for model in (trainer.model, live) if model is not None]
    for model in models:
        if hasattr(model, "_tokensel_patched") and not isinstance(model.__dict__.get("forward"), Forward):
            raise ValueError(
                f"{type(model).__name__} was patched by tokensel before {type(trainer).__name__} was made, whose "
                "forward stands above; make the trainer on a model that is not patched (tokensel.remove(model) first)"
            )
        if not _asks(model):
            raise ValueError(
                f"{type(trainer).__name__} (TRL {trl.__version__}) does not ask its model for log-probabilities; "
                "supported are DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer of TRL 1.16, before they train"
            )
    stores = _opened(trainer, reference, method, recorded)
    weights = None if method is None else PairWeights(method, trainer, stores)
    statistics = {"entropy": True}  # what the trainer logs of its policy, and weighs by
    if isinstance(trainer, (trl.DPOTrainer, trl.KTOTrainer)):
        statistics["logit_sum"] = True
    if getattr(trainer.args, "use_weighting", False):
        statistics["renyi2"] = True
    if weights is not None:
        statistics |= {name: True for name, needed in weights.statistics.items() if needed}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    patched: list[PatchedModel] = []
    try:
        for model in models:
            patched.append(apply_to(model, layer=None))
    except BaseException:
        for done in patched:
            remove(done.model)
        raise
    for done, asked in zip(patched, (statistics, {}), strict=False):
        done.answer = _Answer(getattr(trainer, "temperature", 1.0), asked, dtype, impl, weights)
    if reference is not None:
        dpo: Any = trainer
        kept: list[Any] = dpo.accelerator._models  # or accelerate would keep the model that goes
        kept[:] = [model for model in kept if model is not dpo.ref_model]
        dpo.ref_model = RecordedReference(stores["history_nll"], weights)
    return trainer
