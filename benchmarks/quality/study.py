"""Does selection help? Held-out loss, noise kept and cost of every method, beside `full` and `random`, over seeds.

    python -m benchmarks.quality.study planted            (a) every method on planted noise, at rho 0.4, 0.6 and 0.8
    python -m benchmarks.quality.study text FILE.jsonl    (b) real text with a share of its responses corrupted
    python -m benchmarks.quality.study feedback           (c) when the published sign of REL feeds on itself

On two cores (a) takes about 15 minutes, (b) 26 and (c) 14. Each writes benchmarks/results/quality.NAME.json after every
result, and at its end the README's table of it. A run that fails is recorded with its reason, and the others go on. A
study that was interrupted goes on when started again with the same settings on the same machine and commit (`--fresh`
begins anew). `--seeds N` (3); `--scale N` (1) for a model N times as wide, trained for N times as many steps on N times
as many rows, where there is a GPU for it.

What a seed varies: in (a) and (c) everything (rows, tokenizer, base, noise, order, the first weights of adapters). In
(b) base, reference, tokenizer and held-out rows are one for all seeds; which rows of the other half are taken, their
noise and their order vary. So its ± says nothing of other bases.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.worlds import (
    STEPS,
    World,
    build_world,
    fine_tune,
    further,
    losses_of,
    record,
    record_everything,
    train,
    with_no_noise,
)
from benchmarks.speed.measure import machine
from tokensel import methods
from tokensel.arguments import SelectiveTrainingArguments
from tokensel.data import encode_rows, load_rows, place_of_row
from tokensel.testing import held_out_nll, make_model, make_tokenizer, plant_noise
from tokensel.trainer import SelectiveTrainer

WIDTH = 128  # of the model
SHORT = 60  # steps of fine-tuning in (b) and (c), 16 rows each
TEXT_BASE_STEPS = 800
LENGTH = 256  # tokens of a row of text
TEXT_ROWS = {"held_out": 200, "noisy": SHORT * 16, "clean": SHORT * 16}
RHOS = (0.4, 0.6, 0.8)
SIGNS = {"random": "random", "+": "rel", "-": "history_excess"}
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"

# (b) and (c) compare these; label -> (method, parameters)
COMPARED = {
    "full": ("full", {}),
    "random": ("random", {}),
    "rel": ("rel", {}),
    "history_excess": ("history_excess", {}),
    "sstoken": ("sstoken", {}),
    "sstoken, rel_sign -1": ("sstoken", {"rel_sign": -1}),
    "sstoken, rel_sign -1, ranked": ("sstoken", {"rel_sign": -1, "rel_scale": "rank"}),
    "rho1, clean reference": ("rho1", {}),
}
# (a) every method with its defaults, and what goes beyond the papers: label -> (method, parameters, trainer's settings)
VARIANTS = {
    "sstoken, rel_sign -1": ("sstoken", {"rel_sign": -1}, {}),
    "sstoken, rel_sign -1, ranked": ("sstoken", {"rel_sign": -1, "rel_scale": "rank"}, {}),
    "sstoken, rel_sign -1, gated": ("sstoken", {"rel_sign": -1, "rel_scale": "gate"}, {}),
    "sstoken, rel_floor 1": ("sstoken", {"rel_floor": 1.0}, {}),
    "sstoken, debias": ("sstoken", {"debias": "uniform"}, {}),
    "sstoken, rel_sign -1, debias": ("sstoken", {"rel_sign": -1, "debias": "uniform"}, {}),
    "history_excess, rho 0.3 to 0.9": ("history_excess", {"rho_min": 0.3, "rho_max": 0.9}, {}),
    "history_excess, whole batch": ("history_excess", {"scope": "batch"}, {}),
    "sstoken, first token no prompt": ("sstoken", {}, {"sink": 1}),
    "sstoken, heads by entropy": ("sstoken", {}, {"head_weights": "entropy"}),
    "sstoken, all three layers": ("sstoken", {}, {"layer": [0, 1, 2]}),
}


# The studies. Every task runs on one thread, as many at a time as there are cores.


def device_used() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _quiet() -> None:
    disable_progress_bar()  # of loading a model; the studies show their own
    torch.set_num_threads(1)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    _quiet()


def attempt(function: Callable, *arguments: object, **settings: object) -> object:
    """What the function returns, or {"failed": why}: a run that fails costs the others nothing."""
    try:
        return function(*arguments, **settings)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _call(task: tuple) -> tuple:
    key, function, arguments = task
    return key, attempt(function, *arguments)


def run_all(function: Callable, tasks: dict, label: str, *, fresh: bool = False) -> Iterator[tuple]:
    """(key, function(*arguments) or how it failed) of every task, as they end. fresh: a new process for each."""
    if not tasks:
        return
    workers = 1 if device_used().type == "cuda" else len(os.sched_getaffinity(0))
    waiting = [(key, function, arguments) for key, arguments in tasks.items()]
    limit = 1 if fresh else None
    with multiprocessing.get_context("spawn").Pool(workers, _begin_worker, maxtasksperchild=limit) as pool:
        yield from tqdm(pool.imap_unordered(_call, waiting), total=len(waiting), desc=label, unit="run")


def measured(run: dict | None) -> bool:
    return run is not None and "failed" not in run


def _tune(world: World | dict, *arguments: object, **settings: object) -> dict:
    """`fine_tune`, or why the world itself failed."""
    return fine_tune(world, *arguments, **settings) if isinstance(world, World) else world


def _all_seeds(worlds: list[World], name: str, parameters: dict, settings: dict, steps: int) -> dict:
    """One method on every seed's world; peak memory of its process in MiB, allocated on a GPU, else resident."""
    runs = [attempt(_tune, world, name, parameters, steps, **settings) for world in worlds]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device_used().type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"runs": runs, "peak_mib": peak}


