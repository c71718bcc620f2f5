"""What each signal sees of the noise: how well it tells noise from clean tokens while `full` trains on both.

A rule that drops noise can be no better than the signal that it reads, whatever its threshold. So no method is tried
here: a pretrained model learns from all tokens of a kind of rows, and some of these rows are looked at on the way.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq

from benchmarks.machine import machine
from benchmarks.quality.real import RealStudy, make_sources, place_of, pretrained_folder, world_arguments
from benchmarks.quality.real_rows import KINDS
from benchmarks.quality.real_tables import machines
from benchmarks.quality.real_worlds import RealWorld, Recipe, batched, build_world, training_steps, with_reference
from benchmarks.quality.runner import device_used, run_all
from benchmarks.resume import measured
from tokensel import Selection, SelectionMethod, TokenSignals
from tokensel.data import SelectionCollator
from tokensel.model import PatchedModel, eval_mode
from tokensel.select.rules import AsScored
from tokensel.select.scores import clean_posterior, constant, mean_per_sample, normalised_log_probability

STEPS = (1, 10, 50, 200)  # of the optimizer, after which the rows are looked at
SHOWN = (10, 200)  # of these in the table
SEED = 0
LOOKED_AT = 64  # rows
CAUGHT = (50, 80)  # percent of the noise
BEHIND = 2  # so many tokens after noise its context is spoilt most
BINS = 40  # of a histogram
RIDGE = 1e-4  # keeps the weights finite where a pair tells everything
NOISY = tuple(kind for kind in KINDS if kind != "clean")

SIGNALS = {
    "nll": "NLL",
    "base_nll": "NLL of the base",
    "rel": "REL",
    "entropy": "entropy",
    "surprise": "surprise in deviations",
    "mass": "attention mass",
    "reference_excess": "NLL over the reference's",
    "near_nll": "NLL of the five around",
    "row_nll": "NLL of the row",
    "noise_posterior": "1 - `clean_posterior`",
}
PAIRED = ("nll", "base_nll", "entropy", "surprise", "mass", "rel", "row_nll")
DRAWN = ("nll", "base_nll", "rel", "entropy", "mass")  # what histograms are kept of


# The signals of tokens


@torch.no_grad()
def token_signals(patched: PatchedModel, rows: list[dict], tokenizer) -> dict[str, Tensor]:
    """What is known of the N response tokens of rows with "noise", "base_nll" and "reference_nll".

    Returns:
        (N,) each: every one of SIGNALS, float64, nats or as `TokenSignals` has it; "noise" and "behind", bool, whether
        a token is noise, and whether it is clean and one of the BEHIND after noise; "row", int64.
    """
    seen: list[TokenSignals] = []

    def look(signals: TokenSignals) -> Tensor:
        seen.append(signals)
        return constant(signals)

    columns = ("noise", "base_nll", "reference_nll")
    method = SelectionMethod("look", {"nll", "entropy", "logp_var", "mass", *columns[1:]}, look, AsScored())
    collate = SelectionCollator(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"), columns)
    parts, first = [], 0
    with eval_mode(patched.model):
        for taken in batched(rows, 16):
            inputs = collate([{name: row[name] for name in ("input_ids", "labels", *columns)} for row in taken])
            inputs = inputs.to(patched.model.device)
            noise = inputs.pop("noise").bool()  # (B, S)
            patched.model(**inputs, selection=Selection(method, score_only=True))
            known = seen.pop()
            row = torch.arange(first, first + len(taken)).to(noise.device)[:, None].expand_as(noise)
            of_batch = signals_of(known) | {"noise": noise, "behind": right_behind(noise), "row": row}
            parts.append({name: values[known.response].cpu() for name, values in of_batch.items()})
            first += len(taken)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def signals_of(known: TokenSignals) -> dict[str, Tensor]:
    """Every one of SIGNALS, [B, S] float64."""
    nll = known["nll"]
    found = {
        "nll": nll,
        "base_nll": known["base_nll"],
        "rel": known["base_nll"] - nll,
        "entropy": known["entropy"],
        "surprise": -normalised_log_probability(known),
        "mass": known["mass"],
        "reference_excess": nll - known["reference_nll"],
        "near_nll": mean_of_near(nll, known.response),
        "row_nll": mean_per_sample(nll, known),
        "noise_posterior": 1 - clean_posterior(replace(known, nll=nll.double())),
    }
    return {name: values.double() for name, values in found.items()}


def mean_of_near(values: Tensor, response: Tensor) -> Tensor:
    """The mean over a token and the two at either side of it, those that are response; [B, S]."""
    total, count = (
        nn.functional.avg_pool1d(each, 5, stride=1, padding=2)  # a fifth of the sum, with 0 beyond the ends
        for each in (torch.where(response, values, 0), response.to(values.dtype))
    )
    return torch.where(response, total / torch.where(response, count, 1), 0)


def right_behind(noise: Tensor) -> Tensor:
    """Whether a token is no noise, and one of the BEHIND before it is; [B, S] bool."""
    behind = torch.zeros_like(noise)
    for distance in range(1, BEHIND + 1):
        behind[:, distance:] |= noise[:, :-distance]
    return behind & ~noise


# How well they tell noise from clean tokens


def ranks(values: Tensor) -> Tensor:
    """1 for the smallest; equal ones share the mean of their places. (N,) -> (N,) float64."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count.double() - 1) / 2)[place]


