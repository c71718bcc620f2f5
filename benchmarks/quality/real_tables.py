"""The tables of the study of pretrained models, from its results.

Recipes that share a seed share rows and order, so that their difference says far more than two levels do.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.machine import short_commit
from benchmarks.quality.real import RECIPES, SHOWN
from benchmarks.quality.real_rows import KINDS
from benchmarks.quality.tables import cell, differences, of, percent, spread, with_notes
from benchmarks.resume import measured

RIVALS = ("full", "random", "sstoken")  # what a method has to beat
TRAININGS = ("the paper's recipe", "all weights")  # other suffixes of a recipe's name are parameters of its method
VISIBLE = 0.0005  # nats, a difference that three digits show


def real_table(results: dict) -> str:
    """A table of kinds x recipes, and below it all that was measured of each kind."""
    if not (kinds := kinds_measured(results)):
        return "not measured"
    return "\n".join(
        [
            *summary(results, kinds),
            "",
            *_answers(results),
            *_seeds(results),
            "",
            "<details><summary>Everything that was measured, by kind of rows</summary>",
            "",
            with_notes([line for kind in kinds for line in _of_kind(results, kind)], results),
            "",
            "</details>",
        ]
    )


def first_table(results: dict) -> str:
    """What a first page needs: of each kind of rows the loss of `full`, and how far the recipes SHOWN are from it."""
    others = [name for name in SHOWN if name != "full"]
    lines = [f"| noise | `full` | {' | '.join(f'`{name}`' for name in others)} |", "| --- |" + " --: |" * len(SHOWN)]
    for kind in kinds_measured(results):
        of_kind = results["rows"][kind]
        cells = [_difference(of_kind, name) for name in ("full", *others)]
        lines.append(f"| {KINDS[kind].about} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_seeds(results)])


def kinds_measured(results: dict) -> list[str]:
    """The kinds of rows that have a run."""
    rows = results["rows"]
    return [kind for kind in KINDS if any(measured(run) for runs in rows.get(kind, {}).values() for run in runs)]


def summary(results: dict, kinds: list[str]) -> list[str]:
    """Held-out NLL of `full`, and of every other recipe the difference to it."""
    names = _in_order(name for kind in kinds for name in results["rows"][kind])
    lines = [
        f"| held-out NLL minus that of `full` | {' | '.join(kinds)} |",
        "| --- |" + " --: |" * len(kinds),
        f"| base, before: NLL | {' | '.join(_nats(_base(results, kind, 'held_out')) for kind in kinds)} |",
    ]
    for name in names:
        cells = [_difference(results["rows"][kind], name) for kind in kinds]
        if any(cells):
            label = f"{name}: NLL" if is_full(name) else name
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _in_order(names: Iterable[str]) -> list[str]:
    """As the study has them, and then those that it does not know any more."""
    found = dict.fromkeys(names)
    return [*(name for name in RECIPES if name in found), *(name for name in found if name not in RECIPES)]


def rival(of_kind: dict[str, list], recipe: str, method: str) -> str:
    """The recipe of another method that is trained in the same way: "sstoken, all weights" -> "full, all weights".

    Without it there is nothing to compare with. Of `random` the one of the same rho, where there is one.
    """
    _, _, suffix = recipe.partition(", ")
    same_rho = method == "random" and suffix.startswith("rho ") and f"random, {suffix}" in of_kind
    return f"{method}, {suffix}" if suffix in TRAININGS or same_rho else method


def is_full(recipe: str) -> bool:
    """Whether a recipe is what the others of its training are compared with, and has a loss in the table itself."""
    return rival({}, recipe, "full") == recipe


def beats(of_kind: dict[str, list], recipe: str) -> bool:
    """Whether a recipe ends visibly below all of its rivals, by more than half the range of the differences over seeds.

    Never where a rival is not measured.
    """
    for method in RIVALS:
        other = rival(of_kind, recipe, method)
        if other == recipe:
            continue
        found = differences(of_kind[recipe], of_kind.get(other, []))
        if len(found) < 2 or statistics.mean(found) > -max(VISIBLE, (max(found) - min(found)) / 2):
            return False
    return True


def _difference(of_kind: dict[str, list], recipe: str) -> str:
    """ "" where nothing was begun."""
    runs = of_kind.get(recipe, [])
    if not any(run is not None for run in runs):
        return ""
    if is_full(recipe):
        return cell(runs, spread(of(runs, "nll")))
    text = spread(differences(runs, of_kind.get(rival(of_kind, recipe, "full"), [])))
    return cell(runs, f"**{text}**" if beats(of_kind, recipe) else text)


def _of_kind(results: dict, kind: str) -> list[str]:
    of_kind, base = results["rows"][kind], _base(results, kind, "elsewhere")
    lines = [
        f"| {kind} | held-out NLL | minus `full` | minus `random` | noise kept | clean kept | forgotten |",
        "| --- |" + " --: |" * 6,
    ]
    for name in _in_order(of_kind):
        runs = of_kind[name]
        if not any(run is not None for run in runs):
            continue
        rivals = [rival(of_kind, name, method) for method in ("full", "random")]
        away = [value - base for value in of(runs, "elsewhere") if value is not None and base is not None]
        cells = [
            cell(runs, spread(of(runs, "nll"))),
            *(spread(differences(runs, of_kind.get(other, []))) if other != name else "" for other in rivals),
            *(percent(of(runs, share)) for share in ("noise_kept", "clean_kept")),
            spread(away),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _answers(results: dict) -> list[str]:
    """Exact match, where it was looked at."""
    told = [
        f"{answered['right']} of {answered['of']} {'before' if name == 'base' else f'after `{name}`'}"
        for name, answered in results.get("answers", {}).items()
        if measured(answered)
    ]
    return [f"Held-out problems answered right by greedy decoding, clean rows: {', '.join(told)}.", ""] if told else []


def machines(results: dict) -> list[str]:
    """What was measured where: of each machine its versions and commits."""
    commits: dict[str, list[str]] = {}
    for used in results.get("machines", []):
        versions = [f"{name} {used[name]}" for name in ("torch", "transformers") if name in used]
        where = f"{used.get('gpu') or used['cpu']}, {used['cores']} cores, Python {used['python']}"
        commits.setdefault(", ".join([where, *versions]), []).append(short_commit(used["commit"]))
    return [f"{where}; commit {', '.join(dict.fromkeys(names))}." for where, names in commits.items()]


def _seeds(results: dict) -> list[str]:
    """How many, and on what machines."""
    seeds = max((len(runs) for of_kind in results["rows"].values() for runs in of_kind.values()), default=0)
    return [f"{seeds} seed{'s' * (seeds != 1)}; {where}" for where in machines(results)]


def _base(results: dict, kind: str, name: str) -> float | None:
    losses = results.get("bases", {}).get(kind)
    return losses[name] if measured(losses) else None


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
