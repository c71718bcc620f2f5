"""Rows that are watched while training: what the selection does to their tokens, recorded at each epoch's end.

A run's folder then holds `selection.jsonl`, a line an epoch, beside the trainer's state; `tokensel report` draws both.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import reprlib
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tokensel.files import replacing
from tokensel.model import eval_mode
from tokensel.report import TOKEN_FIELDS

SELECTION_FILE = "selection.jsonl"
# columns of a row; the last are the documents of one that TRL packed
_COLUMNS = ("input_ids", "attention_mask", "labels", "token_weights", "noise", "seq_lengths")
_MEASURED = ("nll", "history_nll", "mass")
_CURVES = ("rel_mean", "rel_std", "kept_share")  # of the log
_FLAGS = ("response", "kept", "noise")
_SCOPES = ("sample", "micro_batch", "batch")
_LARGEST = 1e100  # whose square can still be computed with
_BROKEN = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet


@torch.no_grad()
def selected_samples(trainer: Any, rows: dict[int, dict]) -> list[dict]:
    """What the method of a TokenSelectionMixin trainer makes of rows now, dropout off.

    Each row is selected on its own, unless the method ranks the tokens of several rows together (scope "micro_batch"
    or "batch"): then all rows are one batch, as they would be in an optimizer step of theirs.

    Args:
        trainer: a TokenSelectionMixin over a trainer of transformers.
        rows: by their number, which the title says, as the training set has them; `noise` (0 or 1 a token), if
            there, is passed on.
    Returns:
        For each row the lists of `tokensel.report.TOKEN_FIELDS`, an entry a token, and a title. Ranks are within the
        row. Weights are what the loss multiplies a token by, before its denominator; prompt tokens have None.
    """
    collate = trainer.recorded_collator()
    # a rule with a state must not take this for a part of the training
    selection = replace(trainer.selection(None), method=copy.deepcopy(trainer.method))
    batches = [{number: row} for number, row in rows.items()] if trainer.method.scope == "sample" else [rows]
    samples = []
    with eval_mode(trainer.model):
        for watched in batches:
            batch = collate(list(watched.values()))
            batch.pop("noise", None)  # no input of the model
            places = _places(batch, list(watched.values()))
            on_device = {k: v.to(trainer.args.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            out = trainer.model(**on_device, selection=selection)
            for (number, row), place in zip(watched.items(), places, strict=True):
                ids = batch["input_ids"][place].tolist()
                noise = torch.tensor(row.get("noise", [0] * len(ids)), dtype=torch.bool)
                samples.append(_sample(f"row {number}", ids, out, place, noise, trainer.processing_class))
    return samples


def _places(batch: dict, rows: list[dict]) -> list[tuple[int, torch.Tensor]]:
    """(line, columns) of each row's tokens in a batch that pads on either side, or strings the rows together."""
    ids, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
    lengths = [len(row["input_ids"]) for row in rows]
    if len(ids) != len(rows):
        ends = itertools.accumulate(lengths)
        return [(0, torch.arange(end - n, end)) for end, n in zip(ends, lengths, strict=True)]
    if mask is not None:
        return [(line, padding.cpu().nonzero()[:, 0]) for line, padding in enumerate(mask)]
    places = []
    for line, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        first = 0 if ids[line, :n].tolist() == list(row["input_ids"]) else ids.shape[1] - n
        places.append((line, torch.arange(first, first + n)))
    return places


