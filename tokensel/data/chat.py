"""Chats -> token ids and labels, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tokensel.data.rows import RowError
from tokensel.documents import IGNORE_INDEX


class Encoded(NamedTuple):
    """One document that a row gives, of its full length: three lists of one length."""

    ids: list[int]
    labels: list[int]  # -100 where a token is not a response
    weights: Sequence[float | None]  # None where the row gives none


def is_finite(value: Any) -> bool:
    """Whether a value is a number that float32 holds."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= torch.finfo(torch.float32).max


def checked_weight(value: Any, index: int, name: str) -> float:
    if value is not None and not is_finite(value):
        raise RowError(index, f"{name} must be a finite number, by which losses are multiplied; got {value!r}")
    return 1.0 if value is None else value


def describe(value: object) -> str:
    return "None" if value is None else type(value).__name__


def encode_chat(
    index: int,
    messages: Any,
    tokenizer,
    *,
    tools: Any = None,
    template_kwargs: dict | None = None,
    prompt_messages: int = 0,
    turns: str = "last",
) -> list[Encoded]:
    from jinja2 import TemplateError

    if not isinstance(messages, list) or not messages:
        raise RowError(index, f"messages must be a list of {{role, content}}; got {describe(messages)}")
    for i, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                value = message.get(field) if isinstance(message, dict) else message
                raise RowError(index, f"messages[{i}].{field} must be a string; got {describe(value)}")
        weight = checked_weight(message.get("weight"), index, f"messages[{i}].weight")
        if message["role"] != "assistant" and message.get("weight") is not None and weight != 0:
            raise RowError(
                index,
                f"messages[{i}].weight is {weight}, but the message is the {message['role']}'s, and assistants' are "
                "trained; leave it out (prompt_weight weighs all prompt tokens)",
            )
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat_template, which `messages` need; set tokenizer.chat_template")
    if not tokenizer.is_fast:
        raise ValueError("`messages` need a fast tokenizer, which tells where in the text each token is")
    # Arrow fills in every key that any message has, and templates ask whether a key is there: only these two.
    turns_ = [{"role": message["role"], "content": message["content"]} for message in messages]

    def render(count: int, **options) -> str:
        try:
            return tokenizer.apply_chat_template(turns_[:count], tokenize=False, **options)
        except TemplateError as error:
            raise RowError(index, f"the chat template refuses messages[:{count}]: {error}") from error

    text = render(len(turns_))
    spans = []  # (begin, end, weight) of characters, each an assistant's part
    for i, turn in enumerate(turns_):
        if turn["role"] == "assistant" and i >= prompt_messages:
            before = render(i, add_generation_prompt=True) if i else ""
            after = render(i + 1)
            if not (after.startswith(before) and text.startswith(after)):
                raise RowError(
                    index,
                    f"the chat template renders messages[:{i + 1}] differently inside the whole "
                    "conversation, so the assistant's part cannot be told apart. Use a template that only "
                    "appends, or split the conversation into rows that end with each answer",
                )
            spans.append((len(before), len(after), messages[i].get("weight")))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    labels = [IGNORE_INDEX] * len(ids)
    weights: list[float | None] = [None] * len(ids)
    for begin, end, weight in spans:
        for t, start in enumerate(starts):
            if begin <= start < end:
                labels[t], weights[t] = ids[t], weight
    return [Encoded(ids, labels, weights)]
