"""The study of pretrained models as data, and how its runs are filled in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from benchmarks.quality.real_rows import HELD_OUT, KINDS, Sources, make_parts
from benchmarks.quality.real_worlds import Recipe, base_losses, batched, build_world, measure
from benchmarks.quality.runner import device_used, run_all
from benchmarks.resume import measured
from tokensel.files import replacing
from tokensel.testing import pretrained

FROZEN = {"smollm2": 20, "gemma3": 0}  # of 30 and 18 layers, unless the study is scaled up
PAPER = {"rate": 1e-4, "lora": (64, 16, 0.1)}  # of arXiv 2510.18250
WARMUP_SHARE = 0.2  # of the rows that the released recipe leaves REL out for

RECIPES = {
    "full": Recipe("full", {}),
    "oracle": Recipe("full", {}, drop_noise=True),
    "random": Recipe("random", {}),
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
    "full, the paper's recipe": Recipe("full", {}, **PAPER),
    "random, the paper's recipe": Recipe("random", {}, **PAPER),
    "sstoken, the paper's recipe": Recipe("sstoken", {}, **PAPER),
    "full, all weights": Recipe("full", {}, rate=5e-5, lora=None),
    "random, all weights": Recipe("random", {}, rate=5e-5, lora=None),
    "sstoken, all weights": Recipe("sstoken", {}, rate=5e-5, lora=None),
}


@dataclass(frozen=True)
class RealStudy:
    """What is measured.

    Attributes:
        model: a name that `tokensel.testing.pretrained` knows.
        work: folder for the model, the worlds and what the model wrote itself; it may be thrown away.
        scale: rows and steps, times this; above 1 all layers are trained.
    """

    model: str
    problems: Path
    solutions: Path
    work: Path
    scale: int
    seeds: int
    kinds: tuple[str, ...]
    recipes: tuple[str, ...]

    @property
    def frozen(self) -> int:
        return FROZEN[self.model] if self.scale == 1 else 0

    def recipe(self, name: str, rows: int) -> Recipe:
        recipe = RECIPES[name]
        if name == "sstoken, the paper's recipe":
            recipe = Recipe("sstoken", {"rel_warmup": round(WARMUP_SHARE * rows)}, **PAPER)
        return recipe


def run_real(study: RealStudy, results: dict, save: Callable[[], None]) -> None:
    """Fills results["rows"][kind][recipe], a list over seeds, with the runs that it lacks; saves each as it ends."""
    rows = results.setdefault("rows", {})
    for kind in study.kinds:
        for name in study.recipes:
            of_seeds = rows.setdefault(kind, {}).setdefault(name, [])
            of_seeds += [None] * (study.seeds - len(of_seeds))
    results.setdefault("bases", {})
    here = machine(device_used())
    if here not in results.setdefault("machines", []):
        results["machines"].append(here)
    where = results["machines"].index(here)
    folder = pretrained_folder(study)
    sources = make_sources(study, folder)
    for seed in range(study.seeds):
        waiting = [
            (name, kind) for name in study.recipes for kind in study.kinds if not measured(rows[kind][name][seed])
        ]
        needed = dict.fromkeys(kind for _, kind in waiting)
        worlds = dict(
            run_all(
                build_world,
                {kind: world_arguments(study, kind, seed, sources, folder) for kind in needed},
                f"worlds of seed {seed}",
            )
        )
        bases = {kind: (worlds[kind],) for kind in needed if kind not in results["bases"]}
        results["bases"] |= dict(run_all(base_losses, bases, "bases"))
        tasks = {
            (kind, name): (worlds[kind], study.recipe(name, KINDS[kind].rows * study.scale), KINDS[kind].batch)
            for name, kind in waiting
        }
        for (kind, name), run in run_all(measure, tasks, f"runs of seed {seed}"):
            rows[kind][name][seed] = run | {"machine": where}
            save()


def world_arguments(study: RealStudy, kind: str, seed: int, sources: Sources, folder: Path) -> tuple:
    """Arguments of build_world."""
    away = "docs" if KINDS[kind].source not in ("docs", "own") else "problems"
    elsewhere = sources.rows(away)[: HELD_OUT // 2]
    parts = make_parts(kind, seed, sources, study.scale)
    name = f"{study.model}-{kind}-{seed}-x{study.scale}"
    return study.work / "worlds" / name, parts, elsewhere, folder, study.frozen, seed


def pretrained_folder(study: RealStudy) -> Path:
    """The model as a directory."""
    folder = study.work / study.model
    if not (folder / "config.json").exists():
        model, tokenizer = pretrained(study.model, study.work / "cache")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_sources(study: RealStudy, folder: Path) -> Sources:
    def write(questions: list[str]) -> list[str]:
        if not (file := study.work / f"{study.model}-own.json").exists():
            answers = own_answers(folder, questions)
            with replacing(file) as whole:
                whole.write_text(json.dumps(answers), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    return Sources(AutoTokenizer.from_pretrained(folder), study.problems, study.solutions, write)


@torch.no_grad()
def own_answers(folder: Path, questions: Iterable[str]) -> list[str]:
    """What the model itself says to each question, sampled from its own distribution."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device_used())
    torch.manual_seed(0)
    answers = []
    for taken in batched(list(questions), 32):
        chats = [[{"role": "user", "content": question}] for question in taken]
        how = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
        batch = tokenizer.apply_chat_template(chats, **how).to(model.device)
        said = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64)
        answers += tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