def _sample(name: str, ids: list[int], out, place: tuple, noise: torch.Tensor, tokenizer) -> dict:
    response, score, weights = (t.cpu()[place] for t in (out.response, out.score, out.weights))
    measured = {n: getattr(out, n) for n in _MEASURED}
    measured = {n: None if values is None else values.cpu()[place] for n, values in measured.items()}
    measured["rel"] = None if measured["history_nll"] is None else measured["history_nll"] - measured["nll"]
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
        "tokens": token_texts(tokenizer, ids),
        "response": response.tolist(),
        "kept": (weights != 0).tolist(),
        "weight": column(weights),
        "score": column(score),
        "rank": column(rank),
        **{n: column(values) for n, values in measured.items()},
        "noise": (noise & response).tolist(),
    }


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it; put together, the text of the whole row.

    A character that is spread over several tokens is the last one's, and the others have less text, or none. A token
    whose bytes make no character with what follows has U+FFFD.
    """

    def decode(first: int, end: int) -> str:
        return tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)

    texts = [""] * len(ids)
    # Decoded is only from `first` on, a little before the tokens from `held` on that may still be part of a character:
    # decoders treat the first token of all differently. `shown` characters of that are given to a token already.
    first = held = shown = 0
    for i in range(len(ids)):
        text = decode(first, i + 1)
        whole = text.rstrip(_BROKEN)
        if whole == text or i + 1 == len(ids):
            new = text[shown:]
            # in front of a character stands what the tokens held back did not become
            broken = len(new) - len(new.lstrip(_BROKEN)) if i > held and whole == text else 0
            texts[i - 1] += new[:broken]
            texts[i] = new[broken:]
            first, held = held, i + 1
            shown = len(decode(first, held))
        elif len(whole) > shown:  # the end of a character, and the start of another
            texts[i] = whole[shown:]
            first, held = held, i
            shown = len(decode(first, i + 1).rstrip(_BROKEN))
        elif i - held >= 3:  # no character has more than four bytes, so the first of these is part of none
            texts[held] += decode(first, held + 1)[shown:]
            first, held = held, held + 1
            shown = len(decode(first, held))
    return texts


class SampleRecorder(TrainerCallback):
    """Appends what the selection does to the first rows of the training set to a run's `selection.jsonl`."""

    def __init__(self, trainer: Any, rows: int) -> None:
        """Args: rows: how many; a streamed training set is read from its start for them."""
        self.trainer = trainer
        first = list(itertools.islice(trainer.train_dataset, rows))
        self.rows = {i: {name: row[name] for name in _COLUMNS if name in row} for i, row in enumerate(first)}
        self.file = Path(trainer.args.output_dir) / SELECTION_FILE

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """A resumed run goes on in the same file, behind what was recorded before its checkpoint.

        Raises:
            ValueError: a line of that file is damaged; the last one, where it has no end, was cut short by what
                ended the run, and is left out.
        """
        if state.is_world_process_zero:
            written = self.file.read_bytes() if state.global_step and self.file.exists() else b""
            records = _records(self.file, written[: written.rfind(b"\n") + 1])
            kept = [line + b"\n" for line, record in records if record["step"] <= state.global_step]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as whole:  # of a run from elsewhere it may be a link to a file of ours
                whole.write_bytes(b"".join(kept))
        if not state.global_step:
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        samples = selected_samples(self.trainer, self.rows)
        if state.is_world_process_zero:
            line = {"epoch": state.epoch or 0, "step": state.global_step, "scope": self.trainer.method.scope}
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"samples": samples}) + "\n")


def _records(file: Path, content: bytes) -> Iterator[tuple[bytes, dict]]:
    """(line, record) of what a file of records holds.

    Raises:
        ValueError: a line that is no record; names the file and the line.
    """
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8, or too many brackets
            raise _damaged(file, number, f"is damaged or cut short ({error})") from error
        if not isinstance(record, dict) or not _is_step(record.get("step")):
            raise _damaged(file, number, 'is no record: a mapping with a "step"')
        yield line, record


def _damaged(file: Path, line: int, what: str) -> ValueError:
    return ValueError(f"{file}: line {line} {what}; remove that line, or train again")


def load_run(folder: Path) -> dict:
    """A run as `tokensel.report.write_selection_page` takes it: its last samples, and curves over the training.

    "kept_by_position" is of the samples shown. "signal_agreement" and "churn" leave out what was recorded before
    training: with a recorded history REL is only rounding then, and so is a choice by it.

    Raises:
        FileNotFoundError: the folder holds no watched samples, or no trainer's state.
        ValueError: one of the two files is damaged.
    """
    file, state = folder / SELECTION_FILE, folder / "trainer_state.json"
    if not file.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such directory; give the output_dir of a training")
        raise FileNotFoundError(f"{folder} holds no {SELECTION_FILE}; train with --record_samples 8 to have one")
    if not state.is_file():
        raise FileNotFoundError(f"{folder} holds no trainer_state.json; the run has not ended yet")
    records = [record for _, record in _records(file, file.read_bytes())]
    _check_records(file, records)
    log = _selection_log(state)
    trained = [r for r in records if r["step"]]
    curves = {name: [[e["step"], e[name]] for e in log if name in e] for name in _CURVES}
    curves["kept_by_position"] = kept_by_position(records[-1])
    curves["signal_agreement"] = [[r["step"], a] for r in trained if (a := agreement(r)) is not None]
    changes = [[after["epoch"], churn(before, after)] for before, after in itertools.pairwise(trained)]
    curves["churn"] = [[epoch, share] for epoch, share in changes if share is not None]
    last = records[-1]
    return {"name": folder.resolve().name, "scope": last["scope"], "samples": last["samples"], "curves": curves}


