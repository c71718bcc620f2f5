"""A pretrained model and rows with noise: what the methods of one seed are trained on, and one training of it.

Only the upper layers are trained, so that two cores can hold the study: what the frozen lower ones make of a row is
computed once and kept.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import tokensel
from benchmarks.quality.real_rows import Parts
from benchmarks.quality.runner import device_used
from tokensel import Selection, TokenSignals, methods
from tokensel.data import SelectionCollator, weights_without_repeats
from tokensel.documents import IGNORE_INDEX
from tokensel.files import making_folder, replacing
from tokensel.model import PatchedModel, eval_mode, unwrap

COLUMNS = ("noise", "token_weights", "history_nll", "base_nll", "reference_nll")
WARMUP = 3  # steps of the learning rate


class FrozenBelow(nn.Module):
    """The embedding and the lower layers of a causal model, in place of its embedding; each row passes them once.

    A causal model's states of a row are those of any row that goes on after it, so padding on the right is cut off.

    Attributes:
        known: token ids of a row -> its states [length, D].
    """

    def __init__(self, lower: nn.Module, pad: int) -> None:
        super().__init__()
        self._lower = (lower,)  # no submodule: neither trained, nor given adapters
        self.weight = lower.embed_tokens.weight
        self.pad = pad
        self.known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:  # (B, S) -> (B, S, D)
        rows = [self._without_padding(row) for row in input_ids.tolist()]
        if new := [row for row in dict.fromkeys(rows) if row not in self.known]:
            length = max(map(len, new))
            padded = torch.tensor([[*row, *[self.pad] * (length - len(row))] for row in new], device=input_ids.device)
            states = self._lower[0](input_ids=padded, use_cache=False).last_hidden_state
            self.known |= {row: state[: len(row)].clone() for row, state in zip(new, states, strict=True)}
        states = [self.known[row].to(input_ids.device) for row in rows]
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)  # (B, at most S, D)
        return nn.functional.pad(padded, (0, 0, 0, input_ids.shape[1] - padded.shape[1]))

    def _without_padding(self, row: list[int]) -> tuple[int, ...]:
        """Of a run of pad tokens at the end one stays: it may be the row's own end."""
        length = len(row)
        while length > 1 and row[length - 1] == row[length - 2] == self.pad:
            length -= 1
        return tuple(row[:length])

    def save(self, path: Path) -> None:
        save_file({json.dumps(row): state for row, state in self.known.items()}, path)

    def load(self, path: Path) -> None:
        self.known |= {tuple(json.loads(row)): state for row, state in load_file(path).items()}


def freeze_below(model: nn.Module, layers: int, pad: int) -> FrozenBelow:
    """Freezes a Llama's embedding and first layers, and puts FrozenBelow where its embedding was."""
    base = model.model
    lower = copy.copy(base)
    lower._modules = {**base._modules, "layers": base.layers[:layers], "norm": nn.Identity()}
    lower.requires_grad_(False)
    base.layers = base.layers[layers:]
    base.embed_tokens = FrozenBelow(lower, pad)
    return base.embed_tokens


def restore_below(model: nn.Module) -> nn.Module:
    """The whole model, without adapters' wrapper or tokensel's patch: as it generates, with what was trained."""
    tokensel.remove(model)
    model = unwrap(model)
    base = model.model
    if isinstance(base.embed_tokens, FrozenBelow):
        (lower,) = base.embed_tokens._lower
        base.layers = nn.ModuleList([*lower.layers, *base.layers])
        base.embed_tokens = lower.embed_tokens
    return model


