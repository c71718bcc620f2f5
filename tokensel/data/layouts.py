"""A row's layout, told by its columns: which text, chat or tokens it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tokensel.data.chat import describe
from tokensel.data.rows import RowError

ROLES = {role: role for role in "system developer user assistant tool function ipython observation".split()}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{given}\n\n### Response:\n"
)


class Tokens(NamedTuple):
    """Token ids, labels and weights as the row has them, unchecked."""

    input_ids: Any
    labels: Any
    token_weights: Any


class Text(NamedTuple):
    """A prompt, and behind it a response."""

    prompt: str
    response: str
    weight: float = 1.0


class Chat(NamedTuple):
    """Messages {role, content, ...}; the first `prompt_messages` are no responses, whoever's they are."""

    messages: list[dict]
    prompt_messages: int = 0
    weight: float = 1.0


class Reading(NamedTuple):
    """What all rows have in common.

    Attributes:
        has_template: the tokenizer has a chat template.
        role_names: a role in the rows -> the template's name for it.
        rejected_weight: of the rejected answers of pairs; 0 leaves them out.
    """

    has_template: bool
    role_names: Mapping[str, str]
    rejected_weight: float


class Layout(NamedTuple):
    """Columns that all have to be there, what they are, and how a row of them is read."""

    columns: tuple[str, ...]
    about: str
    read: Callable[[dict, int, Reading], list[Any]]


def read_row(row: dict[str, Any], index: int, reading: Reading) -> tuple[str, list[Tokens] | list[Text | Chat]]:
    """(name of the layout, documents that the row makes). A column that is None is as good as none, and so are those
    of a layout if all of them are empty, where the row has another.

    Raises:
        RowError: no layout has these columns, or a column of it is missing, empty or of the wrong type.
    """
    names = sorted(LAYOUTS, key="pair".__ne__) if reading.rejected_weight else list(LAYOUTS)
    filled = {column for column, value in row.items() if value is not None}
    full = [name for name in names if filled.issuperset(LAYOUTS[name].columns)]
    if full:  # In a table of several layouts, one whose cells are all empty is that of other rows.
        of_pairs = PROMPTS if "pair" in full else ()
        name = min(full, key=lambda name: all(row[c] == "" for c in LAYOUTS[name].columns if c not in of_pairs))
        return name, _with_system(LAYOUTS[name].read(row, index, reading), name, row, index, reading)
    # What comes nearest says what is wrong with it.
    near = max(names, key=lambda name: (len(filled & {*LAYOUTS[name].columns}), row.keys() >= {*LAYOUTS[name].columns}))
    columns = LAYOUTS[near].columns
    missing = [column for column in columns if column not in row]
    if filled & {*columns}:
        if missing:
            raise RowError(index, f"{missing[0]} is missing ({' and '.join(columns)}); its columns are {sorted(row)}")
        return near, LAYOUTS[near].read(row, index, reading)
    if not missing:
        raise RowError(index, f"{' and '.join(sorted(row.keys() & COLUMNS))} hold nothing")
    accepted = "; ".join(f"{' and '.join(columns)} ({about})" for columns, about, _ in LAYOUTS.values())
    raise RowError(index, f"its columns are {sorted(row)}; accepted are {accepted}")


def _with_system(parts: list[Any], layout: str, row: dict, index: int, reading: Reading) -> list[Any]:
    """Chats with the column `system` as their first message, unless they begin with one."""
    chats = [part for part in parts if isinstance(part, Chat)]
    if row.get("system") in (None, "") or not (chats or layout in ("Alpaca", "pair")):
        return parts
    if not chats:
        raise RowError(
            index,
            "system is a message, which goes through the chat template, but the row is text; give messages, or "
            "instruction or question to a tokenizer with a chat template, or leave the column out",
        )
    message = {"role": reading.role_names.get("system", "system"), "content": _string(row, index, "system")}
    return [
        chat
        if chat.messages[0]["role"] in ("system", "developer", message["role"])
        else Chat([message, *chat.messages], chat.prompt_messages + 1, chat.weight)
        for chat in chats
    ]