def _planted_world(folder: Path, seed: int, scale: int) -> World:
    world = build_world(folder, seed, kind="mixed", share=0.5, scale=scale)
    record_everything(world)
    return world


def planted_cases(scale: int) -> dict:
    """label -> (method, parameters, trainer's settings) of (a)."""
    cases = {name: (name, {}, {}) for name in methods.names()}
    cases["forgetting"] = ("forgetting", {"lambda_steps": STEPS * scale}, {})
    defaults = {name: inspect.signature(methods.builder(name)).parameters.get("rho") for name in cases}
    for rho, (name, default) in itertools.product(RHOS, defaults.items()):
        if default is not None and default.default != rho:
            cases[f"{name}, rho {rho}"] = (name, cases[name][1] | {"rho": rho}, {})
    return cases | VARIANTS


def planted(found: dict, save: Callable, seeds: int, scale: int) -> None:
    """(a) Every method on planted noise, those that keep a share at each of RHOS."""
    cases = planted_cases(scale)
    old = found.get("rows", {})
    nothing = {"runs": [None] * seeds, "peak_mib": None}
    rows = found["rows"] = {
        label: old.get(label, nothing) | dict(zip(("method", "parameters", "settings"), case, strict=True))
        for label, case in cases.items()
    }
    waiting = [label for label in cases if not all(map(measured, rows[label]["runs"]))]
    if not waiting:
        return
    with tempfile.TemporaryDirectory() as folder:
        tasks = {seed: (Path(folder) / str(seed), seed, scale) for seed in range(seeds)}
        by_seed = dict(run_all(_planted_world, tasks, "bases and recorded losses"))
        worlds = [by_seed[seed] for seed in range(seeds)]
        found["base_nll"] = [base_nll(world) for world in worlds if isinstance(world, World)]
        tasks = {label: (worlds, *cases[label], STEPS * scale) for label in waiting}
        for label, row in run_all(_all_seeds, tasks, "methods", fresh=True):
            rows[label] |= row
            save()


def base_nll(world: World) -> float:
    model = AutoModelForCausalLM.from_pretrained(world.folder / "base")
    nothing = SelectiveTrainingArguments(output_dir=str(world.folder), method="full", report_to="none")
    trainer = SelectiveTrainer(model, nothing, processing_class=world.tokenizer)
    return held_out_nll(trainer, world.rows("held_out"))


