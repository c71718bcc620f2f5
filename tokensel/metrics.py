"""What a training with token selection logs: sums over the tokens of a micro-batch, shares and means of them."""

from __future__ import annotations

import math
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokensel.documents import IGNORE_INDEX, BatchLayout, to_labels, to_rows
from tokensel.ops.stats import token_stats_from_logits
from tokensel.parallel import is_first_rank
from tokensel.select.rules import constant_samples, responses_per_sample
from tokensel.step import SelectionOutput


@torch.no_grad()
def selection_sums(inputs: dict, output: SelectionOutput) -> dict[str, Tensor]:
    """Sums of one micro-batch, scalars on its device: they add up over micro-batches and ranks."""
    response, kept = output.response, output.response & (output.weights > 0)
    dropped = response & ~kept
    mask = inputs.get("attention_mask")
    sums = {
        "tokens": mask.sum() if mask is not None else torch.tensor(response.numel(), device=response.device),
        "responses": response.sum(),
        "kept": kept.sum(),
        "kept_nll": (output.nll * kept).sum(),
        "dropped_nll": (output.nll * dropped).sum(),
        "samples": responses_per_sample(response, output.sample).sign().sum(),
        "constant": constant_samples(output.score, response, output.sample),
    }
    if output.history_nll is not None:
        rel = ((output.history_nll - output.nll) * response).double()
        sums |= {"rel": rel.sum(), "rel_squared": (rel**2).sum()}
    if output.mass is not None:
        sums["mass"] = (output.mass * response).sum()
    if output.aux_loss is not None:
        sums |= {"aux_loss": output.aux_loss, "micro_batches": torch.ones_like(output.aux_loss)}
    return sums | token_metric_sums(output)


def token_metric_sums(output: SelectionOutput) -> dict[str, Tensor]:
    if output.entropy is None:
        return {}
    response, correct = output.response, output.correct
    assert correct is not None  # it comes with the entropy
    return {
        "responses": response.sum(),
        "entropy": (output.entropy * response).double().sum(),
        "correct": (correct & response).sum(),
    }


def token_metrics(s: dict[str, float]) -> dict[str, float]:
    """The metrics of TRL's SFTTrainer, of all response tokens, whether they were kept or not."""
    n = max(s["responses"], 1)
    return {"entropy": s["entropy"] / n, "mean_token_accuracy": s["correct"] / n}


def selection_metrics(s: dict[str, float]) -> dict[str, float]:
    """Shares and means from sums over tokens; NLL and REL in nats."""
    n = s.get("responses", 0)
    aux = {"aux_loss": s["aux_loss"] / s["micro_batches"]} if "aux_loss" in s else {}
    if not n:
        return {"kept_share": 0.0, "tokens_per_second": 0.0} | aux
    metrics = aux | {
        "kept_share": s["kept"] / n,
        "kept_nll": s["kept_nll"] / max(s["kept"], 1),
        "tokens_per_second": s["tokens"] / s["seconds"],
    }
    if n > s["kept"]:
        metrics["dropped_nll"] = s["dropped_nll"] / (n - s["kept"])
    if "rel" in s:
        metrics["rel_mean"] = s["rel"] / n
        metrics["rel_std"] = math.sqrt(max(s["rel_squared"] / n - metrics["rel_mean"] ** 2, 0))
    if "mass" in s:
        metrics["prompt_mass"] = s["mass"] / n
    metrics["constant_score_share"] = s["constant"] / s["samples"]
    return metrics


