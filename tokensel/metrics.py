"""What a training with token selection logs: sums over the tokens of a micro-batch, shares and means of them."""

from __future__ import annotations

import math
import resource

import torch
from torch import Tensor

from tokensel.select.rules import constant_samples, responses_per_sample
from tokensel.step import SelectionOutput


@torch.no_grad()
def selection_sums(inputs: dict, output: SelectionOutput) -> dict[str, Tensor]:
    """Sums of one micro-batch, scalars on its device: they add up over micro-batches and ranks."""
    response, kept = output.response, output.weights > 0
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
    if not n:
        return {"kept_share": 0.0, "tokens_per_second": 0.0}
    metrics = {
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


def peak_memory_mib(device: str | torch.device) -> float:
    """Peak of this process so far: allocated on a GPU, resident elsewhere. MiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
