"""Exact match: how many of a model's own answers to held-out problems end in the right number."""

from __future__ import annotations

import re

import torch
from torch import nn

import tokensel
from benchmarks.quality.real_worlds import RealWorld, Recipe, batched, restore_below, train
from tokensel.documents import IGNORE_INDEX

LONGEST_ANSWER = 160  # new tokens
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def right_answers(world: RealWorld, recipe: Recipe | None, batch: int) -> dict:
    """Of the held-out problems how many are answered right, before (None) or after fine-tuning: {"right", "of"}."""
    patched = train(world, recipe, batch)[0] if recipe else tokensel.apply_to(world.load())
    model, rows = restore_below(patched.model), world.rows("held_out")
    said = answers(model, rows, world.tokenizer)
    right = sum(
        final_number(text) is not None and final_number(text) == final_number(row["answer"])
        for text, row in zip(said, rows, strict=True)
    )
    return {"right": right, "of": len(rows)}


@torch.no_grad()
def answers(model: nn.Module, rows: list[dict], tokenizer, longest: int = LONGEST_ANSWER) -> list[str]:
    """What the model says behind each row's prompt, by greedy decoding."""
    model.eval()
    tokenizer.padding_side = "left"
    said = []
    for taken in batched(rows, 40):
        prompts = [{"input_ids": prompt(row)} for row in taken]
        inputs = tokenizer.pad(prompts, return_tensors="pt").to(model.device)
        whole = model.generate(
            **inputs, do_sample=False, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id, use_cache=True
        )
        said += tokenizer.batch_decode(whole[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def prompt(row: dict) -> list[int]:
    """The token ids before the first that is labelled."""
    return row["input_ids"][: next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)]


def final_number(text: str) -> float | None:
    """The first number behind the last ####, or else the last number of all."""
    _, marked, behind = text.rpartition("####")
    numbers = NUMBER.findall(behind)
    return float(numbers[0 if marked else -1].replace(",", "")) if numbers else None
