"""The training loop: token selection for transformers.Trainer and its subclasses.

One step runs `tokensel.step.Selection`, where steps 1 to 7 of the data path stand in order; this file only brings
the batch, the history and the denominator to it, and logs what came out.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from tokensel import methods
from tokensel.arguments import (
    SelectionArguments,
    is_of_trl,
    parse_recorded,
    refuse_arguments,
    refuse_contradictions,
    with_defaults,
)
from tokensel.checkpoint import load_selection, save_selection
from tokensel.choose_history import choose_history, live_history
from tokensel.data.collators import CollatedRows, SelectionCollator, refuse_data_without_prompt
from tokensel.documents import BatchLayout
from tokensel.metrics import SelectionLog, selection_metrics, selection_sums
from tokensel.model import PatchedModel, apply_to, eval_mode, remove, unwrap
from tokensel.parallel import check_ranks_agree, without_repeated_rows
from tokensel.recording import record_losses
from tokensel.report.watch import SampleRecorder
from tokensel.select.across import choose_across
from tokensel.select.method import SelectionMethod
from tokensel.select.signals import RECORDED
from tokensel.step import Progress, Selection, SelectionOutput
from tokensel.store import HistoryStore, content_of

if TYPE_CHECKING:
    _Base = Trainer
else:  # it stands before whatever trainer the user has
    _Base = object


class TokenSelectionMixin(_Base):
    """Token selection for a subclass of transformers.Trainer: `class Mine(TokenSelectionMixin, Trainer)`.

    `args` carries the fields of SelectionArguments; those that it lacks have their defaults. The model is patched by
    `tokensel.apply_to`, which an earlier trainer's patch makes room for. Evaluation that asks for the loss alone is
    computed without logits too, any other evaluation is the base trainer's; its loss is the mean over all response
    tokens in either case.

    `method` is what the settings `method` and `method_args` name, where somebody has built it already.

    Over a trainer of TRL the metrics that its users know are logged, of all response tokens: entropy (nats),
    mean_token_accuracy, num_tokens (since training started).

    Raises:
        TypeError: args that the base trainer does not take.
        ValueError: no method, settings that contradict each other or ask for another loss, at construction.
    """

    args: Any  # the base trainer's types know neither our settings nor what a user's trainer brings
    model: Any
    train_dataset: Any
    processing_class: Any
    model_init: Any
    _metrics: Any  # of TRL
    _patched: PatchedModel

    def __init__(self, *args, method: SelectionMethod | None = None, **kwargs) -> None:
        given = dict(zip(("model", "args", "data_collator", "train_dataset"), args, strict=False)) | kwargs
        self._of_trl = is_of_trl(self)
        refuse_arguments(given.get("args"), method, self._of_trl)
        model = given.get("model")
        earlier = getattr(unwrap(model), "_tokensel_patched", None) if isinstance(model, nn.Module) else None
        if earlier is not None:
            earlier.uninstall()  # another trainer's, as in a notebook; that one takes it back when it needs it
        try:
            self._construct(given, method, *args, **kwargs)
        except BaseException:
            if earlier is not None:
                if hasattr(earlier.model, "_tokensel_patched"):
                    remove(earlier.model)
                earlier.install()
            raise

    def _construct(self, given: dict[str, Any], method: SelectionMethod | None, *args, **kwargs) -> None:
        columns = getattr(given.get("train_dataset"), "column_names", None) or ()
        if self._of_trl and given.get("data_collator") is None and "token_weights" in columns:
            raise ValueError(
                "TRL drops the column token_weights when it prepares and collates; put the weights into a "
                "weights_store (`tokensel select`), or give encoded rows, a data_collator that pads token_weights, and "
                "dataset_kwargs={'skip_prepare_dataset': True}"
            )
        super().__init__(*args, **kwargs)
        self.args = settings = with_defaults(self.args)
        # first of all: a rank that raises alone leaves others waiting (args of others may have our fields alone)
        check_ranks_agree(SelectionArguments.selection_settings(settings))
        self.method = SelectionArguments.build_method(settings) if method is None else method
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
        needs, sharded = self.method.needs, self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.live_history = history = live_history(settings, self.model, self.processing_class, needs, sharded)
        if history is not None and history.signal.removesuffix("_nll") in files:
            raise ValueError(f"recorded and history={settings.history!r} both give {history.signal}; drop one")
        available = {f"{name}_nll" for name in files} | ({history.signal} if history else set())
        for name in sorted(needs & RECORDED.keys() - available):
            raise ValueError(f"method {self.method.name!r} needs {RECORDED[name]}")
        if "mass" in needs and self.train_dataset is not None:
            collate = self._get_collator_with_removed_columns(self.data_collator)
            refuse_data_without_prompt(self.train_dataset, collate, settings.train_batch_size, self.method.name)
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
        if self._of_trl and hasattr(base := unwrap(self.model), "router_aux_loss_coef"):
            base.router_aux_loss_coef = base.config.get_text_config().router_aux_loss_coef  # which TRL has updated
        self._patch()
        # The loss is divided by what get_batch_samples counts, so the base trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self._selection_log = SelectionLog(lambda sums: self.accelerator.reduce(sums, "sum"), self._of_trl)
        if settings.record_samples:
            self.add_callback(SampleRecorder(self, settings.record_samples))
        self.add_callback(_Advance(self))

    def _patch(self) -> None:
        """The model is patched as this trainer needs it: another one may have had it since."""
        now = getattr(unwrap(self.model), "_tokensel_patched", None)
        if now is None or now is not self.__dict__.get("_patched"):
            self._patched = apply_to(self.model, self.args.layer if "mass" in self.method.needs else None)

    def train(self, *args, **kwargs):
        self._patch()
        return super().train(*args, **kwargs)

    def record_history(self, path: str | os.PathLike[str], batch_size: int | None = None) -> dict[str, float]:
        """Records the losses of the training rows under the model as it is now, for `history="recorded"`.

        They are scored as they are trained: tokenised, masked, cut and packed by this trainer, so that one with the
        same data settings finds every document. Adapters are on.

        Args:
            path: the Parquet file to make; must not exist yet. What a killed run has done is gone on with.
            batch_size: documents in a forward pass; None = the batch size of evaluation.
        Returns:
            What `tokensel.record_losses` does.
        Raises:
            TypeError: a streamed training set.
            ValueError: what `tokensel.record_losses` refuses.
        """
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with self.accelerator.autocast():
            return record_losses(
                self.model,
                CollatedRows(self.train_dataset, collate),
                path,
                tokenizer=self.processing_class,
                batch_size=batch_size or self.args.per_device_eval_batch_size,
                impl=self.args.impl,
                dataset=f"the training rows of {type(self).__name__}",
                max_length=getattr(self.args, "max_length", None),
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
        return batches, self.accelerator.gather(total).sum() if self._ranks_share_denominator() else total

    def _ranks_share_denominator(self) -> bool:
        """Whether the loss is a mean over the tokens of all ranks; else over each rank's, then over ranks."""
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1

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
        given = [b.get("token_weights", torch.ones_like(o.score)) for b, o in zip(batches, scored, strict=True)]
        rank = self.accelerator.process_index
        chosen = choose_across(self.method, scored, given, self.accelerator.gather, rank)
        return [batch | {"chosen_weights": weights} for batch, weights in zip(batches, chosen, strict=True)]

    def selection(self, denominator: Tensor | None) -> Selection:
        """What the next micro-batch is selected by."""
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)  # of this step; set when it begins
        # a mean over each micro-batch, where the rest of the loss is a sum with one denominator
        parts = micro_batches * (self.accelerator.num_processes if self._ranks_share_denominator() else 1)
        router_share = 1.0 if denominator is None else 1 / parts
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
            save_selection(output_dir, self._selection, self.args.history)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            steps = self.state.global_step
            load_selection(checkpoint, self._selection, self.args.history, steps, steps * self.samples_per_step())

    def _prepare_inputs(self, inputs):
        """The base trainer's, of training and evaluation; labels on padding are none."""
        inputs = super()._prepare_inputs(inputs)
        self._selection_log.drop_labels_on_padding(inputs)
        return inputs

    def training_step(self, *args, **kwargs):
        self._selection_log.start()
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return self._evaluated_loss(model, inputs, return_outputs, num_items_in_batch)
        output = model(**inputs, selection=self.selection(num_items_in_batch))
        if not isinstance(output, SelectionOutput):
            raise TypeError(
                f"the model returned {type(output).__name__} instead of a SelectionOutput: its forward was replaced "
                "after the trainer was made (by Liger's loss patch, say). Leave that patch out, or apply it before"
            )
        self.record_selection(inputs, output)
        loss = output.loss
        if num_items_in_batch is not None and self._ranks_share_denominator():
            loss = loss * self.accelerator.num_processes  # ranks' gradients are averaged, the denominator is global
        return (loss, output) if return_outputs else loss

    def record_selection(self, inputs: dict, output: SelectionOutput) -> None:
        """Adds a micro-batch to the metrics of the next log entry; override to look at selections as they happen."""
        self._selection_log.add(selection_sums(inputs, output))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Merges the selection's metrics since the last entry: kept_share, rel_mean, rel_std (nats), tokens/s, ..."""
        if "loss" in logs or "train_loss" in logs:
            logs |= self._selection_log.entry()
        super().log(logs, *args, **kwargs)

    def selection_totals(self) -> dict[str, float]:
        """The logged metrics over the whole run: kept_share, responses, tokens_per_second, rel_mean, ..."""
        totals = self._selection_log.totals
        return selection_metrics(totals) | {"responses": totals.get("responses", 0)}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The base trainer's, with the mean loss over all response tokens as the loss, as if they had no weights."""
        self._patch()
        self._selection_log.begin_evaluation()
        result = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._of_trl:
            self._metrics["eval"].clear()  # means over batches, and tokens that TRL has not seen
        metrics = self._selection_log.held_out()
        assert result.metrics is not None  # the base trainer's are a dict
        result.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return result

    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None):
        """Without logits where only the loss is asked for."""
        inputs = {name: value for name, value in inputs.items() if name != "token_weights"}
        if not prediction_loss_only or inputs.get("labels") is None:  # which has no loss either
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        return self._held_out_loss(model, self._prepare_inputs(inputs)), None, None

    @torch.no_grad()
    def _held_out_loss(self, model: nn.Module, inputs: dict) -> Tensor:
        """Of a batch of an evaluation, which is added to its metrics."""
        everything = Selection(methods.get("full"), impl=self.args.impl, token_metrics=self._of_trl)
        with self.compute_loss_context_manager():
            output = model(**inputs, selection=everything)
        self._selection_log.add_held_out(output, self._own_rows(inputs), self._patched.router_weight)
        return output.loss.detach()

    def _evaluated_loss(self, model: nn.Module, inputs: dict, return_outputs: bool, num_items_in_batch):
        """The base trainer's; what an evaluation with logits says of tokens is added to its metrics."""
        batch = dict(inputs)
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if return_outputs and batch.get("labels") is not None:
            if result[1].get("logits") is None:  # TRL 1.9 makes none for its chunked loss
                self._held_out_loss(model, batch)
            else:
                weight = self._patched.router_weight
                self._selection_log.add_held_out_logits(result[1], batch, self._own_rows(batch), weight)
        return result

    def _own_rows(self, batch: dict) -> Tensor:
        sample = BatchLayout.from_batch(batch).sample
        return without_repeated_rows(sample, self.args.per_device_eval_batch_size, self.accelerator)


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
