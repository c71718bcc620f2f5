"""The small worlds that methods are compared in: rows with noise, a base trained on clean ones, recorded losses."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PrinterCallback, set_seed

from tokensel import TokenSignals, apply_to, methods, remove
from tokensel.arguments import SelectiveTrainingArguments
from tokensel.data import SelectionCollator
from tokensel.documents import token_keys
from tokensel.select.signals import RECORDED
from tokensel.store import HistoryStore, HistoryWriter, content_of
from tokensel.testing import (
    PlantedNoiseTrainer,
    held_out_nll,
    make_model,
    make_rows,
    make_tokenizer,
    plant_noise,
)
from tokensel.trainer import SelectiveTrainer

WIDTH = 128  # of the model
STEPS = 100  # of fine-tuning, 16 rows each
SHORT = 60  # of them, in the studies of text and of feedback
RATE = 5e-4
SPLITS = 4  # of token_cleaning_iterative
ROWS = {"base": 960, "noisy": 1600, "clean": 1600, "held_out": 200}


@dataclass(frozen=True)
class World:
    """What the methods of one seed are trained on, in a folder of its own: base/, reference losses, rows."""

    folder: Path
    seed: int
    scale: int = 1  # width, steps and rows to learn from, times this

    @property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder / "base")

    def rows(self, name: str) -> datasets.Dataset:
        return datasets.Dataset.from_json(str(self.folder / f"{name}.jsonl"))

    def save_rows(self, name: str, rows: list[dict]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    def store(self, name: str) -> str:
        return str(self.folder / f"{name}.parquet")


def train(model, tokenizer, rows, *, steps: int, rate: float, seed: int, method="full", where=None, **settings):
    """Fine-tunes with PlantedNoiseTrainer -> the trainer, trained."""
    arguments = SelectiveTrainingArguments(
        output_dir=str(where or tempfile.gettempdir()),
        method=method,
        max_steps=steps,
        learning_rate=rate,
        seed=seed,
        per_device_train_batch_size=16,
        warmup_steps=5,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    collator = SelectionCollator(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"), ("token_weights", "noise"))
    trainer = PlantedNoiseTrainer(
        model, arguments, data_collator=collator, train_dataset=rows, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def with_no_noise(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**r, "noise": r.get("noise", [0] * len(r["labels"]))} for r in rows])


# The worlds


def losses_of(model):
    """nll_of for `record`: the losses of every response token under a model."""
    patched = getattr(model, "_tokensel_patched", None) or apply_to(model.eval())

    def nll_of(batch):
        batch = batch.to(next(model.parameters()).device)
        return patched.token_nll({k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"])

    return nll_of


def build_world(folder: Path, seed: int, *, kind: str, share: float, base_steps: int = 60, scale: int = 1) -> World:
    """Clean and noisy made-up rows, and a base trained on clean ones."""
    folder.mkdir(parents=True)
    world = World(folder, seed, scale)
    # more steps over the same rows would be more epochs; the held-out rows only measure
    sizes = {name: size if name == "held_out" else size * scale for name, size in ROWS.items()}
    made = iter(make_rows(sum(sizes.values()), seed=seed))
    parts = {name: list(itertools.islice(made, size)) for name, size in sizes.items()}
    tokenizer = make_tokenizer(parts["base"])
    for name, rows in parts.items():
        noise = {"kind": kind, "share": share} if name == "noisy" else {"kind": "none", "share": 0}
        rows = plant_noise(rows, tokenizer, seed=seed, **noise)
        if name == "held_out":
            rows = [{k: row[k] for k in ("input_ids", "labels")} for row in rows]
        world.save_rows(name, rows)
    set_seed(seed)
    model = make_model(tokenizer, hidden_size=WIDTH * scale, seed=seed)
    base = train(model, tokenizer, world.rows("base"), steps=base_steps * scale, rate=2e-3, seed=seed)
    base.save_model(str(folder / "base"))
    return world


def further(world: World, name: str, rows: list[dict], steps: int) -> Path:
    """Fine-tunes the base on other rows: the model whose losses a method looks at."""
    base = AutoModelForCausalLM.from_pretrained(world.folder / "base")
    trained = train(base, world.tokenizer, with_no_noise(rows), steps=steps, rate=RATE, seed=world.seed)
    trained.save_model(str(world.folder / name))
    return world.folder / name


@torch.no_grad()
def record(world: World, name: str, nll_of) -> None:
    """Writes the losses of the noisy rows by `nll_of(batch) -> [B, S]` into a store."""
    tokenizer, rows = world.tokenizer, world.rows("noisy")
    collate = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    content = content_of(f"{name}_nll")
    with HistoryWriter(world.store(name), tokenizer=tokenizer, model=name, content=content) as writer:
        for first in range(0, len(rows), 64):
            taken = [rows[i] for i in range(first, min(first + 64, len(rows)))]
            batch = collate([{k: row[k] for k in ("input_ids", "labels")} for row in taken])
            mask = batch["attention_mask"].bool()
            writer.add(batch["input_ids"], batch["labels"], nll_of(batch), key_mask=mask)


def record_everything(world: World) -> None:
    """The losses that any method may ask for: of the base, a clean reference, a model of shuffled pairs, ..."""
    clean = [dict(row) for row in world.rows("clean")]
    order = list(range(len(clean)))
    random.Random(world.seed).shuffle(order)
    prompts = [sum(label == -100 for label in row["labels"]) for row in clean]
    shuffled = [
        {name: clean[i][name][: prompts[i]] + clean[j][name][prompts[j] :] for name in ("input_ids", "labels", "noise")}
        for i, j in enumerate(order)
    ]
    models = {"base": world.folder / "base"}
    models["reference"] = further(world, "reference", clean, STEPS * world.scale)
    models["shuffled"] = further(world, "shuffled", shuffled, STEPS * world.scale)
    loaded = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in models.items()}
    for name, model in loaded.items():
        record(world, name, losses_of(model))
        remove(model)
    record(world, "alone", lambda b: nll_alone(loaded["base"], b))
    record(world, "contrast", lambda b: contrast_nll(loaded["reference"], loaded["base"], b))


def nll_alone(model, batch) -> torch.Tensor:
    """Losses of the responses without their prompts: behind the first token alone. [B, S]"""
    nll = torch.zeros(batch["labels"].shape)
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        response = labels != -100
        alone = torch.cat([ids[:1], ids[response]])[None]
        logits = model(input_ids=alone).logits[0, :-1].float()
        nll[row, response] = torch.nn.functional.cross_entropy(logits, alone[0, 1:], reduction="none")
    return nll


def contrast_nll(positive, negative, batch) -> torch.Tensor:
    """-log softmax(2 z_positive - z_negative) at each token, from the logits of two small models. [B, S]"""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = 2 * positive(**inputs).logits - negative(**inputs).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return torch.nn.functional.pad(nll, (1, 0))


# One method on one world


def base_nll(world: World) -> float:
    """Held-out loss of the base, before fine-tuning."""
    model = AutoModelForCausalLM.from_pretrained(world.folder / "base")
    nothing = SelectiveTrainingArguments(output_dir=str(world.folder), method="full", report_to="none")
    trainer = SelectiveTrainer(model, nothing, processing_class=world.tokenizer)
    return held_out_nll(trainer, world.rows("held_out"))


def fine_tune(
    world: World,
    name: str,
    parameters: dict,
    steps=STEPS,
    rate=RATE,
    lora=False,
    curves: Sequence[str] = (),
    **settings,
) -> dict:
    """Trains the base on the noisy rows by a method -> held-out loss, what was kept, tokens/s; logged values that are
    asked for in `curves`, as [step, value] pairs."""
    tokenizer, rows = world.tokenizer, world.rows("noisy")
    model = AutoModelForCausalLM.from_pretrained(world.folder / "base")
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(world.seed)
        model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"))
    columns = [n.removesuffix("_nll") for n in RECORDED if Path(world.store(n.removesuffix("_nll"))).exists()]
    settings |= {
        "history": "recorded",
        "history_store": world.store("base"),
        "recorded": {column: world.store(column) for column in columns},
    }
    method = methods.get(name, **parameters)
    stages = [(rows, steps)]
    if name == "token_cleaning_iterative":
        size = len(rows) // SPLITS
        stages = [(rows.select(range(i * size, (i + 1) * size)), steps // SPLITS) for i in range(SPLITS)]
    trainers: list[PlantedNoiseTrainer] = []
    for own, own_steps in stages:
        how = {"method": name, "method_args": parameters}
        if len(stages) > 1 and not trainers:
            how = {"method": "full"}
        elif method.scope == "dataset":
            if trainers:  # the model that came out of the split before is the reference
                record(world, "stage", losses_of(model.eval()))
            own = chosen_rows(world, method, own, reference="stage" if trainers else "reference")
            how = {"method": "weighted"}
        if trainers:
            remove(model)
        trainers.append(train(model, tokenizer, own, steps=own_steps, rate=rate, seed=world.seed, **settings, **how))
    planted, kept, dropped = (sum(getattr(t, n) for t in trainers) for n in ("planted", "noise_kept", "dropped"))
    totals = [t.selection_totals() for t in trainers]
    history = trainers[-1].state.log_history
    result = {
        "nll": held_out_nll(trainers[-1], world.rows("held_out")),
        "noise_kept": kept / planted if planted else None,
        "precision": (planted - kept) / dropped if dropped else None,
        "kept_share": 1 - dropped / sum(t["responses"] for t in totals),
        "tokens_per_second": sum(t["tokens_per_second"] for t in totals) / len(totals),
    }
    if curves:
        result["curves"] = {name: [[e["step"], e[name]] for e in history if name in e] for name in curves}
    return result


def chosen_rows(world: World, method, rows: datasets.Dataset, reference: str) -> datasets.Dataset:
    """Rows with the weights that a method gives their tokens, ranked over all of them: what `tokensel select` does."""
    collate = DataCollatorForSeq2Seq(world.tokenizer, return_tensors="pt")
    batch = collate([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    mask = batch["attention_mask"].bool()
    response = (batch["labels"] != -100) & mask
    sample = torch.arange(len(rows))[:, None].expand(mask.shape) * mask.shape[1]
    losses = {}
    for need in method.needs & RECORDED.keys():
        column = reference if need == "reference_nll" else need.removesuffix("_nll")
        store = HistoryStore.open(world.store(column), content=content_of(need))
        losses[need] = store.lookup(batch["input_ids"], batch["labels"], key_mask=mask)
    signals = TokenSignals(response, sample, key=token_keys(batch["input_ids"], None, mask), **losses)
    weights = method(signals)
    return rows.add_column("token_weights", [w[m].tolist() for w, m in zip(weights, mask, strict=True)])
