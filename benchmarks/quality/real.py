"""The study of pretrained models as data, and how its runs are filled in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from benchmarks.quality.real_answers import right_answers
from benchmarks.quality.real_rows import HELD_OUT, KINDS, Sources, make_parts
from benchmarks.quality.real_worlds import REFERENCE, RealWorld, Recipe, base_losses, batched, build_world, measure
from benchmarks.quality.runner import device_used, run_all
from benchmarks.resume import digest, measured
from tokensel.files import replacing
from tokensel.testing import pretrained

FROZEN = {"smollm2": 22, "gemma3": 0}  # of 30 and 18 layers, unless the study is scaled up
PAPER = {"rate": 1e-4, "lora": (64, 16, 0.1)}  # of arXiv 2510.18250
WARMUP_SHARE = 0.2  # of the rows that the released recipe leaves REL out for

# Those that are wanted most come first: a study that is interrupted has them.
RECIPES = {
    "full": Recipe("full", {}),
    "oracle": Recipe("full", {}, drop_noise=True),
    "random": Recipe("random", {}),
    "clean_posterior": Recipe("clean_posterior", {}),
    "clean_posterior, no repeats": Recipe("clean_posterior", {}, drop_repeats=True),
    "sstoken": Recipe("sstoken", {}),
    "history_excess": Recipe("history_excess", {}),
    "rho1, clean reference": Recipe("rho1", {}),
    "min_k_pp": Recipe("min_k_pp", {}),
    "dft": Recipe("dft", {}),
    "random, rho 0.85": Recipe("random", {"rho": 0.85}),
    "min_k_pp, rho 0.85": Recipe("min_k_pp", {"rho": 0.85}),
    "token_cleaning, clean reference": Recipe("token_cleaning", {}),
    "attention": Recipe("attention", {}),
    "rel": Recipe("rel", {}),
    "profit": Recipe("profit", {}),
    "eslm": Recipe("eslm", {}),
    **{
        name: Recipe(name, {})
        for name in ("f_alpha", "deft", "eaft", "infosft", "idft", "rank_tuner", "talr", "stm", "tail_sft")
    },
    "full, the paper's recipe": Recipe("full", {}, **PAPER),
    "random, the paper's recipe": Recipe("random", {}, **PAPER),
    "sstoken, the paper's recipe": Recipe("sstoken", {}, **PAPER),
    "full, all weights": Recipe("full", {}, rate=5e-5, lora=None),
    "random, all weights": Recipe("random", {}, rate=5e-5, lora=None),
    "sstoken, all weights": Recipe("sstoken", {}, rate=5e-5, lora=None),
}
# whose learning curves are drawn; the last is ours
SHOWN = ("full", "random", "oracle", "sstoken", "clean_posterior")


@dataclass(frozen=True)
class RealStudy:
    """What is measured.

    Attributes:
        model: a name that `tokensel.testing.pretrained` knows.
        problems: JSONL of {"question", "answer"}. solutions: JSONL of {"question", "model_answer", "is_correct"}. None
            where no kind needs it.
        work: folder for the model, the worlds and what the model wrote itself; it may be thrown away.
        scale: rows and steps, times this; above 1 all layers are trained.
    """

    model: str
    problems: Path | None
    solutions: Path | None
    work: Path
    scale: int
    seeds: int
    kinds: tuple[str, ...]
    recipes: tuple[str, ...]

    @property
    def frozen(self) -> int:
        return FROZEN[self.model] if self.scale == 1 else 0

    @property
    def answering(self) -> tuple[str, ...]:
        """Whose answers to held-out problems are read: the base's, and after fine-tuning on clean rows."""
        if "clean" not in self.kinds:
            return ()
        return ("base", "full") if self.scale == 1 else tuple(dict.fromkeys(("base", "full", SHOWN[-1])))

    def recipe(self, name: str, kind: str) -> Recipe:
        recipe = RECIPES[name]
        if name == "sstoken, the paper's recipe":
            rows = KINDS[kind].rows * self.scale
            recipe = Recipe("sstoken", {"rel_warmup": round(WARMUP_SHARE * rows)}, **PAPER)
        return recipe


def settings(study: RealStudy) -> dict:
    """What results must have in common to stand in one file; a file of rows that was not given is left open.

    Raises:
        ValueError: a kind needs a file that was not given.
        OSError: a file is not there or cannot be read.
    """
    files = {"problems": study.problems, "solutions": study.solutions}
    needed = {"problems": ("problems", "solutions", "chats"), "solutions": ("solutions",)}
    for name, file in files.items():
        if file is None and (kinds := [kind for kind in study.kinds if KINDS[kind].source in needed[name]]):
            without = [kind for kind, what in KINDS.items() if what.source in ("docs", "own")]
            raise ValueError(
                f"give --{name} FILE, which the kinds {', '.join(kinds)} need; --kinds {','.join(without)} needs none"
            )
    sha256 = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file}
    sizes = {"rows": {kind: what.rows for kind, what in KINDS.items()}, "held_out": HELD_OUT, "frozen": study.frozen}
    return {"study": "real", "model": study.model, "scale": study.scale, "sizes": sizes, **sha256}


