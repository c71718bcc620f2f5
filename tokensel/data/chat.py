"""Chats -> token ids and labels, through the tokenizer's chat template.

Response tokens are what the template marks with `{% generation %}`. A template without marks is asked by rendering: an
answer reaches from its generation prompt to its end-of-turn token.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from tokensel.data.rows import RowError
from tokensel.documents import IGNORE_INDEX

TURNS = ("last", "each")
_STRANGE = "\ue000\ue001\ue002"  # text that no template writes by itself
_NO_CONTENT = {"role", "content", "name", "weight"}  # keys beside which a message still says nothing


class Encoded(NamedTuple):
    """One document that a row gives, of its full length: three lists of one length."""

    ids: list[int]
    labels: list[int]  # -100 where a token is not a response
    weights: Sequence[float | None]  # None where the row gives none
    untrained: int = 0  # answers that no document of the chat trains: the template rewrites them or refuses them alone


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
    chat_template: str | None = None,
) -> list[Encoded]:
    """The documents of a chat: one, or under `turns="each"` one an answer where the template rewrites answers.

    Args:
        index: the row's number, for errors.
        messages: [{role, content, ...}, ...]; all keys but `weight` reach the template, without those that are None.
        tokenizer: a fast one with a chat template.
        tools: list of JSON schemas, or a JSON string of one.
        template_kwargs: what else the template reads (`enable_thinking`, `date_string`, ...).
        prompt_messages: how many messages at the start are prompt, answers among them, too.
        turns: where the template renders an earlier answer otherwise than it was given (without its reasoning, say),
            "last" trains the last answer alone, "each" makes of each answer a document that ends with it.
        chat_template: another than the tokenizer's.
    Raises:
        RowError: messages or tools of another form, or a template that refuses them.
        ValueError: a tokenizer without a template, or a slow one.
    """
    messages = checked_messages(index, messages)
    chat = TemplatedChat(index, messages, tokenizer, checked_tools(index, tools), template_kwargs, chat_template)
    answers = [i for i in range(prompt_messages, len(messages)) if messages[i]["role"] == "assistant"]
    whole = chat.encode(len(messages), answers)
    if whole is not None:
        return [whole]
    documents = [chat.encode_last(i) for i in answers[:-1] if chat.takes(i + 1)] if turns == "each" else []
    documents.append(chat.encode_last(answers[-1])._replace(untrained=len(answers) - 1 - len(documents)))
    return documents


def checked_messages(index: int, messages: Any) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise RowError(index, f"messages must be a list of {{role, content}}; got {describe(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            value = message.get("role") if isinstance(message, dict) else message
            raise RowError(index, f"messages[{i}].role must be a string; got {describe(value)}")
        role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
        says = role == "assistant" and any(value for key, value in message.items() if key not in _NO_CONTENT)
        parts = isinstance(content, list) and content and all(isinstance(part, dict) for part in content)
        if not (isinstance(content, str) or parts or content is None and says):
            got = describe(content)
            raise RowError(index, f"messages[{i}].content must be a string; got {got} (a list of parts may do, too)")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise RowError(index, f"messages[{i}].tool_calls must be a list of mappings; got {describe(calls)}")
        weight = checked_weight(message.get("weight"), index, f"messages[{i}].weight")
        if role != "assistant" and message.get("weight") is not None and weight != 0:
            raise RowError(
                index,
                f"messages[{i}].weight is {weight}, but the message is the {role}'s, and assistants' are "
                "trained; leave it out (prompt_weight weighs all prompt tokens)",
            )
    # Arrow fills in every key that any message has, and templates ask whether a key is there.
    given = _without_none(messages)
    return [{key: value for key, value in message.items() if (key, value) != ("tool_calls", [])} for message in given]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _strange(value: Any) -> Any:
    """A message with other words: those of its content, reasoning and calls."""
    if isinstance(value, dict):
        kept = {"role", "type", "id", "name"} if "role" in value else {"type", "id"}
        return {key: inner if key in kept else _strange(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strange(inner) for inner in value]
    return _STRANGE if isinstance(value, str) else value


def checked_tools(index: int, tools: Any) -> list[dict] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(index, f"tools must be a list of JSON schemas, or that as JSON; {error}") from error
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        kinds = f"a list of {', '.join(sorted(map(describe, tools)))}" if isinstance(tools, list) else describe(tools)
        raise RowError(index, f"tools must be a list of JSON schemas, or that as JSON; got {kinds}")
    return _without_none(tools) or None  # some templates introduce tools that are not there


class TemplatedChat:
    """A chat and its template."""

    def __init__(self, index: int, messages: list[dict], tokenizer, tools, template_kwargs, chat_template):
        if not (chat_template or tokenizer.chat_template):
            raise ValueError(
                "the tokenizer has no chat_template, which `messages` need; set tokenizer.chat_template, or "
                "--chat_template FILE"
            )
        if not tokenizer.is_fast:
            raise ValueError("`messages` need a fast tokenizer, which tells where in the text each token is")
        if not isinstance(template_kwargs, (Mapping, type(None))):
            raise RowError(index, f"chat_template_kwargs must be a mapping; got {describe(template_kwargs)}")
        self.index, self.tokenizer = index, tokenizer
        self.template: str = tokenizer.get_chat_template(chat_template, tools)
        self.options = {**_without_none(dict(template_kwargs or {})), "chat_template": self.template, "tools": tools}
        self.forms = _content_forms(tokenizer, self.template)
        self.weights = [message.pop("weight", None) for message in messages]
        self.messages = [self._as_taken(i, message) for i, message in enumerate(messages)]
        self._texts: dict[tuple[int, bool], str | None] = {}

    def _as_taken(self, i: int, message: dict) -> dict:
        """The message with its content in a form that the template takes: a string or a list of parts."""
        content = message.get("content")
        if isinstance(content, str) and self.forms == ("parts",):
            return {**message, "content": _parts(content)}
        if isinstance(content, list) and self.forms == ("string",):
            raise RowError(
                self.index,
                f"messages[{i}].content is a list of parts, which the chat template does not take; give a string",
            )
        return message

    def apply(self, messages: list[dict], **options) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **self.options, **options)
        except Exception as error:  # a template is foreign code, which may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise RowError(self.index, f"the chat template refuses messages[:{len(messages)}]: {reason}") from error

    def _render(self, messages: list[dict], prompt: bool = False) -> str:
        """The text of messages; with `prompt` the generation prompt behind it."""
        return self.apply(messages, tokenize=False, add_generation_prompt=prompt)

    def _first(self, count: int, prompt: bool = False) -> str | None:
        """The text of the first `count` messages; None where the template refuses them alone."""
        if (count, prompt) not in self._texts:
            try:
                self._texts[count, prompt] = self._render(self.messages[:count], prompt) if count else None
            except RowError:
                self._texts[count, prompt] = None
        return self._texts[count, prompt]

    def takes(self, count: int) -> bool:
        """Whether the template takes the first `count` messages alone."""
        return self._first(count) is not None

    def encode_last(self, i: int) -> Encoded:
        """The chat that ends with answer `i`, which alone is trained."""
        encoded = self.encode(i + 1, [i])
        assert encoded is not None  # the last answer stands as it was given
        return encoded

    def encode(self, count: int, answers: list[int]) -> Encoded | None:
        """The first `count` messages, `answers` of them trained; None where the template rewrites one of these."""
        found = self._owners(count, answers)
        if found is None:
            return None
        for i in answers:
            if self.messages[i].get("tool_calls"):
                self._refuse_dropped_calls(i, count)
        ids, owners = found
        labels = [IGNORE_INDEX if owner is None else token for token, owner in zip(ids, owners, strict=True)]
        return Encoded(ids, labels, [None if owner is None else self.weights[owner] for owner in owners])

    def _refuse_dropped_calls(self, i: int, count: int) -> None:
        without = {key: value for key, value in self.messages[i].items() if key != "tool_calls"}
        try:
            text = self._render([*self.messages[:i], {"content": "", **without}, *self.messages[i + 1 : count]])
        except RowError:  # it misses them
            return
        if text == self._render(self.messages[:count]):
            raise RowError(
                self.index,
                f"the chat template does not write messages[{i}].tool_calls, so that an answer without them would be "
                "trained; use a template that takes tools, or leave the row out",
            )

    def _owners(self, count: int, answers: list[int]) -> tuple[list[int], list[int | None]] | None:
        """(token ids of the first `count` messages, of each the message of `answers` that it belongs to or None).

        None where the template renders one of them otherwise than it was given.
        """
        if _is_marked(self.template):
            return self._marked_owners(count, answers)
        text = self._render(self.messages[:count])
        tokens = _Tokens(self.tokenizer, text)
        owners: list[int | None] = [None] * len(tokens.ids)
        for i in answers:
            kept = self._kept(i, count, tokens)
            if kept is None:
                return None
            first, last = tokens.at(self._begin(i, count, text)), tokens.at(kept)
            for t in range(first, tokens.end_of_turn(first, last)):
                owners[t] = i
        return tokens.ids, owners

    def _kept(self, i: int, count: int, tokens: _Tokens) -> int | None:
        """How far the text goes with answer `i` as it was given; None where the template renders it otherwise here.

        Only the end of a turn may differ: of the last one, some templates write another.
        """
        if i + 1 < count:
            alone = self._first(i + 1)
            kept = 0 if alone is None else tokens.common(alone)
            return None if alone is None or not tokens.only_ends(alone[kept:]) else kept
        goes_on = self._first(count, prompt=True)
        kept = len(tokens.text) if goes_on is None else tokens.common(goes_on)
        return kept if tokens.only_ends(tokens.text[kept:]) else len(tokens.text)

    def _begin(self, i: int, count: int, text: str) -> int:
        """Where in the text of the first `count` messages answer `i` begins: behind its generation prompt."""
        before, plain = self._first(i, prompt=True), self._first(i)
        has_prompt = "add_generation_prompt" in self.template
        prompted = self._first(count, prompt=True) or text
        header = prompted[_common(prompted, text) :]  # the generation prompt alone; "" where there is none
        if has_prompt and before is not None and text.startswith(before):
            # Some templates write it behind a tool's result only where an answer follows.
            return len(before) + (len(header) if text.startswith(header, len(before)) else 0)
        content = self._content(i, count, text)
        if has_prompt and before is not None and (common := _common(before, text)) >= _common(before, plain or ""):
            return min(content, common)  # the prompt opens a block, of reasoning, that this answer does not have
        if before is not None and text.startswith(before) and not text[len(before) : content].strip():
            return len(before)
        place = text.rfind(header, self._content(i - 1, count, text) if i else 0, content)
        return place + len(header) if header and place >= 0 else content

    def _content(self, i: int, count: int, text: str) -> int:
        """Where the words of message `i` begin in the text of the first `count` messages."""
        strange = [*self.messages[:i], _strange(self.messages[i]), *self.messages[i + 1 : count]]
        return _common(self._render(strange), text)

    def _marked_owners(self, count: int, answers: list[int]) -> tuple[list[int], list[int | None]] | None:
        marked = self.apply(
            self.messages[:count],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        ids = list(marked["input_ids"])
        assistants = [i for i in range(count) if self.messages[i]["role"] == "assistant"]
        if answers == assistants and set(self.weights) == {None}:
            return ids, [answers[-1] if bit else None for bit in marked["assistant_masks"]]
        # An answer's marks are those between where its message begins and where the next assistant's does.
        bounds = [i for k, i in enumerate(assistants) if i in answers or k and assistants[k - 1] in answers]
        text = self._render(self.messages[:count])
        begins = [_common(self._render(self.messages[:i]), text) if i else 0 for i in bounds]
        if begins != sorted(set(begins)):
            return None
        owners: list[int | None] = [None] * len(ids)
        for t, ((start, _), bit) in enumerate(zip(marked["offset_mapping"], marked["assistant_masks"], strict=True)):
            place = bisect_right(begins, start) - 1
            if bit and place >= 0 and bounds[place] in answers:
                owners[t] = bounds[place]
        return ids, owners


class _Tokens:
    """The tokens of a text, and which of them end turns."""

    def __init__(self, tokenizer, text: str):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.text, self.tokenizer, self.ids = text, tokenizer, list(encoded["input_ids"])
        self.starts = [start for start, _ in encoded["offset_mapping"]]
        self.ends = [end for _, end in encoded["offset_mapping"]]
        self.special, self.added = _added_tokens(tokenizer, len(tokenizer))

    def at(self, place: int) -> int:
        """The first token that starts at a character or behind it."""
        return bisect_left(self.starts, place)

    def common(self, other: str) -> int:
        """How far the text begins as another does, in whole tokens where it is not to the end of one of the two."""
        place = _common(self.text, other)
        if place == len(other):
            return place
        t = bisect_left(self.ends, place)
        return min(place, self.starts[t]) if t < len(self.ends) and self.ends[t] > place else place

    def _is_blank(self, token: int) -> bool:
        return not self.tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()

    def only_ends(self, text: str) -> bool:
        """Whether a text is nothing but tokens that end turns, and white space."""
        if not text.strip():
            return True
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return all(token in self.added or self._is_blank(token) for token in ids)

    def end_of_turn(self, first: int, last: int) -> int:
        """Behind the end-of-turn token of the answer in tokens [first, last); `last` where none is to be seen."""
        t = last
        while t > first and self.ids[t - 1] not in self.added and self._is_blank(self.ids[t - 1]):
            t -= 1
        ends = self.ids[t - 1] if t > first else None
        if ends in self.special:
            return t
        # The token that replaced the end of turn, or the next role's token, which the model writes in its place.
        if last < len(self.ids) and self.ids[last] in self.special - {self.tokenizer.bos_token_id}:
            if t == last or ends not in self.added:
                return last + 1
        return t if ends in self.added else last


@lru_cache(maxsize=1)  # of the run's tokenizer; its size is part of the key, since tokens can be added
def _added_tokens(tokenizer, size: int) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of the special tokens; ids of all added tokens that are not white space."""
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return frozenset(special), frozenset(special | set(added))


def _common(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _is_marked(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


@lru_cache(maxsize=8)
def _content_forms(tokenizer, template: str) -> tuple[str, ...]:
    """The forms of a message's content that a template takes, "string" and "parts"; none where it cannot be told."""
    forms = []
    for form, content in (("string", _STRANGE), ("parts", _parts(_STRANGE))):
        try:
            message = {"role": "user", "content": content}
            text = tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)
        except Exception:  # it does not take this form; a template is foreign code, which may raise anything
            continue
        if _STRANGE in text and "'type'" not in text and '"type"' not in text:
            forms.append(form)
    return tuple(forms)