def _measure(found: dict, save: Callable, make_world: Callable, worlds: dict, tasks: dict) -> None:
    """Fills found["rows"] with the runs that it lacks, and saves each as it ends.

    worlds: key -> arguments of make_world. tasks: (row, column, seed) -> (key of its world, *arguments of fine_tune).
    """
    rows = found["rows"]
    waiting = {place: task for place, task in tasks.items() if not measured(rows[place[0]][place[1]][place[2]])}
    needed = {key: worlds[key] for key, *_ in waiting.values()}
    made = dict(run_all(make_world, needed, "bases and recorded losses"))
    ready = {place: (made[key], *arguments) for place, (key, *arguments) in waiting.items()}
    for (row, column, seed), run in run_all(_tune, ready, "runs"):
        rows[row][column][seed] = run
        save()


def _places(found: dict, rows: list, columns: list, seeds: int) -> bool:
    """Makes found["rows"][row][column], a list over seeds that keeps what was there. Is anything left to measure?"""
    old = found.get("rows", {})
    found["rows"] = {r: {c: old.get(r, {}).get(c, [None] * seeds) for c in columns} for r in rows}
    return not all(measured(run) for row in found["rows"].values() for runs in row.values() for run in runs)


def _text_world(root: Path, kind: str, share: float, seed: int, scale: int, rows: list[dict]) -> World:
    """Rows of the text with noise, and the base's and a clean reference's losses on them."""
    world = World(root / f"{kind}-{seed}", seed, scale)
    world.folder.mkdir()
    (world.folder / "base").symlink_to(root / "base")
    taken = random.Random(seed).sample(rows, TEXT_ROWS["noisy"] * scale)
    noisy = plant_noise(taken, world.tokenizer, kind=kind, share=share, seed=seed)
    world.save_rows("noisy", [{name: values[:LENGTH] for name, values in row.items()} for row in noisy])
    (world.folder / "held_out.jsonl").symlink_to(root / "held_out.jsonl")
    for column in ("base", "reference"):
        record(world, column, losses_of(AutoModelForCausalLM.from_pretrained(root / column)))
    return world


def text_parts(file: Path, scale: int) -> dict:
    """A file's rows for (b): the base learns from one half, the rest is in the other and nowhere else.

    Raises:
        ValueError: too few rows, or one that is no prompt with a completion; names the file.
    """
    rows = []
    for number, row in enumerate(load_rows(file)):
        try:
            rows.append(as_prompt_and_completion(row))
        except ValueError as error:
            raise ValueError(f"{place_of_row(file, number)}: {error}") from error
    noisy, clean = TEXT_ROWS["noisy"] * scale, TEXT_ROWS["clean"] * scale
    if len(rows) < (needed := 2 * (noisy + clean)):
        raise ValueError(
            f"{file} has {len(rows):,} rows, and `text` needs {needed:,} at --scale {scale}: half for the base and the "
            f"held-out rows, {noisy:,} to corrupt, {clean:,} for a clean reference; give a larger file"
        )
    held_out, half = TEXT_ROWS["held_out"], len(rows) // 2
    parts = {
        "held_out": rows[:held_out],
        "base": rows[held_out:half],
        "later": rows[half:-clean],
        "clean": rows[-clean:],
    }
    tokenizer = make_tokenizer(parts["base"], vocab_size=2048)
    for name in ("held_out", "base", "clean"):
        try:
            parts[name] = [dict(row) for row in encode_rows(parts[name], tokenizer, LENGTH)[0]]
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return parts | {"tokenizer": tokenizer}


def text(found: dict, save: Callable, seeds: int, scale: int, parts: dict) -> None:
    """(b) Real text: a base trained on one half, fine-tuned on the other with corrupted responses."""
    kinds = {"random": 0.5, "boilerplate": 0.7, "none": 0.0}
    if not _places(found, list(kinds), list(COMPARED), seeds):
        return
    set_seed(0)
    tokenizer, steps = parts["tokenizer"], SHORT * scale
    with tempfile.TemporaryDirectory() as folder:
        root = World(Path(folder), 0, scale)
        model = make_model(tokenizer, hidden_size=WIDTH * scale, seed=0)
        rows = with_no_noise(parts["base"])
        base = train(model, tokenizer, rows, steps=TEXT_BASE_STEPS * scale, rate=2e-3, seed=0)
        base.save_model(str(root.folder / "base"))
        root.save_rows("held_out", parts["held_out"])
        found["base_nll"] = [base_nll(root)]
        further(root, "reference", parts["clean"], steps)  # on clean rows that nothing else sees
        worlds = {
            (kind, seed): (root.folder, kind, share, seed, scale, parts["later"])
            for (kind, share), seed in itertools.product(kinds.items(), range(seeds))
        }
        tasks = {
            (kind, label, seed): ((kind, seed), name, parameters, steps, 2e-4)
            for (kind, seed), (label, (name, parameters)) in itertools.product(worlds, COMPARED.items())
        }
        _measure(found, save, _text_world, worlds, tasks)