def roc_area(values: Tensor, noise: Tensor) -> float:
    """The chance that noise has a larger value than a clean token, where equal ones count half (Mann-Whitney).

    Args:
        values: (N,). noise: (N,) bool.
    Raises:
        ValueError: there is nothing to tell apart.
    """
    hits, others = int(noise.sum()), int((~noise).sum())
    if not (hits and others):
        raise ValueError(f"a ROC area needs noise and clean tokens; got {hits} of noise, {others} clean")
    return float(ranks(values)[noise].sum() - hits * (hits + 1) / 2) / (hits * others)


def price(values: Tensor, noise: Tensor, behind: Tensor, percent: int) -> dict[str, float | None]:
    """What the highest threshold costs at which that many percent of the noise, or more, are caught.

    Returns:
        "clean_lost": share of the clean tokens that are not below it; "behind": share of these right behind noise,
        None where nothing is lost.
    """
    hits = values[noise].sort(descending=True).values
    threshold = hits[-(-percent * len(hits) // 100) - 1]
    lost = ~noise & (values >= threshold)
    count = int(lost.sum())
    return {
        "clean_lost": count / int((~noise).sum()),
        "behind": int((lost & behind).sum()) / count if count else None,
    }


def pair_area(first: Tensor, second: Tensor, noise: Tensor, row: Tensor) -> float:
    """ROC area of what a logistic regression makes of two signals' ranks and their product, (N,) each.

    It is fitted on every other row and tested on the rest, then the other way round: the mean of both.
    """
    one, other = (12**0.5 * (ranks(values) / len(values) - 0.5) for values in (first, second))  # variance 1
    inputs = torch.stack([torch.ones_like(one), one, other, one * other], 1)  # (N, 4)
    areas = []
    for half in (0, 1):
        tested = row % 2 == half
        weights = logistic_weights(inputs[~tested], noise[~tested].double())
        areas.append(roc_area(inputs[tested] @ weights, noise[tested]))
    return statistics.mean(areas)


def logistic_weights(inputs: Tensor, target: Tensor) -> Tensor:
    """The weights of a logistic regression with a small ridge: (N, K) float64 and (N,) in {0, 1} -> (K,)."""
    weights = inputs.new_zeros(inputs.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(inputs @ weights, target)
        value = value + RIDGE * weights.square().sum()
        value.backward()
        return value

    search.step(loss)
    return weights.detach()


def histogram(values: Tensor, noise: Tensor) -> dict:
    """Counts of BINS equal bins over the range of all values, and the median, of noise and of clean tokens."""
    low, high = float(values.min()), float(values.max())
    return {"range": [low, high]} | {
        name: {"counts": [int(n) for n in torch.histc(part, BINS, low, high)], "median": float(part.median())}
        for name, part in (("noise", values[noise]), ("clean", values[~noise]))
    }


def describe(tokens: dict[str, Tensor]) -> dict:
    """What `token_signals` gave, in figures: "signals", "pairs" and "histograms", and how many tokens there were."""
    noise, behind, row = tokens["noise"], tokens["behind"], tokens["row"]
    areas = {
        name: {"auc": roc_area(tokens[name], noise)}
        | {str(percent): price(tokens[name], noise, behind, percent) for percent in CAUGHT}
        for name in SIGNALS
    }
    pairs = {
        f"{one}, {other}": pair_area(tokens[one], tokens[other], noise, row)
        for one, other in itertools.combinations(PAIRED, 2)
    }
    return {
        "rows": len(row.unique()),
        "tokens": len(noise),
        "noise": int(noise.sum()),
        "behind": int(behind.sum()) / int((~noise).sum()),
        "signals": areas,
        "pairs": pairs,
        "histograms": {name: histogram(tokens[name], noise) for name in DRAWN},
    }


# The study


def world_signals(world: RealWorld, batch: int) -> dict[str, dict]:
    """Trains on every token, in as many epochs as STEPS take -> by step, what `describe` says of some of the rows.

    Raises:
        ValueError: the rows have no marks of noise.
    """
    rows = world.rows("train")
    if not any(any(row.get("noise", ())) for row in rows):
        file = world.folder / "train.json"
        raise ValueError(f"{file}: no token is marked as noise, so there is nothing to tell apart")
    taken = random.Random(world.seed).sample(with_reference(world, rows), min(LOOKED_AT, len(rows)))
    taken.sort(key=lambda row: len(row["labels"]))  # less padding, and halves of rows as long
    epochs = math.ceil(STEPS[-1] / math.ceil(len(rows) / batch))
    found = {}
    for patched, step, _, _ in training_steps(world, Recipe("full", {}, epochs=epochs), batch):
        if step in STEPS:
            found[str(step)] = describe(token_signals(patched, taken, world.tokenizer))
        if step == STEPS[-1]:
            break
    return found


def kind_signals(world: tuple, batch: int) -> dict[str, dict]:
    """`world_signals` of the world that is built from these arguments, if it is not there yet."""
    return world_signals(build_world(*world), batch)


def run_signals(study: RealStudy, results: dict, save: Callable[[], None]) -> None:
    """Fills results["kinds"][kind][str(step)] for the kinds that it lacks, of seed 0; saves each kind as it ends.

    Raises:
        ValueError: a kind without noise.
    """
    if without := [kind for kind in study.kinds if kind not in NOISY]:
        raise ValueError(f"kinds must have noise to tell apart: {', '.join(NOISY)}; got {', '.join(without)}")
    kinds = results.setdefault("kinds", {})
    for kind in study.kinds:
        kinds.setdefault(kind, None)
    waiting = [kind for kind in study.kinds if not measured(kinds[kind])]
    if not waiting:
        return
    where = place_of(machine(device_used()), results.setdefault("machines", []))
    folder = pretrained_folder(study)
    sources = make_sources(study, folder)
    tasks = {kind: (world_arguments(study, kind, SEED, sources, folder), KINDS[kind].batch) for kind in waiting}
    for kind, found in run_all(kind_signals, tasks, "kinds"):
        kinds[kind] = found | {"machine": where}
        save()


# The table


def signals_table(results: dict) -> str:
    """A table for each of the steps SHOWN, a column a kind; below it what its reader has to know."""
    lines: list[str] = []
    for step in SHOWN:
        kinds = results["kinds"].values()
        at = [found.get(str(step)) if measured(found) else found for found in kinds]
        lines += [
            f"After {step} steps:",
            "",
            f"| signal | {' | '.join(results['kinds'])} |",
            "| --- |" + " --: |" * len(at),
            *(_row(title, at, lambda found, name=name: _area(found, name)) for name, title in SIGNALS.items()),
            _row("best pair", at, lambda found: f"{max(found['pairs'].values()):.3f}"),
            _row("right behind noise, of all clean", at, lambda found: f"{100 * found['behind']:.0f} %"),
            _row("right behind noise, of what NLL loses", at, _lost_behind),
            "",
        ]
    return "\n".join([*lines, *signals_notes(results)])


def _row(title: str, at: list[dict | None], cell: Callable[[dict], str]) -> str:
    cells = [cell(found) if measured(found) else "failed" if found else "not measured" for found in at]
    return f"| {title} | {' | '.join(cells)} |"


def _area(found: dict, name: str) -> str:
    signal = found["signals"][name]
    return f"{signal['auc']:.3f} ({100 * signal[str(CAUGHT[-1])]['clean_lost']:.1f} %)"


def _lost_behind(found: dict) -> str:
    share = found["signals"]["nll"][str(CAUGHT[-1])]["behind"]
    return "-" if share is None else f"{100 * share:.0f} %"


def _best_pair(found: dict) -> str:
    return " and ".join(SIGNALS[name] for name in max(found["pairs"], key=found["pairs"].get).split(", "))


def signals_notes(results: dict) -> list[str]:
    """How to read the table, what was looked at, and which kinds are not there yet or failed."""
    kinds = results["kinds"]
    notes = [
        "- ROC area: the chance that noise has more of a signal than a clean token. 0.5 says nothing; below, noise has "
        "less of it.",
        f"- In brackets: the clean tokens that have as much of it as the {CAUGHT[-1]} % of the noise with most; they "
        f"are what a signal loses. Right behind noise stand the {BEHIND} tokens after it.",
        f"- A pair is fitted on one half of the rows and tested on the other; the best of {math.comb(len(PAIRED), 2)} "
        "is shown. One seed.",
    ]
    for kind, found in kinds.items():
        if measured(found):
            at = found[str(SHOWN[-1])]
            share = f"{100 * at['noise'] / at['tokens']:.0f} % of them noise"
            pairs = "; ".join(f"{_best_pair(found[str(step)])} at step {step}" for step in SHOWN)
            notes.append(
                f"- {kind}: {at['tokens']:,} response tokens of {at['rows']} rows, {share}; best pair: {pairs}"
            )
    notes += [f"- failed: {kind}: {found['failed']}" for kind, found in kinds.items() if found and not measured(found)]
    if (done := sum(found is not None for found in kinds.values())) < len(kinds):
        notes.append(f"- unfinished: {done} of {len(kinds)} kinds")
    return [*notes, *(f"- {where}" for where in machines(results))]
