"""The three studies as data: which worlds, and which runs in each of them.

What a seed varies: in `planted` and `feedback` everything (rows, tokenizer, base, noise, order, the first weights of
adapters). In `text` base, reference, tokenizer and held-out rows are one for all seeds; which rows of the other half
are taken, their noise and their order vary. So its ± says nothing of other bases.
"""

from __future__ import annotations

import inspect
import itertools
import random
from pathlib import Path

from transformers import AutoModelForCausalLM, set_seed

from benchmarks.quality.runner import Run, Study
from benchmarks.quality.text_rows import LENGTH, TEXT_ROWS
from benchmarks.quality.worlds import (
    SHORT,
    STEPS,
    WIDTH,
    World,
    base_nll,
    build_world,
    further,
    losses_of,
    record,
    record_everything,
    train,
    with_no_noise,
)
from tokensel import methods
from tokensel.testing import make_model, plant_noise

# `planted`: every method with its defaults, those that keep a share at each of these, and what goes beyond the papers:
# label -> (method, parameters, trainer's settings)
RHOS = (0.4, 0.6, 0.8)
VARIANTS = {
    "sstoken, rel_sign -1": ("sstoken", {"rel_sign": -1}, {}),
    "sstoken, rel_floor 1": ("sstoken", {"rel_floor": 1.0}, {}),
    "sstoken, debias": ("sstoken", {"debias": "uniform"}, {}),
    "sstoken, rel_sign -1, debias": ("sstoken", {"rel_sign": -1, "debias": "uniform"}, {}),
    "history_excess, rho 0.3 to 0.9": ("history_excess", {"rho_min": 0.3, "rho_max": 0.9}, {}),
    "history_excess, whole batch": ("history_excess", {"scope": "batch"}, {}),
    "sstoken, first token no prompt": ("sstoken", {}, {"sink": 1}),
    "sstoken, all three layers": ("sstoken", {}, {"layer": [0, 1, 2]}),
}

# `text`: label -> (method, parameters); kind of noise -> its share; rate
COMPARED = {
    "full": ("full", {}),
    "random": ("random", {}),
    "rel": ("rel", {}),
    "history_excess": ("history_excess", {}),
    "sstoken": ("sstoken", {}),
    "sstoken, rel_sign -1": ("sstoken", {"rel_sign": -1}),
    "rho1, clean reference": ("rho1", {}),
}
TEXT_KINDS = {"random": 0.5, "boilerplate": 0.7, "none": 0.0}
TEXT_BASE_STEPS = 800
TEXT_RATE = 2e-4

# `feedback`: sign of REL × learning rate × LoRA or full × strength of the base × kind of noise
SIGNS = {"random": "random", "+": "rel", "-": "history_excess"}
FEEDBACK_KINDS = {"none": 0.0, "random": 0.5, "boilerplate": 0.7, "swapped": 0.4}
FEEDBACK_BASES = (60, 400)  # steps
SLOWEST = {"full": 1e-4, "LoRA": 5e-4}  # and four times as fast


def planted(scale: int) -> Study:
    """Every method on planted noise; the memory of each."""
    rows = {
        label: {"runs": Run(("mixed",), method, parameters, STEPS * scale, settings=settings)}
        for label, (method, parameters, settings) in planted_cases(scale).items()
    }
    return Study(scale, _planted_world, {("mixed",): ()}, rows, bases=True, memory=True)


def planted_cases(scale: int) -> dict[str, tuple[str, dict, dict]]:
    """label -> (method, parameters, trainer's settings)."""
    cases = {name: (name, {}, {}) for name in methods.names()}
    cases["forgetting"] = ("forgetting", {"lambda_steps": STEPS * scale}, {})
    defaults = {name: inspect.signature(methods.builder(name)).parameters.get("rho") for name in cases}
    for rho, (name, default) in itertools.product(RHOS, defaults.items()):
        if default is not None and default.default != rho:
            cases[f"{name}, rho {rho}"] = (name, cases[name][1] | {"rho": rho}, {})
    return cases | VARIANTS


def _planted_world(folder: Path, seed: int, scale: int) -> World:
    world = build_world(folder, seed, kind="mixed", share=0.5, scale=scale)
    record_everything(world)
    return world


def text(scale: int, parts: dict) -> Study:
    """Real text: a base trained on one half, fine-tuned on the other with corrupted responses.

    parts: of `benchmarks.quality.text_rows.text_parts`.
    """
    tokenizer, steps = parts["tokenizer"], SHORT * scale

    def begin(root: Path) -> dict:
        set_seed(0)
        shared = World(root, 0, scale)
        model = make_model(tokenizer, hidden_size=WIDTH * scale, seed=0)
        rows = with_no_noise(parts["base"])
        base = train(model, tokenizer, rows, steps=TEXT_BASE_STEPS * scale, rate=2e-3, seed=0)
        base.save_model(str(root / "base"))
        shared.save_rows("held_out", parts["held_out"])
        nll = base_nll(shared)
        further(shared, "reference", parts["clean"], steps)  # on clean rows that nothing else sees
        return {"base_nll": [nll]}

    worlds = {(kind,): (kind, share, parts["later"]) for kind, share in TEXT_KINDS.items()}
    rows = {
        kind: {
            label: Run((kind,), method, parameters, steps, TEXT_RATE)
            for label, (method, parameters) in COMPARED.items()
        }
        for kind in TEXT_KINDS
    }
    return Study(scale, _text_world, worlds, rows, begin)


def _text_world(folder: Path, seed: int, scale: int, kind: str, share: float, rows: list[dict]) -> World:
    """Rows of the text with noise, and the base's and a clean reference's losses on them."""
    world, shared = World(folder, seed, scale), folder.parent
    folder.mkdir()
    (folder / "base").symlink_to(shared / "base")
    taken = random.Random(seed).sample(rows, TEXT_ROWS["noisy"] * scale)
    noisy = plant_noise(taken, world.tokenizer, kind=kind, share=share, seed=seed)
    world.save_rows("noisy", [{name: values[:LENGTH] for name, values in row.items()} for row in noisy])
    (folder / "held_out.jsonl").symlink_to(shared / "held_out.jsonl")
    for column in ("base", "reference"):
        record(world, column, losses_of(AutoModelForCausalLM.from_pretrained(shared / column)))
    return world


def feedback(scale: int) -> Study:
    """When the published sign of REL feeds on itself."""
    worlds = {
        (kind, steps): (kind, share, steps)
        for (kind, share), steps in itertools.product(FEEDBACK_KINDS.items(), FEEDBACK_BASES)
    }
    rows = {}
    for (kind, base), trained, times in itertools.product(worlds, SLOWEST, (1, 4)):
        rate = times * SLOWEST[trained]
        plotted = (base, trained, times) == (FEEDBACK_BASES[0], "full", 4)
        rows[f"{kind}|{base * scale} steps|{trained}|{rate:g}"] = {
            sign: Run(
                (kind, base),
                method,
                {},
                SHORT * scale,
                rate,
                lora=trained == "LoRA",
                curves=("kept_nll", "dropped_nll") if plotted and sign != "random" else (),
            )
            for sign, method in SIGNS.items()
        }
    return Study(scale, _feedback_world, worlds, rows)


def _feedback_world(folder: Path, seed: int, scale: int, kind: str, share: float, base_steps: int) -> World:
    world = build_world(folder, seed, kind=kind, share=share, base_steps=base_steps, scale=scale)
    record(world, "base", losses_of(AutoModelForCausalLM.from_pretrained(world.folder / "base")))
    return world