def as_prompt_and_completion(row: dict) -> dict:
    """The texts of a row; of a chat the last answer, behind all that was said before it.

    Raises:
        ValueError: it has none of the columns, or no answer.
    """
    for prompt, completion, joint in (("prompt", "completion", ""), ("question", "answer", "\n")):
        if isinstance(row.get(prompt), str) and isinstance(row.get(completion), str):
            return {"prompt": row[prompt] + joint, "completion": row[completion]}
    if isinstance(turns := row.get("messages"), list):
        fields = [(turn.get("role"), turn.get("content")) for turn in turns if isinstance(turn, dict)]
        if len(fields) < len(turns) or not all(isinstance(field, str) for turn in fields for field in turn):
            raise ValueError("messages must be a list of {role, content}, both strings")
        while fields and fields[-1][0] != "assistant":
            fields.pop()
        if not fields:
            raise ValueError("messages must hold an assistant's message")
        # no chat template: the tokenizer is made of these rows
        before = "".join(f"{role}: {content}\n" for role, content in fields[:-1])
        return {"prompt": f"{before}assistant: ", "completion": fields[-1][1]}
    found = sorted(name for name, value in row.items() if value is not None)
    raise ValueError(f"rows must have prompt and completion, question and answer, or messages; found {found}")


def _feedback_world(folder: Path, kind: str, share: float, base_steps: int, seed: int, scale: int) -> World:
    world = build_world(folder, seed, kind=kind, share=share, base_steps=base_steps, scale=scale)
    record(world, "base", losses_of(AutoModelForCausalLM.from_pretrained(world.folder / "base")))
    return world


def feedback(found: dict, save: Callable, seeds: int, scale: int) -> None:
    """(c) Sign of REL × learning rate × LoRA or full × strength of the base × kind of noise."""
    kinds = {"none": 0.0, "random": 0.5, "boilerplate": 0.7, "swapped": 0.4}
    bases = list(itertools.product(kinds, (60, 400)))  # steps at scale 1
    cases = {}  # label -> (kind, base), learning rate, LoRA
    for (kind, base), lora, rate in itertools.product(bases, (False, True), (1, 4)):
        speed = rate * (5e-4 if lora else 1e-4)
        cases[f"{kind}|{base * scale} steps|{'LoRA' if lora else 'full'}|{speed:g}"] = ((kind, base), speed, lora)
    _places(found, list(cases), list(SIGNS), seeds)
    with tempfile.TemporaryDirectory() as folder:
        worlds = {
            (kind, base, seed): (Path(folder) / f"{kind}-{base}-{seed}", kind, kinds[kind], base, seed, scale)
            for (kind, base), seed in itertools.product(bases, range(seeds))
        }
        tasks = {
            (label, sign, seed): ((*world, seed), SIGNS[sign], {}, SHORT * scale, speed, lora)
            for (label, (world, speed, lora)), seed, sign in itertools.product(cases.items(), range(seeds), SIGNS)
        }
        _measure(found, save, _feedback_world, worlds, tasks)


# The file of results


def begun(path: Path, settings: dict) -> dict:
    """What was found with the same settings, or the settings alone.

    Raises:
        ValueError: the file is no JSON.
    """
    if not path.exists():
        return dict(settings)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; --fresh replaces it") from error
    return found if all(found.get(name) == value for name, value in settings.items()) else dict(settings)


def write(path: Path, found: dict) -> None:
    """Replaces the file as a whole: whoever interrupts this keeps the one before."""
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(json.dumps(found) + "\n", encoding="utf-8")
    os.replace(whole, path)


def all_runs(found: dict) -> dict[str, dict | None]:
    """Every run by its name; None where there is none yet."""
    runs = {}
    for label, row in found["rows"].items():
        for column, of_seeds in {"": row["runs"]}.items() if "runs" in row else row.items():
            runs |= {" ".join(filter(None, (label, column, f"seed {s}"))): run for s, run in enumerate(of_seeds)}
    return runs