def _check_records(file: Path, records: list[dict]) -> None:
    """Refuses records that no page can be made of: without samples, with other fields, or of other rows."""
    if not records:
        raise ValueError(f"{file} is empty; train again with --record_samples 8")
    for number, record in enumerate(records, 1):
        samples = record.get("samples")
        epoch: Any = record.get("epoch")
        if not _is_number(epoch) or not math.isfinite(epoch) or record.get("scope") not in _SCOPES:
            raise _damaged(file, number, 'lacks "epoch" or "scope", as another version of tokensel wrote it')
        if not isinstance(samples, list) or not samples:
            raise _damaged(file, number, "has no samples")
        for sample in samples:
            if not isinstance(sample, dict) or not isinstance(sample.get("title"), str):
                raise _damaged(file, number, "has a sample without title")
            for field in TOKEN_FIELDS:
                if not _is_column(field, sample.get(field)):
                    raise _damaged(file, number, f"has a sample without {field!r}, or one that is no list of its kind")
            if len({len(sample[field]) for field in TOKEN_FIELDS}) > 1:
                raise _damaged(file, number, "has a sample whose lists differ in length")
        if [(s["title"], s["response"]) for s in samples] != [
            (s["title"], s["response"]) for s in records[0]["samples"]
        ]:
            raise _damaged(file, number, "has other rows than line 1")


def _is_column(field: str, values: object) -> bool:
    if not isinstance(values, list):
        return False
    if field == "tokens" or field in _FLAGS:
        return all(isinstance(v, bool if field in _FLAGS else str) for v in values)
    return all(v is None or _is_number(v) for v in values)


def _is_number(value: Any) -> bool:
    """Whether one can compute with it; NaN and infinities, which a loss may be, among them."""
    return type(value) in (int, float) and (not abs(value) > _LARGEST or abs(value) == math.inf)


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53  # as far as a browser counts


def _selection_log(file: Path) -> list[dict]:
    """The entries of a trainer's state that tell of the selection."""
    try:
        state = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "line 1"
        raise ValueError(f"{file}: {where} is damaged or cut short ({error}); train again") from error
    log = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(log, list) or not all(isinstance(e, dict) and _is_step(e.get("step")) for e in log):
        raise ValueError(f"{file} is no trainer's state: it lacks a log_history of steps; train again")
    log = [entry for entry in log if "kept_share" in entry]
    for name, value in ((name, entry[name]) for entry in log for name in _CURVES if name in entry):
        if not _is_number(value):
            raise ValueError(f"{file}: {name} in log_history must be a number; got {reprlib.repr(value)}; train again")
    return log


def kept_by_position(record: dict, parts: int = 10) -> list[list[float]]:
    """[[part, share kept]] over all samples of a record, each response cut into `parts` of equal length."""
    kept, count = [0] * parts, [0] * parts
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
        (rel, mass)
        for sample in record["samples"]
        for rel, mass in zip(sample["rel"], sample["mass"], strict=True)
        if None not in (rel, mass) and math.isfinite(rel) and math.isfinite(mass)
    ]
    if len({rel for rel, _ in pairs}) < 2 or len({mass for _, mass in pairs}) < 2:
        return None
    try:
        return statistics.correlation(*zip(*pairs, strict=True))
    except statistics.StatisticsError:  # so close together that their variance is 0
        return None


def churn(before: dict, after: dict) -> float | None:
    """Share of the watched response tokens whose fate differs between two records; None where there are none."""
    changed = total = 0
    for first, second in zip(before["samples"], after["samples"], strict=True):
        for response, kept, kept_later in zip(second["response"], first["kept"], second["kept"], strict=True):
            total += response
            changed += response and kept != kept_later
    return changed / total if total else None