@dataclass(frozen=True)
class RealWorld:
    """A folder with the rows of a kind and a seed, their recorded losses, and what the frozen layers make of them.

    Attributes:
        model: folder of the pretrained model.
        frozen: how many layers are.
    """

    folder: Path
    model: Path
    frozen: int
    seed: int

    @property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.model)

    def rows(self, name: str) -> list[dict]:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def load(self) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).to(device_used())
        if self.frozen:
            below = freeze_below(model, self.frozen, self.tokenizer.pad_token_id)
            for states in sorted(self.folder.glob("*.safetensors")):
                below.load(states)
        return model


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        parameters: of the method.
        lora: rank, alpha and dropout of adapters on all linear layers; None = all weights of the layers.
        drop_noise: leave out exactly what is noise.
        drop_repeats: leave out the spans that many rows share, by `tokensel.data.weights_without_repeats`.
    """

    method: str
    parameters: dict
    rate: float = 4e-3
    lora: tuple[int, int, float] | None = (16, 32, 0.0)
    epochs: int = 1
    drop_noise: bool = False
    drop_repeats: bool = False


REFERENCE = Recipe("full", {})  # on the clean rows of `Parts.reference`, four a step


def build_world(folder: Path, parts: Parts, elsewhere: list[dict], model: Path, frozen: int, seed: int) -> RealWorld:
    """A world, made if its folder is not there: a folder is whole or not there.

    Args:
        elsewhere: clean rows of another kind, on which forgetting is measured; [] = it is not.
    """
    if not folder.exists():
        with making_folder(folder) as unfinished:
            _write_world(RealWorld(unfinished, model, frozen, seed), parts, elsewhere)
    return RealWorld(folder, model, frozen, seed)


def _write_world(world: RealWorld, parts: Parts, elsewhere: list[dict]) -> None:
    folder = world.folder
    rows = {"reference": parts.reference, "held_out": parts.held_out, "elsewhere": elsewhere}
    for name, of_part in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(of_part), encoding="utf-8")
    base = world.load()
    patched = tokensel.apply_to(base)
    base_nll = row_losses(patched, parts.train, world.tokenizer)
    for name in ("held_out", "elsewhere"):
        row_losses(patched, rows[name], world.tokenizer)  # their states are known from now on
    if world.frozen:
        base.model.embed_tokens.save(folder / "states.safetensors")
    train_rows = [row | {"base_nll": nll, "history_nll": nll} for row, nll in zip(parts.train, base_nll, strict=True)]
    (folder / "train.json").write_text(json.dumps(train_rows), encoding="utf-8")


def with_reference(world: RealWorld, rows: list[dict]) -> list[dict]:
    """The world's rows to train on, with the losses of a model that has learnt the clean ones; trained when asked for.

    Few recipes look at it, and it takes as long as one of them.
    """
    file = world.folder / "reference_nll.json"
    if not file.exists():
        clean = [{"noise": [0] * len(row["labels"])} | row for row in world.rows("reference")]
        reference, _ = train(world, REFERENCE, batch=4, rows=clean)
        with replacing(file) as whole:
            whole.write_text(json.dumps(row_losses(reference, rows, world.tokenizer)), encoding="utf-8")
    losses = json.loads(file.read_text(encoding="utf-8"))
    return [row | {"reference_nll": nll} for row, nll in zip(rows, losses, strict=True)]


@torch.no_grad()
def row_losses(patched: PatchedModel, rows: list[dict], tokenizer) -> list[list[float]]:
    """The negative log-likelihood of each token of each row, nats, 0 where it is no response."""
    model, losses = patched.model, []
    collate = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    with eval_mode(model):
        for taken in batched(rows, 16):
            batch = collate([{name: row[name] for name in ("input_ids", "labels")} for row in taken]).to(model.device)
            labels = batch.pop("labels")
            nll = patched.token_nll(dict(batch), labels).tolist()
            losses += [values[: len(row["labels"])] for values, row in zip(nll, taken, strict=True)]
    return losses


def mean_loss(patched: PatchedModel, rows: list[dict], tokenizer) -> float | None:
    """Over the response tokens of the rows, nats; None without rows."""
    if not rows:
        return None
    count = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    return sum(map(sum, row_losses(patched, rows, tokenizer))) / count


def batched(rows: list, size: int) -> list[list]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def train(world: RealWorld, recipe: Recipe, batch: int, rows: list[dict] | None = None) -> tuple[PatchedModel, dict]:
    """`training_steps` to the end -> the model, and what was seen on the way."""
    seen = {"responses": 0, "noise": 0.0, "kept": 0.0, "noise_kept": 0.0}
    curve = []
    for patched, step, last, counted in training_steps(world, recipe, batch, rows):
        seen = {name: value + float(more) for (name, value), more in zip(seen.items(), counted, strict=True)}
        if step in {last // 4, last // 2, last}:
            curve.append([int(seen["responses"]), mean_loss(patched, world.rows("held_out"), world.tokenizer)])
    return patched, {"curve": curve, "nll": curve[-1][1], **seen}


def training_steps(
    world: RealWorld, recipe: Recipe, batch: int, rows: list[dict] | None = None
) -> Iterator[tuple[PatchedModel, int, int, tuple[Tensor, ...]]]:
    """Trains the pretrained model on the world's rows, and stops after each optimizer step for whoever looks at it.

    The rows of every step are the same for all methods. The learning rate falls linearly to 0.

    Args:
        rows: to train on in place of the world's.

    Yields:
        The model, the steps done, the steps that there are, and of this step's tokens: how many are response, how many
        of these noise, the weight kept of all and of the noise.
    """
    tokenizer, method = world.tokenizer, methods.get(recipe.method, **recipe.parameters)
    if rows is None:
        rows = world.rows("train")
        rows = with_reference(world, rows) if "reference_nll" in method.needs else rows
    torch.manual_seed(world.seed)
    model = world.load()
    if recipe.lora:
        from peft import LoraConfig, get_peft_model

        r, alpha, dropout = recipe.lora
        how = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear")
        model = get_peft_model(model, how)
    else:
        model.lm_head.requires_grad_(False)
    patched = tokensel.apply_to(model.train())
    if recipe.drop_noise:
        rows = [row | {"token_weights": _of_clean(row)} for row in rows]
    if recipe.drop_repeats:
        rows = [row | {"token_weights": w} for row, w in zip(rows, weights_without_repeats(rows), strict=True)]
    if method.scope == "dataset":
        rows, method = chosen_over_all(rows, method), methods.get("weighted")
    order = random.Random(world.seed)
    steps = [taken for _ in range(recipe.epochs) for taken in batched(order.sample(rows, len(rows)), batch)]
    collate = SelectionCollator(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"), COLUMNS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
    rate = lambda step: min(1, (step + 1) / WARMUP) * (1 - step / len(steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    selection = Selection(method)
    for step, taken in enumerate(steps):
        inputs = collate([{k: row[k] for k in ("input_ids", "labels", *COLUMNS) if k in row} for row in taken])
        inputs = inputs.to(model.device)
        noise = inputs.pop("noise").bool()
        output = model(**inputs, selection=selection)
        output.loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        selection.step()
        weights, noise = output.weights.float(), noise & output.response
        counted = (output.response.sum(), noise.sum(), weights.sum(), weights[noise].sum())
        yield patched, step + 1, len(steps), counted


def _of_clean(row: dict) -> list[float]:
    """1 on response tokens that are no noise; a prompt token with a weight would be trained, too."""
    pairs = zip(row["labels"], row["noise"], strict=True)
    return [float(label != IGNORE_INDEX and not noise) for label, noise in pairs]


def measure(world: RealWorld, recipe: Recipe, batch: int) -> dict:
    """A training -> held-out loss and its curve, loss elsewhere, shares of clean tokens and of noise that were kept."""
    patched, result = train(world, recipe, batch)
    noise, kept, noise_kept = (result.pop(name) for name in ("noise", "kept", "noise_kept"))
    responses = result.pop("responses")
    return result | {
        "elsewhere": mean_loss(patched, world.rows("elsewhere"), world.tokenizer),
        "kept": kept / responses,
        "clean_kept": (kept - noise_kept) / (responses - noise),
        "noise_kept": noise_kept / noise if noise else None,
    }


def base_losses(world: RealWorld) -> dict:
    """Before fine-tuning."""
    patched = tokensel.apply_to(world.load())
    return {name: mean_loss(patched, world.rows(name), world.tokenizer) for name in ("held_out", "elsewhere")}


def chosen_over_all(rows: list[dict], method) -> list[dict]:
    """Rows with the weights that a method gives their tokens, ranked over all of them."""
    sizes = [len(row["labels"]) for row in rows]
    columns = {"labels", *method.needs}  # a row may hold other things than one number a token
    flat = {name: torch.tensor(list(itertools.chain.from_iterable(row[name] for row in rows))) for name in columns}
    sample = torch.arange(len(rows)).repeat_interleave(torch.tensor(sizes))
    response = flat["labels"] != IGNORE_INDEX
    response &= torch.cat([torch.arange(size) for size in sizes]) > 0
    losses = {name: flat[name] for name in method.needs}
    weights = method(TokenSignals(response, sample, **losses)).split(sizes)
    return [row | {"token_weights": given.tolist()} for row, given in zip(rows, weights, strict=True)]