def _string(row: dict, index: int, column: str) -> str:
    return _checked_string(row[column], index, column)


def _asked(row: dict, index: int) -> tuple[str, str]:
    """What the answers of a pair without `prompt` answer, and Alpaca's input to it; empty if there is none."""
    instruction, question, given = (_optional(row, index, name) for name in ("instruction", "question", "input"))
    return (instruction or question, given) if instruction or question else (given, "")


def _user(instruction: str, given: str) -> dict:
    return {"role": "user", "content": f"{instruction}\n{given}" if given else instruction}


def _optional(row: dict, index: int, column: str) -> str:
    return "" if row.get(column) is None else _string(row, index, column)


def _checked_string(value: Any, index: int, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(index, f"{name} must be a string; got {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a character
        raise RowError(index, f"{name} is no text: {error}") from error
    return value


def _messages(row: dict, index: int, column: str, reading: Reading) -> list[dict]:
    """Messages as the row has them, or as ShareGPT has: {from, value}. Roles get the template's names."""
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else describe(messages)
        raise RowError(index, f"{column} must be a list of {{role, content}}; got {found}")
    return [_message(message, index, f"{column}[{i}]", reading) for i, message in enumerate(messages)]


def _message(message: Any, index: int, name: str, reading: Reading) -> dict:
    if not isinstance(message, dict):
        raise RowError(index, f"{name} must be a message, {{role, content}}; got {describe(message)}")
    sharegpt = message.get("role") is None and message.get("from") is not None
    key, known = ("from", SHAREGPT_ROLES) if sharegpt else ("role", ROLES)
    role = _checked_string(message.get(key), index, f"{name}.{key}")
    if role not in reading.role_names and role not in known:
        raise RowError(
            index,
            f"{name}.{key} is {role!r}; known roles are {', '.join(known)}. Name yours by role_names, such as "
            f"{role}=assistant, or {role}={role} if the chat template knows it",
        )
    role = reading.role_names.get(role) or known[role]
    if isinstance(message.get("content"), str):
        _checked_string(message["content"], index, f"{name}.content")
    if not sharegpt:
        return message | {"role": role}
    content = _checked_string(message.get("value"), index, f"{name}.value")
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "from", "value")}
    return {"role": role, "content": content, **rest}


def _tokens(row: dict, index: int, reading: Reading) -> list[Tokens]:
    """Without padding (`attention_mask` 0), which is no part of a document, whatever its labels."""
    names = ("input_ids", "labels", "token_weights")
    mask, parts = row.get("attention_mask"), {name: row.get(name) for name in names}
    if mask is None:
        return [Tokens(**parts)]
    for name, values in parts.items():
        if values is not None and (not isinstance(mask, list) or not isinstance(values, list)):
            raise RowError(index, f"attention_mask and {name} must be lists; got {describe(mask)}, {describe(values)}")
        if values is not None and len(values) != len(mask):
            raise RowError(index, f"attention_mask must be as long as {name} ({len(values)}); got {len(mask)}")
        parts[name] = values and [value for value, real in zip(values, mask, strict=True) if real]
    return [Tokens(**parts)]


