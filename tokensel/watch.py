"""Rows that are watched while training: what the selection does to their tokens, recorded at each epoch's end.

A run's folder then holds `selection.jsonl`, a line an epoch, beside the trainer's state; `tokensel report` draws both.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from tokensel.history import RecordedLosses

SELECTION_FILE = "selection.jsonl"
_READ = ("input_ids", "attention_mask", "labels", "token_weights", "noise")  # columns of a row
_COLUMNS = ("nll", "history_nll", "mass")


@torch.no_grad()
def selected_samples(trainer: Trainer, rows: dict[int, dict]) -> list[dict]:
    """What the method of a TokenSelectionMixin trainer makes of rows now, each on its own, dropout off.

    Args:
        rows: by their number, which the title says, as the training set has them; `noise` (0 or 1 a token), if
            there, is passed on.
    Returns:
        For each row the lists of `tokensel.report.TOKEN_FIELDS`, an entry a token, and a title.
    """
    collate = RecordedLosses(trainer.data_collator, trainer.recorded)
    training = [m for m in trainer.model.modules() if m.training]
    trainer.model.eval()
    # a selector with a state must not take this for a part of the training
    selection = replace(trainer.selection(None), method=copy.deepcopy(trainer.selector))
    samples = []
    for number, row in rows.items():
        batch = collate([row])
        noise = batch.pop("noise")[0].bool() if "noise" in batch else torch.zeros_like(batch["labels"][0]).bool()
        batch = {k: v.to(trainer.args.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        out = trainer.model(**batch, selection=selection)
        samples.append(_sample(f"row {number}", batch["input_ids"][0], out, noise, trainer.processing_class))
    for module in training:
        module.training = True
    return samples


def _sample(name: str, ids: torch.Tensor, out, noise: torch.Tensor, tokenizer) -> dict:
    response, score, weights = (t[0].cpu() for t in (out.response, out.score, out.weights))
    found = {n: getattr(out, n) for n in _COLUMNS}
    found = {n: None if value is None else value[0].cpu() for n, value in found.items()}
    found["rel"] = None if found["history_nll"] is None else found["history_nll"] - found["nll"]
    order = score.masked_fill(~response, -torch.inf).argsort(descending=True, stable=True)[: int(response.sum())]
    rank = torch.zeros_like(score)
    rank[order] = torch.arange(1, len(order) + 1, dtype=rank.dtype)

    def column(values: torch.Tensor | None) -> list:
        if values is None:
            return [None] * len(response)
        return [float(v) if r else None for v, r in zip(values, response.tolist(), strict=True)]

    planted = int((noise & response).sum())
    return {
        "title": f"{name}: {int(response.sum())} response tokens" + f", {planted} planted" * bool(planted),
        "tokens": [tokenizer.decode([i]) for i in ids.tolist()],
        "response": response.tolist(),
        "kept": (weights > 0).tolist(),
        "score": column(score),
        "rank": column(rank),
        **{n: column(values) for n, values in found.items()},
        "noise": (noise & response).tolist(),
    }


class SampleRecorder(TrainerCallback):
    """Appends what the selection does to the first rows of the training set to a run's `selection.jsonl`."""

    def __init__(self, trainer: Trainer, rows: int) -> None:
        """Args: rows: how many; a streamed training set is read from its start for them."""
        self.trainer = trainer
        first = list(itertools.islice(trainer.train_dataset, rows))
        self.rows = {i: {name: row[name] for name in _READ if name in row} for i, row in enumerate(first)}
        self.file = Path(trainer.args.output_dir) / SELECTION_FILE

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """A resumed run goes on in the same file, behind what was recorded before its checkpoint."""
        if state.is_world_process_zero:
            lines = (
                self.file.read_text(encoding="utf-8").splitlines() if state.global_step and self.file.exists() else []
            )
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= state.global_step]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("".join(kept), encoding="utf-8")
        if not state.global_step:
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        samples = selected_samples(self.trainer, self.rows)
        if state.is_world_process_zero:
            line = {"epoch": state.epoch or 0, "step": state.global_step, "samples": samples}
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def load_run(folder: Path) -> dict:
    """A run as `tokensel.report.write_selection_page` takes it: its last samples, and curves over the training.

    Raises:
        FileNotFoundError: the folder holds no watched samples, or no trainer's state.
    """
    file, state = folder / SELECTION_FILE, folder / "trainer_state.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {SELECTION_FILE}; train with --record_samples 8 to have one")
    if not state.is_file():
        raise FileNotFoundError(f"{folder} holds no trainer_state.json; the run has not ended yet")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    log = [entry for entry in json.loads(state.read_text(encoding="utf-8"))["log_history"] if "kept_share" in entry]
    curves = {name: [[e["step"], e[name]] for e in log if name in e] for name in ("rel_mean", "rel_std", "kept_share")}
    curves["kept_by_position"] = kept_by_position(records)
    curves["signal_agreement"] = [[r["step"], a] for r in records if (a := agreement(r)) is not None]
    pairs = zip(records, records[1:], strict=False)
    curves["churn"] = [[after["epoch"], churn(before, after)] for before, after in pairs]
    return {"name": folder.name, "samples": records[-1]["samples"], "curves": curves}


def kept_by_position(records: list[dict], parts: int = 10) -> list[list[float]]:
    """[[part, share kept]] over all watched samples, each response cut into `parts` of equal length."""
    kept, count = [0] * parts, [0] * parts
    for record in records:
        for sample in record["samples"]:
            fates = [k for k, r in zip(sample["kept"], sample["response"], strict=True) if r]
            for place, fate in enumerate(fates):
                part = place * parts // len(fates)
                kept[part] += fate
                count[part] += 1
    return [[i + 1, k / n] for i, (k, n) in enumerate(zip(kept, count, strict=True)) if n]


def agreement(record: dict) -> float | None:
    """Correlation of REL and prompt mass over the watched response tokens; None where one is missing or constant."""
    pairs = [
        pair
        for sample in record["samples"]
        for pair in zip(sample["rel"], sample["mass"], strict=True)
        if None not in pair
    ]
    if len({rel for rel, _ in pairs}) < 2 or len({mass for _, mass in pairs}) < 2:
        return None
    return statistics.correlation(*zip(*pairs, strict=True))


def churn(before: dict, after: dict) -> float:
    """Share of the watched response tokens whose fate differs between two records."""
    changed = total = 0
    for old, new in zip(before["samples"], after["samples"], strict=True):
        for response, was, now in zip(new["response"], old["kept"], new["kept"], strict=True):
            total += response
            changed += response and was != now
    return changed / total