class SelectionLog:
    """What the log entries of a run say of its selections: sums over tokens, here and on all ranks.

    Args:
        over_ranks: adds a tensor up over ranks; all of them call it for each entry.
        of_trl: say what TRL's trainer says, too: entropy, mean_token_accuracy, num_tokens.

    Attributes:
        totals: the sums over the whole run, of what has been logged.
    """

    def __init__(self, over_ranks: Callable[[Tensor], Tensor], of_trl: bool) -> None:
        self._over_ranks, self._of_trl = over_ranks, of_trl
        self._since: dict[str, Tensor] = {}  # the last entry
        self._held_out: dict[str, Tensor] = {}
        self.totals: dict[str, float] = {}
        self._last: float | None = None  # None before the first step, so that set-up is not counted
        self._on_padding: Tensor | int = 0  # labels
        self._told = False  # of them

    def start(self) -> None:
        """Starts the clock, before the first step."""
        self._last = time.perf_counter() if self._last is None else self._last

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds a micro-batch (`selection_sums`) to the next entry."""
        _add(self._since, sums)

    def entry(self) -> dict[str, float]:
        """The metrics since the last entry, empty where nothing was trained."""
        if not self._since:
            return {}
        sums, self._since = self._totals_of(self._since), {}
        now = time.perf_counter()
        assert self._last is not None  # it was set before the first step
        sums["seconds"], self._last = now - self._last, now
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0) + value
        metrics = selection_metrics(sums)
        if self._of_trl:
            metrics |= token_metrics(sums) | {"num_tokens": self.totals["tokens"]}
        return {name: round(value, 6) for name, value in metrics.items()}

    def drop_labels_on_padding(self, batch: dict[str, Tensor]) -> None:
        """Labels where `attention_mask` is 0 become -100, as in a batch of `labels = input_ids`; they are counted."""
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if labels is not None and mask is not None and mask.shape == labels.shape:
            padding = mask == 0
            self._on_padding = self._on_padding + (padding & (labels != IGNORE_INDEX)).sum()
            batch["labels"] = labels.masked_fill(padding, IGNORE_INDEX)

    def begin_evaluation(self) -> None:
        """Forgets what an evaluation that did not end has left."""
        self._held_out = {}

    @torch.no_grad()
    def add_held_out(self, output: SelectionOutput, rows: Tensor, router_weight: float) -> None:
        """Adds a batch of an evaluation to its metrics.

        Args:
            rows: [B, 1] or [B, S] bool, which tokens count.
            router_weight: of the output's `aux_loss` in the loss.
        """
        response = output.response & rows
        sums = {"responses": response.sum(), "nll": (output.nll * response).double().sum()}
        if output.entropy is not None and output.correct is not None:
            sums["entropy"] = (output.entropy * response).double().sum()
            sums["correct"] = (output.correct & response).sum()
        if output.aux_loss is not None:
            sums |= {"aux_loss": output.aux_loss, "micro_batches": torch.ones_like(output.aux_loss)}
            sums["router_loss"] = router_weight * output.aux_loss
        _add(self._held_out, sums)

    @torch.no_grad()
    def add_held_out_logits(self, own: Any, batch: dict[str, Tensor], rows: Tensor, router_weight: float) -> None:
        """`add_held_out` of the model's own output for a batch, with its `logits` [B, S, V]."""
        layout = BatchLayout.from_batch(batch)
        labels = to_rows(layout.response_labels, IGNORE_INDEX)
        stats, _ = token_stats_from_logits(own["logits"], labels, entropy=self._of_trl)
        shown = {"entropy": stats.entropy, "correct": stats.correct} if self._of_trl else {}
        output = SelectionOutput(
            response=layout.response,
            nll=to_labels(stats.nll),
            aux_loss=own.get("aux_loss"),
            **{name: to_labels(value) for name, value in shown.items() if value is not None},
        )
        self.add_held_out(output, rows, router_weight)

    def held_out(self) -> dict[str, float]:
        """Loss (nats, mean over all response tokens, NaN without any) and metrics of an evaluation that has ended.

        What a mixture of experts adds for its router is the mean over batches.
        """
        if not self._held_out:
            return {}
        trained = self._since.get("tokens", torch.tensor(0))
        sums, self._held_out = self._totals_of(self._held_out | {"trained": trained}), {}
        metrics = {"loss": sums["nll"] / sums["responses"] if sums["responses"] else math.nan}
        if "aux_loss" in sums:
            metrics["loss"] += sums["router_loss"] / sums["micro_batches"]
            metrics["aux_loss"] = sums["aux_loss"] / sums["micro_batches"]
        if self._of_trl:
            metrics |= token_metrics(sums) | {"num_tokens": self.totals.get("tokens", 0) + sums["trained"]}
        return metrics

    def _totals_of(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Over ranks; the one wait for the device per log entry."""
        names = sorted(sums)
        device = sums[names[0]].device
        parts = [*(sums[name] for name in names), torch.as_tensor(self._on_padding)]
        *values, on_padding = self._over_ranks(torch.stack([part.to(device).double() for part in parts])).tolist()
        if on_padding and not self._told and is_first_rank():
            warnings.warn(
                f"{on_padding:,.0f} labels so far stand on padding (attention_mask 0), as where labels are a copy of "
                f"input_ids; they are neither trained nor evaluated. Set them to {IGNORE_INDEX}",
                stacklevel=2,
            )
        self._told |= bool(on_padding)
        return dict(zip(names, values, strict=True))


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def peak_memory_mib(device: str | torch.device) -> float:
    """Peak of this process so far: allocated on a GPU, resident elsewhere. MiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
