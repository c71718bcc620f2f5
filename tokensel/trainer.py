"""The training loop: token selection for transformers.Trainer and its subclasses.

One step runs `tokensel.step.Selection`, where steps 1 to 7 of the data path stand in order; this file only brings
the batch, the history and the denominator to it, and logs what came out.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from tokensel import methods
from tokensel.arguments import SelectionArguments, parse_recorded, refuse_contradictions, refuse_other_losses
from tokensel.choose_history import choose_history, live_history
from tokensel.data.collators import SelectionCollator
from tokensel.documents import IGNORE_INDEX, BatchLayout
from tokensel.files import replacing
from tokensel.metrics import selection_metrics, selection_sums, token_metric_sums, token_metrics
from tokensel.model import apply_to, eval_mode, refuse_patched
from tokensel.parallel import check_ranks_agree
from tokensel.report.watch import SampleRecorder
from tokensel.select.method import SelectionMethod
from tokensel.select.signals import RECORDED, TokenSignals
from tokensel.step import Progress, Selection, SelectionOutput
from tokensel.store import HistoryStore, content_of

STATE_FILE = "selection_state.safetensors"


if TYPE_CHECKING:
    _Base = Trainer
else:  # it stands before whatever trainer the user has
    _Base = object


class TokenSelectionMixin(_Base):
    """Token selection for a subclass of transformers.Trainer: `class Mine(TokenSelectionMixin, Trainer)`.

    `args` carries the fields of SelectionArguments. The model is patched by `tokensel.apply_to`; evaluation that asks
    for the loss alone is computed without logits too, any other evaluation is the base trainer's.

    `method` is what the settings `method` and `method_args` name, where somebody has built it already.

    Over a trainer of TRL the metrics that its users know are logged, of all response tokens: entropy (nats),
    mean_token_accuracy, num_tokens (since training started).

    Raises:
        TypeError: args without the fields of SelectionArguments.
        ValueError: settings that contradict each other or ask for another loss, a model that is patched already, at
            construction.
    """

    args: Any  # the base trainer's types know neither our settings nor what a user's trainer brings
    model: Any
    train_dataset: Any
    processing_class: Any

    def __init__(self, *args, method: SelectionMethod | None = None, **kwargs) -> None:
        given = dict(zip(("model", "args", "data_collator", "train_dataset"), args, strict=False)) | kwargs
        refuse_other_losses(given.get("args"))
        if isinstance(given.get("model"), nn.Module):
            refuse_patched(given["model"])
        self._of_trl = any(c.__module__.startswith("trl.") for c in type(self).__mro__)
        columns = getattr(given.get("train_dataset"), "column_names", None) or ()
        if self._of_trl and given.get("data_collator") is None and "token_weights" in columns:
            raise ValueError(
                "TRL drops the column token_weights when it prepares and collates; put the weights into a "
                "weights_store (`tokensel select`), or give encoded rows, a data_collator that pads token_weights, and "
                "dataset_kwargs={'skip_prepare_dataset': True}"
            )
        super().__init__(*args, **kwargs)
        settings = self.args
        # first of all: a rank that raises alone leaves others waiting (args of others may have our fields alone)
        check_ranks_agree(SelectionArguments.selection_settings(settings))
        self.method = SelectionArguments.build_method(settings) if method is None else method
        # a copy, which trackers are shown and checkpoints keep: the caller's may serve another model next
        self.args = settings = copy.copy(settings)
        settings.history = choose_history(settings, self.model, self.method.needs)
        refuse_contradictions(settings)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func is not supported: the loss is made inside the selection step; leave it out"
            )
        if self.model_init is not None:
            raise ValueError(
                "model_init is not supported: train() would make the model anew, without its patch and its history; "
                "give the trainer model=model_init()"
            )
        files = parse_recorded(settings.recorded)
        if settings.history == "recorded":
            files["history"] = settings.history_store
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.live_history = history = live_history(
            settings, self.model, self.processing_class, self.method.needs, sharded
        )
        if history is not None and history.signal.removesuffix("_nll") in files:
            raise ValueError(f"recorded and history={settings.history!r} both give {history.signal}; drop one")
        available = {f"{name}_nll" for name in files} | ({history.signal} if history else set())
        for name in sorted(self.method.needs & RECORDED.keys() - available):
            raise ValueError(f"method {self.method.name!r} needs {RECORDED[name]}")
        self._refuse_data_without_prompt()
        self._selection = Selection(  # refuses settings that contradict each other before anything is loaded
            self.method,
            history=history,
            row=settings.row,
            prompt=settings.prompt,
            sink=settings.sink,
            impl=settings.impl,
            token_metrics=self._of_trl,
        )
        self.recorded = {
            signal: HistoryStore.open(file, tokenizer=self.processing_class, content=content_of(signal))
            for signal, file in ((f"{name}_nll", file) for name, file in files.items())
        }
        self.given_weights = None
        if settings.weights_store is not None:
            self.given_weights = HistoryStore.open(
                settings.weights_store, tokenizer=self.processing_class, content="weight"
            )
        stores = self.recorded | ({"weights": self.given_weights} if self.given_weights is not None else {})
        for store in stores.values():  # of TRL, which may take another than the tokenizer's
            store.chat_template = getattr(self, "chat_template", None) or store.chat_template
        if self.accelerator.num_processes > 1:
            check_ranks_agree({f"what {name} was recorded as": s.fingerprint() for name, s in stores.items()})
        apply_to(self.model, settings.layer if "mass" in self.method.needs else None)
        # The loss is divided by what get_batch_samples counts, so the base trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self._selection_sums: dict[str, Tensor] = {}  # since the last log entry
        self._evaluation_sums: dict[str, Tensor] = {}
        self._selection_totals: dict[str, float] = {}  # of entries already logged
        self._last_log: float | None = None  # None before the first step, so that set-up is not counted
        if settings.record_samples:
            self.add_callback(SampleRecorder(self, settings.record_samples))
        self.add_callback(_Advance(self))

    def _refuse_data_without_prompt(self, rows: int = 1000) -> None:
        """Attention to the prompt says nothing of language-modelling data, where every token is a response."""
        data = self.train_dataset
        if "mass" not in self.method.needs or not hasattr(data, "__getitem__"):
            return
        checked = min(rows, len(data))
        for i in range(checked):  # one row, wherever there are prompts
            row = data[i]
            labels = row.get("labels") if isinstance(row, Mapping) else None
            if labels is None or IGNORE_INDEX in labels[1:]:
                return
        if checked:
            raise ValueError(
                f"method {self.args.method!r} measures attention to the prompt, but the first {checked} rows of the "
                f"training data have none: no label is {IGNORE_INDEX}. Mask the prompt (with TRL: prompt-completion "
                "rows, or chats with assistant_only_loss=True), or choose a method without attention"
            )

    def recorded_collator(self) -> SelectionCollator:
        """The data collator, with what was recorded of the rows beside it."""
        return SelectionCollator(self.data_collator, columns=(), losses=self.recorded, weights=self.given_weights)

    def get_train_dataloader(self):
        """The base trainer's, with recorded losses and weights beside each batch."""
        collator, self.data_collator = self.data_collator, self.recorded_collator()
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        if has_length(loader):  # or ranks with one batch more would wait for the others forever
            fix = "set dataloader_drop_last, or even_batches in accelerator_config"
            check_ranks_agree({"the number of batches": len(loader)}, fix)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the loss's denominator: over all of them and all ranks.

        For most methods that is the number of tokens that will be kept, known before any forward. A method of scope
        "batch" scores all micro-batches first, and each takes along what was chosen of it.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # what the tokens belong to is worked out once, here, and handed along with the batch
        batches = [batch | {"layout": BatchLayout.from_batch(batch)} for batch in map(self._prepare_inputs, batches)]
        total = torch.zeros((), dtype=torch.float64, device=device)
        if self.method.scope == "batch":
            batches = self._choose_across(batches)
        for b in batches:
            layout, given = b["layout"], b.get("token_weights")
            if given is not None:
                given = torch.where(layout.predictable, given, 0)
            if "chosen_weights" in b:
                prompts = 0 if given is None else torch.where(layout.response, 0, given).abs().sum()
                total += b["chosen_weights"].abs().sum() + prompts
            else:
                count = self.method.count(layout.response, layout.sample, given)
                assert count is not None, "a method of another scope than 'batch' counts before it scores"
                total += count.to(device)
        if self.args.loss_denominator == "micro_batch":
            return batches, None
        return batches, self.accelerator.gather(total).sum()

    @torch.no_grad()
    def _choose_across(self, batches: list[dict]) -> list[dict]:
        """Ranks the tokens of all micro-batches and ranks together: one more forward of each, without gradient."""
        model, scored = self.model_wrapped, []
        self._set_signature_columns_if_needed()
        names = {*(self._signature_columns or ()), *RECORDED, "layout"}
        with eval_mode(model):  # dropout must not choose
            for batch in batches:
                inputs = {name: value for name, value in batch.items() if name in names}
                with self.compute_loss_context_manager():
                    scored.append(model(**inputs, selection=replace(self.selection(None), score_only=True)))
        # in the order in which one process would see them (micro-batch, rank, row), so that ties end alike
        width = torch.tensor([max(o.score.numel() for o in scored)], device=self.args.device)
        widest = int(self.accelerator.gather(width).max())
        everybody = {}
        for name in ("score", "response", "sample", "weight"):
            parts = []
            for batch, output in zip(batches, scored, strict=True):
                part = batch.get("token_weights", torch.ones_like(output.score)) if name == "weight" else output[name]
                parts.append(nn.functional.pad(part.flatten(), (0, widest - part.numel())))  # with False and 0
            everybody[name] = self.accelerator.gather(torch.stack(parts)[None]).transpose(0, 1)  # (batch, rank, token)
        shape = (*everybody["score"].shape[:2], 1)  # (batch, rank, 1)
        first = widest * torch.arange(math.prod(shape), device=self.args.device).view(shape)
        signals = TokenSignals(everybody["response"], everybody["sample"] + first, weight=everybody["weight"].float())
        weights = self.method.select(everybody["score"], signals)[:, self.accelerator.process_index]
        return [
            batch | {"chosen_weights": row[: output.score.numel()].view_as(output.score)}
            for batch, row, output in zip(batches, weights, scored, strict=True)
        ]

    def selection(self, denominator: Tensor | None) -> Selection:
        """What the next micro-batch is selected by."""
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)  # of this step; set when it begins
        # a mean over each micro-batch, where the rest of the loss is a sum with one denominator
        router_share = 1.0 if denominator is None else 1 / (micro_batches * self.args.world_size)
        return replace(self._selection, denominator=denominator, router_share=router_share)

    def _set_signature_columns_if_needed(self):
        """Data columns that the step reads are kept, although the model's forward does not name them."""
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        self._signature_columns += [c for c in ("token_weights",) if c not in self._signature_columns]

    def samples_per_step(self) -> int:
        """Rows of the dataset in an optimizer step, over accumulation and ranks."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _save_optimizer_and_scheduler(self, output_dir):
        """The selection's state beside the optimizer's, before the file that makes a checkpoint whole."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = self._selection.state_dict() | {"history": self.args.history}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.pop("tensors").items()}
            with replacing(os.path.join(output_dir, STATE_FILE)) as temporary:
                save_file(tensors, temporary, {name: str(value) for name, value in state.items()})

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_selection_state(os.path.join(checkpoint, STATE_FILE))

    def _load_selection_state(self, file: str) -> None:
        own = self._selection.state_dict()
        done = {"steps": self.state.global_step, "samples": self.state.global_step * self.samples_per_step()}
        if os.path.isfile(file):
            with safe_open(file, "pt") as saved:
                # 0.1 called a rule a selector, and left out what the trainer's own state says
                tensors = {n.replace("selector.", "rule.", 1): saved.get_tensor(n) for n in saved.keys()}
                state = done | saved.metadata() | {"tensors": tensors}
        elif not own["tensors"]:  # with save_only_model, and from 0.1: nothing but the steps has advanced
            state = done | {"method": self.method.name, "history": self.args.history, "tensors": {}}
        else:
            raise ValueError(
                f"{file} is missing: the checkpoint was made without history {self.args.history!r} and method "
                f"{self.method.name!r}, or with save_only_model; start anew or resume with its settings"
            )
        if state["history"] != self.args.history:
            raise ValueError(
                f"{file} was made with history={state['history']!r}, this run has {self.args.history!r}; resume with "
                "that"
            )
        try:
            self._selection.load_state_dict(state | {"history": own["history"]})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def training_step(self, *args, **kwargs):
        if self._last_log is None:
            self._last_log = time.perf_counter()
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        output = model(**inputs, selection=self.selection(num_items_in_batch))
        if not isinstance(output, SelectionOutput):
            raise TypeError(
                f"the model returned {type(output).__name__} instead of a SelectionOutput: its forward was replaced "
                "after the trainer was made (by Liger's loss patch, say). Leave that patch out, or apply it before"
            )
        self.record_selection(inputs, output)
        loss = output.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # ranks' gradients are averaged, the denominator is global
        return (loss, output) if return_outputs else loss

    def record_selection(self, inputs: dict, output: SelectionOutput) -> None:
        """Adds a micro-batch to the metrics of the next log entry; override to look at selections as they happen."""
        for name, value in selection_sums(inputs, output).items():
            self._selection_sums[name] = self._selection_sums.get(name, 0) + value

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Merges the selection's metrics since the last entry: kept_share, rel_mean, rel_std (nats), tokens/s, ..."""
        if ("loss" in logs or "train_loss" in logs) and self._selection_sums:
            metrics = self._selection_metrics()
            if "loss" in logs:
                logs |= {name: round(value, 6) for name, value in metrics.items()}
        if self._evaluation_sums and not self.model.training:
            sums, self._evaluation_sums = self._over_ranks(self._evaluation_sums), {}
            metrics = token_metrics(sums) | {"num_tokens": self._selection_totals.get("tokens", 0)}
            logs |= {f"eval_{name}": value for name, value in metrics.items()}
        super().log(logs, *args, **kwargs)

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        totals = torch.stack([sums[n].double() for n in names])
        totals = self.accelerator.reduce(totals, "sum").tolist()  # the one wait for the device per log entry
        return dict(zip(names, totals, strict=True))

    def _selection_metrics(self) -> dict[str, float]:
        sums, self._selection_sums = self._over_ranks(self._selection_sums), {}
        now = time.perf_counter()
        assert self._last_log is not None  # it was set before the first step
        sums["seconds"], self._last_log = now - self._last_log, now
        for name, value in sums.items():
            self._selection_totals[name] = self._selection_totals.get(name, 0) + value
        metrics = selection_metrics(sums)
        if self._of_trl:
            metrics |= token_metrics(sums) | {"num_tokens": self._selection_totals["tokens"]}
        return metrics

    def selection_totals(self) -> dict[str, float]:
        """The logged metrics over the whole run: kept_share, responses, tokens_per_second, rel_mean, ..."""
        return selection_metrics(self._selection_totals) | {"responses": self._selection_totals.get("responses", 0)}

    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None):
        """Mean loss over all response tokens, as if they had no weights; without logits where only it is asked for."""
        inputs = {name: value for name, value in inputs.items() if name != "token_weights"}
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            everything = Selection(methods.get("full"), impl=self.args.impl, token_metrics=self._of_trl)
            output = model(**inputs, selection=everything)
        for name, value in token_metric_sums(output).items():
            self._evaluation_sums[name] = self._evaluation_sums.get(name, 0) + value
        return output.loss.detach(), None, None


class _Advance(TrainerCallback):
    """Advances the selection after each optimizer step, before a checkpoint of it can be written."""

    def __init__(self, trainer: TokenSelectionMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:  # not resumed: a second `train()` draws and warms up as the first did
            self.trainer._selection.progress = Progress()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.trainer._selection.step(self.trainer.samples_per_step())


class SelectiveTrainer(TokenSelectionMixin, Trainer):
    """transformers.Trainer with token selection; `args` is a SelectiveTrainingArguments."""