# What people read


def spread(values: list[float | None], digits: int = 3) -> str:
    """mean ± half the range over the seeds; `-` where nothing was measured."""
    real = [v for v in values if v is not None]
    if not real:
        return "-"
    half = (max(real) - min(real)) / 2
    return f"{statistics.mean(real):.{digits}f} ± {half:.{digits}f}"


def percent(values: list[float | None]) -> str:
    real = [v for v in values if v is not None]
    return f"{100 * statistics.mean(real):.0f} %" if real else "-"


def of(runs: list[dict], name: str) -> list[float]:
    return [run[name] for run in runs if measured(run)]


def cell(runs: list[dict | None], text: str) -> str:
    """A text made of the runs that there are, with how many failed."""
    failed = sum(run is not None and not measured(run) for run in runs)
    if not any(map(measured, runs)):
        return "failed" if failed else "not measured"
    return f"{text} ({failed} of {len(runs)} failed)" if failed else text


def with_notes(lines: list[str], found: dict) -> str:
    """A table, and below it what its reader has to know: runs that are not there yet, or failed."""
    runs = all_runs(found)
    notes = [f"- failed: {name}: {run['failed']}" for name, run in runs.items() if run and not measured(run)]
    if (done := sum(run is not None for run in runs.values())) < len(runs):
        notes.insert(0, f"- unfinished: {done} of {len(runs)} runs")
    return "\n".join([*lines, "", *notes] if notes else lines)


def planted_table(found: dict) -> str:
    """Without the methods that a file of results lacks; without memory where no method needs a MiB more than `full`."""
    rows = {label: row for label, row in found["rows"].items() if any(run is not None for run in row["runs"])}
    full = rows.get("full", {}).get("peak_mib")
    extra = {label: max(0, row["peak_mib"] - full) if full else 0 for label, row in rows.items()}
    names = ["method", "held-out clean NLL", "noise kept", "dropped that was noise", "kept", "tokens/s"]
    names += ["extra MiB"] * any(mib >= 1 for mib in extra.values())
    lines = [
        f"| {' | '.join(names)} |",
        "| --- |" + " --: |" * (len(names) - 1),
        f"| base, before | {spread(found.get('base_nll', []))} |" + " |" * (len(names) - 2),
    ]

    def mean_loss(label: str) -> float:
        losses = of(rows[label]["runs"], "nll")
        return statistics.mean(losses) if losses else float("inf")

    for label in sorted(rows, key=mean_loss):
        runs = rows[label]["runs"]
        cells = [
            f"**{label}**" if label in ("full", "random") else label,
            cell(runs, spread(of(runs, "nll"))),
            *(percent(of(runs, name)) for name in ("noise_kept", "precision", "kept_share")),
            f"{statistics.median(of(runs, 'tokens_per_second') or [0]):,.0f}",
            f"{extra[label]:.0f}",
        ]
        lines.append(f"| {' | '.join(cells[: len(names)])} |")
    return with_notes(lines, found)


def text_table(found: dict) -> str:
    kinds = list(found["rows"])
    lines = [
        "| method | " + " | ".join(f"noise: {kind} | noise kept" for kind in kinds) + " |",
        "| --- |" + " --: | --: |" * len(kinds),
        f"| base, before | {spread(found.get('base_nll', []))} |" + " |" * (2 * len(kinds) - 1),
    ]
    for label in COMPARED:
        cells = [found["rows"][kind][label] for kind in kinds]
        lines.append(
            f"| {label} | "
            + " | ".join(f"{cell(runs, spread(of(runs, 'nll')))} | {percent(of(runs, 'noise_kept'))}" for runs in cells)
            + " |"
        )
    return with_notes(lines, found)