def _chat(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    return [Chat(_messages(row, index, "messages", reading))]


def _sharegpt(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    return [Chat(_messages(row, index, "conversations", reading))]


def _completion(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    if isinstance(row["prompt"], list):
        prompt = _messages(row, index, "prompt", reading)
        return [Chat(prompt + _messages(row, index, "completion", reading), len(prompt))]
    return [Text(_string(row, index, "prompt"), _string(row, index, "completion"))]


def _question(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    return [Text(_string(row, index, "question") + "\n", _string(row, index, "answer"))]


def _alpaca(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    instruction, output = _string(row, index, "instruction"), _string(row, index, "output")
    return [_answered(instruction, _optional(row, index, "input"), output, reading)]


def _answered(instruction: str, given: str, answer: str, reading: Reading) -> Text | Chat:
    if reading.has_template:
        return Chat([_user(instruction, given), {"role": "assistant", "content": answer}])
    paired = ", paired with an input that provides further context" if given else ""
    given = f"\n\n### Input:\n{given}" if given else ""
    return Text(ALPACA.format(paired=paired, instruction=instruction, given=given), answer)


def _pair(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    """The chosen answer and, if it has a weight, the rejected one. Without a prompt, it is what both begin with."""
    of_kind = _pair_of_chats if isinstance(row["chosen"], list) else _pair_of_texts
    chosen, rejected = of_kind(row, index, reading)
    return [chosen, rejected._replace(weight=reading.rejected_weight)] if reading.rejected_weight else [chosen]


def _pair_of_texts(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    answers = [_string(row, index, "chosen"), _string(row, index, "rejected")]
    asked, given = _asked(row, index)
    if row.get("prompt") is not None and not (asked and row["prompt"] == ""):
        return [Text(_string(row, index, "prompt"), answer) for answer in answers]
    if asked and (reading.has_template or row.get("instruction")):
        return [_answered(asked, given, answer, reading) for answer in answers]
    if asked:
        return [Text(_user(asked, given)["content"] + "\n", answer) for answer in answers]
    begin = common_length(*answers)
    if begin and answers[0][begin - 1] == " ":  # as TRL's extract_prompt: a space belongs to the word behind it
        begin -= 1
    return [Text(answer[:begin], answer[begin:]) for answer in answers]


def _pair_of_chats(row: dict, index: int, reading: Reading) -> list[Chat]:
    answers = [_messages(row, index, column, reading) for column in ("chosen", "rejected")]
    if isinstance(row.get("prompt"), list):
        prompt = _messages(row, index, "prompt", reading)
        return [Chat(prompt + answer, len(prompt)) for answer in answers]
    begin = common_length(*answers)
    if row.get("prompt") is not None and not begin:  # else it is told again by the messages
        raise RowError(index, f"prompt must be a list of messages, as chosen is; got {describe(row['prompt'])}")
    asked, given = _asked(row, index)
    if asked and {answer[0]["role"] for answer in answers} == {"assistant"}:
        prompt = [_user(asked, given)]
        return [Chat(prompt + answer, 1) for answer in answers]
    return [Chat(answer, begin) for answer in answers]


def common_length(a: Sequence, b: Sequence) -> int:
    """How many of their first elements are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _text(row: dict, index: int, reading: Reading) -> list[Text | Chat]:
    return [Text("", _string(row, index, "text"))]


LAYOUTS = {  # in the order of preference when a row fits more than one
    "token ids": Layout(("input_ids", "labels"), "as they are", _tokens),
    "chat": Layout(("messages",), "[{role, content}, ...], through the chat template", _chat),
    "prompt and completion": Layout(
        ("prompt", "completion"),
        "text, concatenated as it is; or lists of messages, through the chat template",
        _completion,
    ),
    "question and answer": Layout(("question", "answer"), "text, a newline between them", _question),
    "pair": Layout(
        ("chosen", "rejected"),
        "two answers to `prompt`, or to what both begin with, text or messages; or to `question`, or to `instruction` "
        "with or without `input`, as Alpaca",
        _pair,
    ),
    "Alpaca": Layout(
        ("instruction", "output"),
        "with or without `input`; through the chat template, or, without one, Alpaca's own text",
        _alpaca,
    ),
    "ShareGPT": Layout(("conversations",), "[{from, value}, ...], through the chat template", _sharegpt),
    "text": Layout(("text",), "alone, all of it a response", _text),
}
PROMPTS = ("prompt", "question", "instruction")  # of a pair
# All that is read of a row.
COLUMNS = {column for layout in LAYOUTS.values() for column in layout.columns} | {
    "input",
    "system",
    "tools",
    "chat_template_kwargs",
    "weight",
    "token_weights",
    "attention_mask",
}
