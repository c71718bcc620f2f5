"""Does selection help? Held-out loss, noise kept and cost of every method, beside `full` and `random`, over seeds.

    python -m benchmarks.quality planted            (a) every method on planted noise, and some at other rho
    python -m benchmarks.quality text FILE.jsonl    (b) real text with a share of its responses corrupted
    python -m benchmarks.quality feedback           (c) when the published sign of REL feeds on itself

Each writes benchmarks/results/quality.NAME.json and the README's table of it. `--seeds N` (3), `--scale N` (1) for a
model N times as wide and N times as many steps, where there is a GPU for it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import machine
from benchmarks.worlds import (
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
from tokensel import methods
from tokensel.arguments import SelectiveTrainingArguments
from tokensel.data import encode_rows, load_rows
from tokensel.planted import held_out_nll, make_model, make_tokenizer, plant_noise
from tokensel.trainer import SelectiveTrainer

LENGTH = 256  # tokens of a row of text
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


def _quiet() -> None:
    disable_progress_bar()  # of loading a model; the studies show their own
    torch.set_num_threads(1)


def _call(task: tuple) -> tuple:
    key, function, arguments = task
    return key, function(*arguments)


def run_all(function, tasks: dict, label: str, *, fresh: bool = False) -> dict:
    """function(*arguments) of every task -> the results by the same keys. fresh: a new process for each."""
    workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    waiting = [(key, function, arguments) for key, arguments in tasks.items()]
    with multiprocessing.get_context("spawn").Pool(workers, _quiet, maxtasksperchild=1 if fresh else None) as pool:
        done = tqdm(pool.imap_unordered(_call, waiting), total=len(waiting), desc=label, unit="run")
        found = dict(done)
    return {key: found[key] for key in tasks}


def _all_seeds(worlds: list[World], name: str, parameters: dict, settings: dict, steps: int) -> dict:
    """One method on every seed's world, and the peak resident memory of its process in MiB."""
    runs = [fine_tune(world, name, parameters, steps, **settings) for world in worlds]
    return {"runs": runs, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _planted_world(folder: Path, seed: int, scale: int) -> World:
    world = build_world(folder, seed, kind="mixed", share=0.5, scale=scale)
    record_everything(world)
    return world


def planted(seeds: int, scale: int) -> dict:
    """(a) Every method on planted noise; `random` at equal rho beside all; some at other rho."""
    cases = {name: (name, {}, {}) for name in methods.names()} | VARIANTS
    for rho in (0.4, 0.8):
        for name in ("random", "sstoken", "history_excess", "rho1"):
            cases[f"{name}, rho {rho}"] = (name, {"rho": rho}, {})
    cases["forgetting"] = ("forgetting", {"lambda_steps": STEPS * scale}, {})
    with tempfile.TemporaryDirectory() as folder:
        tasks = {seed: (Path(folder) / str(seed), seed, scale) for seed in range(seeds)}
        worlds = list(run_all(_planted_world, tasks, "bases and recorded losses").values())
        base = [base_nll(world) for world in worlds]
        tasks = {label: (worlds, *case, STEPS * scale) for label, case in cases.items()}
        rows = run_all(_all_seeds, tasks, "methods", fresh=True)
    for label, (name, parameters, settings) in cases.items():
        rows[label] |= {"method": name, "parameters": parameters, "settings": settings}
    return {"base_nll": base, "rows": rows}


def base_nll(world: World) -> float:
    model = AutoModelForCausalLM.from_pretrained(world.folder / "base")
    nothing = SelectiveTrainingArguments(output_dir=str(world.folder), method="full", report_to="none")
    trainer = SelectiveTrainer(model, nothing, processing_class=world.tokenizer)
    return held_out_nll(trainer, world.rows("held_out"))


def _text_world(root: Path, kind: str, share: float, seed: int, rows: list[dict]) -> World:
    """Rows of the text with noise, and the base's and a clean reference's losses on them."""
    world = World(root / f"{kind}-{seed}", seed)
    world.folder.mkdir()
    (world.folder / "base").symlink_to(root / "base")
    taken = random.Random(seed).sample(rows, 60 * 16)
    noisy = plant_noise(taken, world.tokenizer, kind=kind, share=share, seed=seed)
    world.save_rows("noisy", [{name: values[:LENGTH] for name, values in row.items()} for row in noisy])
    (world.folder / "held_out.jsonl").symlink_to(root / "held_out.jsonl")
    for column in ("base", "reference"):
        record(world, column, losses_of(AutoModelForCausalLM.from_pretrained(root / column)))
    return world


def text(file: Path, seeds: int, scale: int) -> dict:
    """(b) Real text: a base trained on one half, fine-tuned on the other with corrupted responses."""
    rows = [as_prompt_and_completion(row) for row in load_rows(file)]
    held_out, first, later, clean = rows[:200], rows[200 : len(rows) // 2], rows[len(rows) // 2 : -960], rows[-960:]
    tokenizer = make_tokenizer(first, vocab_size=2048)
    set_seed(0)

    def encoded(some: list[dict]) -> list[dict]:
        return [dict(row) for row in encode_rows(some, tokenizer, LENGTH)[0]]

    kinds = {"random": 0.5, "boilerplate": 0.7, "none": 0.0}
    steps = 60 * scale
    with tempfile.TemporaryDirectory() as folder:
        root = World(Path(folder), 0)
        model = make_model(tokenizer, hidden_size=128 * scale, seed=0)
        base = train(model, tokenizer, with_no_noise(encoded(first)), steps=800 * scale, rate=2e-3, seed=0)
        base.save_model(str(root.folder / "base"))
        root.save_rows("held_out", encoded(held_out))
        further(root, "reference", encoded(clean), steps)  # on clean rows that nothing else sees
        pairs = list(itertools.product(kinds, range(seeds)))
        tasks = {(kind, seed): (root.folder, kind, kinds[kind], seed, later) for kind, seed in pairs}
        worlds = run_all(_text_world, tasks, "noise and recorded losses")
        tasks = {
            (kind, label, seed): (worlds[kind, seed], name, parameters, steps, 2e-4)
            for (kind, seed), (label, (name, parameters)) in itertools.product(pairs, COMPARED.items())
        }
        runs = run_all(fine_tune, tasks, "methods × noise × seeds")
        before = base_nll(root)
    table = {kind: {label: [runs[kind, label, s] for s in range(seeds)] for label in COMPARED} for kind in kinds}
    return {"file": file.name, "rows": table, "base_nll": [before]}


def as_prompt_and_completion(row: dict) -> dict:
    for prompt, completion, joint in (("prompt", "completion", ""), ("question", "answer", "\n")):
        if isinstance(row.get(prompt), str) and isinstance(row.get(completion), str):
            return {"prompt": row[prompt] + joint, "completion": row[completion]}
    raise ValueError(f"rows must have prompt and completion, or question and answer; found {sorted(row)}")


def _feedback_world(folder: Path, kind: str, share: float, base_steps: int, seed: int, scale: int) -> World:
    world = build_world(folder, seed, kind=kind, share=share, base_steps=base_steps, scale=scale)
    record(world, "base", losses_of(AutoModelForCausalLM.from_pretrained(world.folder / "base")))
    return world


def feedback(seeds: int, scale: int) -> dict:
    """(c) Sign of REL × learning rate × LoRA or full × strength of the base × kind of noise."""
    kinds = {"none": 0.0, "random": 0.5, "boilerplate": 0.7, "swapped": 0.4}
    with tempfile.TemporaryDirectory() as folder:
        tasks = {
            (kind, base, seed): (Path(folder) / f"{kind}-{base}-{seed}", kind, share, base, seed, scale)
            for (kind, share), base, seed in itertools.product(kinds.items(), (60, 400), range(seeds))
        }
        worlds = run_all(_feedback_world, tasks, "bases and recorded losses")
        tasks = {}
        for (kind, base, seed), lora, rate in itertools.product(worlds, (False, True), (1, 4)):
            speed = rate * (5e-4 if lora else 1e-4)
            label = f"{kind}|{base} steps|{'LoRA' if lora else 'full'}|{speed:g}"
            for sign in SIGNS:
                tasks[label, sign, seed] = (worlds[kind, base, seed], SIGNS[sign], {}, 60 * scale, speed, lora)
        runs = run_all(fine_tune, tasks, "sign × rate × LoRA × base × noise × seeds")
    rows: dict = {}
    for (label, sign, _), run in runs.items():
        rows.setdefault(label, {}).setdefault(sign, []).append(run)
    return {"rows": rows}


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
    return [run[name] for run in runs]


def planted_table(found: dict) -> str:
    full = found["rows"]["full"]["peak_mib"]
    lines = [
        "| method | held-out clean NLL | noise kept | dropped that was noise | kept | tokens/s | extra MiB |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        f"| base, before | {spread(found['base_nll'])} | | | | | |",
    ]
    order = sorted(found["rows"].items(), key=lambda item: statistics.mean(of(item[1]["runs"], "nll")))
    for label, row in order:
        runs = row["runs"]
        cells = [
            f"**{label}**" if label in ("full", "random") else label,
            spread(of(runs, "nll")),
            *(percent(of(runs, name)) for name in ("noise_kept", "precision", "kept_share")),
            f"{statistics.median(of(runs, 'tokens_per_second')):,.0f}",
            f"{max(0, row['peak_mib'] - full):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text_table(found: dict) -> str:
    kinds = list(found["rows"])
    lines = [
        "| method | " + " | ".join(f"noise: {kind} | noise kept" for kind in kinds) + " |",
        "| --- |" + " --: | --: |" * len(kinds),
        f"| base, before | {spread(found['base_nll'])} |" + " |" * (2 * len(kinds) - 1),
    ]
    for label in COMPARED:
        cells = [found["rows"][kind][label] for kind in kinds]
        lines.append(
            f"| {label} | "
            + " | ".join(f"{spread(of(runs, 'nll'))} | {percent(of(runs, 'noise_kept'))}" for runs in cells)
            + " |"
        )
    return "\n".join(lines)


def feedback_table(found: dict) -> str:
    """Held-out loss of either sign, as the difference to `random` at equal rho; where + is safe."""
    lines = [
        "| noise | base | trained | learning rate | `random` | `rel` minus it | `history_excess` minus it |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for label, signs in found["rows"].items():
        noise, base, trained, rate = label.split("|")
        chance = of(signs["random"], "nll")
        differences = [spread([a - b for a, b in zip(of(signs[s], "nll"), chance, strict=True)]) for s in ("+", "-")]
        lines.append(f"| {noise} | {base} | {trained} | {rate} | {spread(chance)} | {' | '.join(differences)} |")
    return "\n".join(lines)


def plot_feedback(found: dict, path: Path) -> None:
    """Loss of kept and of dropped tokens over the steps, both signs, one panel a kind of noise (full, higher rate)."""
    from matplotlib.figure import Figure

    chosen = [label for label in found["rows"] if "|60 steps|full|0.0004" in label]
    figure = Figure(figsize=(3.2 * len(chosen), 3.4), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, chosen, strict=True):
        for sign, color, name in (("+", "tab:red", "REL as published"), ("-", "tab:blue", "REL reversed")):
            for curve, style in (("kept_nll", "-"), ("dropped_nll", "--")):
                runs = [run["curves"][curve] for run in found["rows"][label][sign]]
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("file", nargs="?", type=Path, help="JSONL of prompt/completion or question/answer, for `text`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="width of the model and number of steps, times this")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for quality.STUDY.json")
    options = parser.parse_args(argv)
    _quiet()
    if (options.study == "text") != (options.file is not None):
        parser.error("`text` takes a JSONL file, the other studies make their own data")
    study, table = STUDIES[options.study]
    started = time.perf_counter()
    given = (options.file,) if options.file else ()
    found = study(*given, options.seeds, options.scale)
    found |= {"study": options.study, "seeds": options.seeds, "scale": options.scale}
    found |= {"machine": machine(torch.device("cpu")), "minutes": (time.perf_counter() - started) / 60}
    path = options.output / f"quality.{options.study}.json"
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(table(found))
    print(f"\n{found['minutes']:.1f} minutes; wrote {path}")
    if options.output == RESULTS:
        into_readme(options.study, table(found))
        if options.study == "feedback":
            plot_feedback(found, README.parent / "docs/feedback.png")


if __name__ == "__main__":
    main()