def feedback_table(found: dict) -> str:
    """Held-out loss of either sign, as the difference to `random` at equal rho; where + is safe."""
    lines = [
        "| noise | base | trained | learning rate | `random` | `rel` minus it | `history_excess` minus it |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for label, signs in found["rows"].items():
        noise, base, trained, rate = label.split("|")
        cells = [cell(signs["random"], spread(of(signs["random"], "nll")))]
        for sign in ("+", "-"):
            pairs = [pair for pair in zip(signs[sign], signs["random"], strict=True) if all(map(measured, pair))]
            cells.append(cell(signs[sign], spread([run["nll"] - chance["nll"] for run, chance in pairs])))
        lines.append(f"| {noise} | {base} | {trained} | {rate} | {' | '.join(cells)} |")
    return with_notes(lines, found)


def plot_feedback(found: dict, path: Path) -> None:
    """Loss of kept and of dropped tokens over the steps, both signs, one panel a kind of noise (full, higher rate)."""
    from matplotlib.figure import Figure

    chosen = [label for label in found["rows"] if f"|{60 * found['scale']} steps|full|0.0004" in label]
    figure = Figure(figsize=(3.2 * len(chosen), 3.4), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, chosen, strict=True):
        for sign, color, name in (("+", "tab:red", "REL as published"), ("-", "tab:blue", "REL reversed")):
            for curve, style in (("kept_nll", "-"), ("dropped_nll", "--")):
                runs = [curves[curve] for curves in of(found["rows"][label][sign], "curves")]
                if not runs:
                    continue
                steps = [step for step, _ in runs[0]]
                mean = [statistics.mean(run[i][1] for run in runs) for i in range(len(steps))]
                axes.plot(steps, mean, style, color=color, label=f"{name}, {curve.removesuffix('_nll')}")
        axes.set_title(f"noise: {label.split('|')[0]}", fontsize=10)
        axes.set_xlabel("optimizer step")
    panels[0].set_ylabel("current NLL (nats)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)


STUDIES = {"planted": (planted, planted_table), "text": (text, text_table), "feedback": (feedback, feedback_table)}


def into_readme(name: str, table: str, readme: Path = README) -> None:
    """Puts a table between its markers in the README.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- table: {name} -->\n", f"<!-- end of table: {name} -->"
    page = readme.read_text(encoding="utf-8")
    if begin not in page or end not in page:
        raise ValueError(f"{readme} lacks the markers {begin.strip()} and {end}")
    before, rest = page.split(begin)
    readme.write_text(before + begin + table + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "file", nargs="?", type=Path, help="JSONL of prompt/completion, question/answer or messages, for `text`"
    )
    parser.add_argument("--seeds", type=_positive, default=3)
    parser.add_argument("--scale", type=_positive, default=1, help="width of the model, steps and rows, times this")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for quality.STUDY.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what quality.STUDY.json already has")
    options = parser.parse_args(argv)
    _quiet()
    if (options.study == "text") != (options.file is not None):
        parser.error("`text` takes a JSONL file, the other studies make their own data")
    study, table = STUDIES[options.study]
    path = options.output / f"quality.{options.study}.json"
    settings = {"study": options.study, "seeds": options.seeds, "scale": options.scale}
    settings["machine"] = machine(device_used())
    given = []
    try:  # what can be wrong is found before anything is trained
        options.output.mkdir(parents=True, exist_ok=True)
        if options.file:
            given.append(text_parts(options.file, options.scale))
            digest = hashlib.sha256(options.file.read_bytes()).hexdigest()
            settings |= {"file": options.file.name, "sha256": digest}
        found = dict(settings) if options.fresh else begun(path, settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if "rows" in found:
        done = sum(map(measured, all_runs(found).values()))
        print(f"{done} runs are in {path} already; --fresh measures them again")
    elif path.exists() and not options.fresh:
        print(f"{path} is of other settings, another machine or commit: everything is measured, and replaces it")
    started, before = time.perf_counter(), found.get("minutes", 0.0)

    def save() -> None:
        found["minutes"] = before + (time.perf_counter() - started) / 60
        write(path, found)

    try:
        study(found, save, options.seeds, options.scale, *given)
    except KeyboardInterrupt:
        parser.exit(130, f"\ninterrupted; the same command goes on with what is in {path}\n")
    steps = (STEPS if options.study == "planted" else SHORT) * options.scale
    print(f"{steps} steps of fine-tuning, model {WIDTH * options.scale} wide, on {settings['machine']['device']}")
    print(table(found))
    print(f"\n{found['minutes']:.1f} minutes; wrote {path}")
    if options.output == RESULTS:
        into_readme(options.study, table(found))
        if options.study == "feedback":
            plot_feedback(found, README.parent / "docs/feedback.png")


if __name__ == "__main__":
    main()