def run_real(study: RealStudy, results: dict, save: Callable[[], None]) -> None:
    """Fills in what the results lack, and saves each run as it ends.

    A run by another recipe than today's is run again. Their form: {"rows": {kind: {recipe: [run of each seed]}},
    "bases": {kind: losses before fine-tuning}, "answers": {"base" or recipe: {"right", "of"}}, "machines": [...]}; a
    run's "machine" is its place among these, its "world" the rows that it shares with others.

    Raises:
        ValueError: a file has a row that is of no use, or too few; nothing has been trained then.
        ModuleNotFoundError: the model's package is not installed.
    """
    rows = results.setdefault("rows", {})
    for kind in study.kinds:
        for name in study.recipes:
            of_seeds = rows.setdefault(kind, {}).setdefault(name, [])
            of_seeds += [None] * (study.seeds - len(of_seeds))
    bases, answers = results.setdefault("bases", {}), results.setdefault("answers", {})
    lacking = {
        seed: [
            (name, kind)
            for name in study.recipes
            for kind in study.kinds
            if not _stands(rows[kind][name][seed], study.recipe(name, kind))
        ]
        for seed in range(study.seeds)
    }
    unanswered = [name for name in study.answering if not measured(answers.get(name))]
    needed = dict.fromkeys((kind, seed) for seed, runs in lacking.items() for _, kind in runs)
    needed |= dict.fromkeys([("clean", 0)] if unanswered else [])
    if not needed:
        return
    where = place_of(machine(device_used()), results.setdefault("machines", []))
    folder = pretrained_folder(study)
    sources = make_sources(study, folder)
    arguments = {place: world_arguments(study, *place, sources, folder) for place in needed}
    for seed, runs in lacking.items():
        build = {place: arguments[place] for place in needed if place[1] == seed}
        worlds = {kind: world for (kind, _), world in run_all(build_world, build, f"worlds of seed {seed}")}
        lost = {kind: (base_losses, worlds[kind]) for kind in worlds if not measured(bases.get(kind))}
        for kind, losses in run_all(_in_world, lost, "bases"):
            bases[kind] = losses
            save()
        tasks = {
            (kind, name): (measure, worlds[kind], study.recipe(name, kind), KINDS[kind].batch) for name, kind in runs
        }
        for (kind, name), run in run_all(_in_world, tasks, f"runs of seed {seed}"):
            made_of = {"world": worlds[kind].folder.name} if isinstance(worlds[kind], RealWorld) else {}
            recipe = digest(asdict(study.recipe(name, kind)))
            rows[kind][name][seed] = run | made_of | {"recipe": recipe, "machine": where}
            save()
        if unanswered and seed == 0:
            batch = KINDS["clean"].batch
            how = {name: study.recipe(name, "clean") if name != "base" else None for name in unanswered}
            tasks = {name: (right_answers, worlds["clean"], recipe, batch) for name, recipe in how.items()}
            for name, answered in run_all(_in_world, tasks, "answers"):
                answers[name] = answered | {"machine": where}
                save()


def _stands(run: dict | None, recipe: Recipe) -> bool:
    """Whether a run has ended well, and by this recipe."""
    return measured(run) and run.get("recipe") == digest(asdict(recipe))


def place_of(here: dict, machines: list[dict]) -> int:
    """Its place among the machines of some results, which it joins if it is new."""
    if here not in machines:
        machines.append(here)
    return machines.index(here)


def _in_world(function: Callable[..., dict], world: RealWorld | dict, *arguments: object) -> dict:
    """What the function returns, or why its world failed."""
    return function(world, *arguments) if isinstance(world, RealWorld) else world


def world_arguments(study: RealStudy, kind: str, seed: int, sources: Sources, folder: Path) -> tuple:
    """Arguments of build_world. The folder's name tells the rows, the model and how the clean reference is trained."""
    away = "docs" if KINDS[kind].source not in ("docs", "own") else "problems"
    known = away == "docs" or study.problems
    elsewhere = sources.rows(away)[: HELD_OUT // 2] if known else []
    parts = make_parts(kind, seed, sources, study.scale)
    made_of = [folder.name, study.frozen, seed, vars(parts), elsewhere, asdict(REFERENCE)]
    name = f"{kind}-{seed}-{digest(made_of)}"
    return study.work / "worlds" / name, parts, elsewhere, folder, study.frozen, seed


def pretrained_folder(study: RealStudy) -> Path:
    """The model as a directory."""
    _, tokenizer = pretrained(study.model, study.work)
    return Path(tokenizer.name_or_path)


def make_sources(study: RealStudy, folder: Path) -> Sources:
    def write(questions: list[str]) -> list[str]:
        file = study.work / f"own-{digest([folder.name, questions])}.json"
        if not file.exists():
            answers = own_answers(folder, questions)
            with replacing(file) as whole:
                whole.write_text(json.dumps(answers), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Sources(tokenizer, study.problems, study.solutions, write, study.scale)


@torch.no_grad()
def own_answers(folder: Path, questions: list[str]) -> list[str]:
    """What the model itself says to each question, sampled from its own distribution."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device_used())
    torch.manual_seed(0)
    answers = []
    for taken in batched(questions, 32):
        chats = [[{"role": "user", "content": question}] for question in taken]
        how = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
        batch = tokenizer.apply_chat_template(chats, **how).to(model.device)
        said = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64)
        answers += tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
