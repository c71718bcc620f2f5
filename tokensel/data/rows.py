"""Rows of text -> token ids and labels (`-100` = not a response token).

Padding and packing are left to transformers: `DataCollatorForSeq2Seq` and `DataCollatorWithFlattening` take
what `encode_rows` returns, inside a `WeightsCollator` where rows have weights.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import torch

from tokensel.documents import IGNORE_INDEX

FORMATS = {  # in the order of preference when a row fits more than one
    ("input_ids", "labels"): "token ids, as they are",
    ("messages",): "chat: [{role, content}, ...], through the tokenizer's chat template",
    ("prompt", "completion"): "text, concatenated as it is",
    ("question", "answer"): "text, a newline between them",
}
DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst"}

# What pyarrow raises for values that it has no column for: mixed types, huge integers, halves of surrogate pairs.
_NOT_ARROW = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


class RowError(ValueError):
    """A row that cannot be encoded. `row` is its number, from 0."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


def load_rows(name_or_path: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """Reads a JSONL file, or loads a dataset by its Hugging Face name (which may download it).

    Args:
        name_or_path: a file with one JSON object a line, UTF-8, blank lines skipped. Anything that is not a
            file and does not look like one goes to `datasets.load_dataset`.
        split: the split of a named dataset; a file has none.
    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        ValueError: "FILE:LINE: reason" for a line that is not a JSON object or whose fields differ in type
            from earlier lines; a file without rows.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _read_jsonl(path)
    # A dataset's name is "name" or "owner/name"; a directory that exists is also load_dataset's to read.
    looks_like_path = (
        isinstance(name_or_path, os.PathLike)
        or path.suffix in DATA_SUFFIXES
        or path.is_absolute()
        or len(path.parts) > 2
        or str(name_or_path).startswith((".", "~"))
    )
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "no such file; give a JSONL file or the name of a Hugging Face dataset", str(path)
        )
    return datasets.load_dataset(str(name_or_path), split=split)


def _read_jsonl(path: Path) -> datasets.Dataset:
    rows, names = [], []
    with open(path, "rb") as file:
        for number, line in _lines_of_rows(file):
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # of the JSON, of the UTF-8, or too many brackets
                raise ValueError(f"{path}:{number}: {error}; expected one JSON object a line") from error
            if not isinstance(row, dict) or not row:
                found = "an empty object" if row == {} else type(row).__name__
                raise ValueError(f"{path}:{number}: expected one JSON object a line, found {found}")
            rows.append(row)
            names.append(f"{path}:{number}")
    if not rows:
        raise ValueError(f"{path} has no rows; expected one JSON object a line")
    return _as_dataset(rows, names)


def _lines_of_rows(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are rows: all but blank ones."""
    return ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def place_of_row(name_or_path: str | os.PathLike, row: int) -> str:
    """Where a row of what `load_rows` read stands, for errors: "FILE:LINE", or "NAME, row 7" of a named dataset."""
    if not Path(name_or_path).is_file():
        return f"{name_or_path}, row {row}"
    with open(name_or_path, "rb") as file:
        number, _ = next(itertools.islice(_lines_of_rows(file), row, None))
    return f"{name_or_path}:{number}"


def _as_dataset(rows: list[dict], names: Sequence[str]) -> datasets.Dataset:
    """A column for every field of any row. `names[i]` says where row i is, for errors."""
    fields = dict.fromkeys(field for row in rows for field in row)
    try:
        return datasets.Dataset.from_dict({field: [row.get(field) for row in rows] for field in fields})
    except _NOT_ARROW as error:
        for field in fields:
            first = None
            for row, name in zip(rows, names, strict=True):
                kind = type(row.get(field)).__name__
                if row.get(field) is not None and kind != (first := first or kind):
                    raise ValueError(
                        f"{name}: field {field!r} is {kind} here and {first} before; a field has one type"
                    ) from error
                try:
                    pa.array([row.get(field)])
                except _NOT_ARROW as reason:
                    raise ValueError(f"{name}: field {field!r} cannot be stored: {reason}") from error
        raise ValueError(f"{names[0]} and later rows: a field has more than one type ({error})") from error


@dataclass(frozen=True)
class EncodingCounts:
    """What `encode_rows` read, cut and dropped. `truncated` and `without_response` do not overlap.

    Attributes:
        rows: rows read.
        truncated: rows cut at the length limit that still have a response token.
        without_response: rows dropped: an empty response, or a prompt that fills the limit.
        tokens, response_tokens: of the rows kept, after cutting.
        longest: tokens of the longest of them.
        largest_id: of their token ids.
    """

    rows: int
    truncated: int
    without_response: int
    tokens: int
    response_tokens: int
    longest: int
    largest_id: int

    def __str__(self) -> str:
        kept = self.rows - self.without_response
        return (
            f"{self.rows:,} rows: {kept:,} kept ({self.truncated:,} of them cut at the length limit), "
            f"{self.without_response:,} dropped without a response token; {self.tokens:,} tokens, "
            f"{self.response_tokens:,} of them response tokens"
        )


def encode_rows(
    rows: datasets.Dataset | Iterable[dict],
    tokenizer,
    max_length: int,
    keep_columns: Sequence[str] = (),
    prompt_weight: float = 0.0,
    response_weight: float = 1.0,
) -> tuple[datasets.Dataset, EncodingCounts]:
    """Rows of text -> token ids and labels.

    A text row is the prompt with the special tokens that the tokenizer puts at the start, the completion, and
    EOS; the completion and EOS are labelled. A chat row has the token ids of
    `tokenizer.apply_chat_template(messages)`; the tokens that start in an assistant's part are labelled. A
    document's first token never is: nothing predicts it. Rows are cut at the right; rows without a labelled
    token are dropped; both are counted.

    Weights, negative ones too, may come with the rows: `weight` on an assistant's message, `token_weights` beside
    `input_ids` and `labels`, and `weight` on any row, a factor of its response tokens. Tokens without one have
    `response_weight` or `prompt_weight`. A prompt token whose weight is not 0 is trained, too, though its label stays
    -100.

    Args:
        rows: a `datasets.Dataset`, or dicts, with `prompt` and `completion`, `question` and `answer`,
            `messages`, or `input_ids` and `labels`.
        tokenizer: a transformers tokenizer; a fast one with a chat template for `messages`.
        max_length: tokens a row, at least 2.
        keep_columns: columns to carry over beside `input_ids` and `labels`.
        prompt_weight, response_weight: of prompt and of response tokens (WIT, arXiv 2507.07817); on response tokens
            a factor of what the row gives.
    Returns:
        (Dataset with `input_ids` and `labels`, lists of int64 of one length a row, and, where anything gives weights,
        `token_weights`, float32 of that length; `EncodingCounts`).
    Raises:
        ValueError: no rows, or no row with a response token. RowError, which is one, with the row's number: unknown
            columns, a field of the wrong type, a token id that the tokenizer does not have, weights that are not finite
            or of another length, or a chat template whose turns cannot be told apart.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a prompt token and a response token); got {max_length}")
    if not isinstance(rows, datasets.Dataset):
        rows = list(rows)
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise TypeError(f"rows must be a datasets.Dataset or dicts; row {i} is {_describe(row)}")
        rows = _as_dataset(rows, [f"row {i}" for i in range(len(rows))])
    if not len(rows):
        raise ValueError("rows is empty; give at least one row")
    missing = [column for column in keep_columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"keep_columns names {missing}, but the columns are {rows.column_names}")

    for name, value in (("prompt_weight", prompt_weight), ("response_weight", response_weight)):
        if not _is_finite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
    weighted = (prompt_weight, response_weight) != (0, 1) or _has_weights(rows.features)

    count = dict.fromkeys(("truncated", "without_response", "tokens", "response_tokens", "longest", "largest_id"), 0)

    def encode(batch: dict, indices: list[int]) -> dict:
        encoded = {column: [] for column in features}
        for i, index in enumerate(indices):
            row = {column: batch[column][i] for column in rows.column_names}
            ids, labels, weights = _encode(row, index, tokenizer)
            labels = [IGNORE_INDEX, *labels[1:max_length]]
            responses = sum(label != IGNORE_INDEX for label in labels)
            if responses == 0:
                count["without_response"] += 1
                continue
            count["truncated"] += len(ids) > max_length
            count["tokens"] += len(labels)
            count["response_tokens"] += responses
            values = {"input_ids": ids[:max_length], "labels": labels}
            if weighted:
                factor = response_weight * _weight(row.get("weight"), index, "weight")
                values["token_weights"] = [0.0] + [
                    (prompt_weight if weight is None else weight)
                    if label == IGNORE_INDEX
                    else factor * (1.0 if weight is None else weight)
                    for label, weight in zip(labels[1:], weights[1:max_length], strict=True)
                ]
            count["longest"] = max(count["longest"], len(labels))
            count["largest_id"] = max(count["largest_id"], *values["input_ids"])
            for column in features:
                encoded[column].append(values[column] if column in values else row[column])
        return encoded

    tokens = datasets.Sequence(datasets.Value("int64"))
    features = datasets.Features({column: rows.features[column] for column in keep_columns})
    features.update(input_ids=tokens, labels=tokens)
    if weighted:
        features["token_weights"] = datasets.Sequence(datasets.Value("float32"))
    encoded = rows.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,  # or int32 token ids that pass through would make int32 labels
        load_from_cache_file=False,  # a cached result would leave the counts at 0
        desc="Tokenising",
    )
    if not len(encoded):
        raise ValueError(
            f"none of the {len(rows)} rows has a response token within max_length={max_length}; raise "
            "max_length or check the completions"
        )
    return encoded, EncodingCounts(rows=len(rows), **count)


def _has_weights(features: datasets.Features) -> bool:
    """Whether rows of these columns may give weights."""
    messages = features.get("messages")
    messages = getattr(messages, "feature", messages)  # what a list is made of
    if isinstance(messages, list):
        messages = messages[0]
    in_messages = isinstance(messages, dict) and "weight" in messages
    return in_messages or "weight" in features or "token_weights" in features


def _is_finite(value: object) -> bool:
    """Whether a value is a number that float32 holds."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= torch.finfo(torch.float32).max


def _weight(value: object, index: int, name: str) -> float:
    if value is not None and not _is_finite(value):
        raise RowError(index, f"{name} must be a finite number, by which losses are multiplied; got {value!r}")
    return 1.0 if value is None else value


def _encode(row: dict, index: int, tokenizer) -> tuple[list[int], list[int], list[float | None]]:
    """(input_ids, labels, weights) of one row, of its full length; None where no weight is given."""
    ids, labels, weights = _encode_fields(row, index, tokenizer)
    return ids, labels, [None] * len(ids) if weights is None else weights


def _encode_fields(row: dict, index: int, tokenizer) -> tuple[list[int], list[int], list[float | None] | None]:
    # Where lines of a file mix formats, the columns of the others are None; an incomplete row falls back to
    # the columns alone, so that the field which is None can be named.
    filled = {column for column, value in row.items() if value is not None}
    for columns in (filled, set(row)):
        for fields in FORMATS:
            if columns.issuperset(fields):
                values = [row[field] for field in fields]
                if fields == ("input_ids", "labels"):
                    return *_check_ids(index, *values, len(tokenizer)), _check_weights(index, row)
                if row.get("token_weights") is not None:
                    raise RowError(
                        index,
                        "token_weights goes with input_ids and labels, whose tokens it counts; give text rows one "
                        "`weight`, and messages one each",
                    )
                if fields == ("messages",):
                    return _encode_chat(index, *values, tokenizer)
                for field, value in zip(fields, values, strict=True):
                    if not isinstance(value, str):
                        raise RowError(index, f"{field} must be a string; got {_describe(value)}")
                prompt, completion = values
                return *_encode_text(prompt + "\n" * (fields[0] == "question"), completion, tokenizer), None
    accepted = "; ".join(f"{' and '.join(fields)} ({what})" for fields, what in FORMATS.items())
    raise RowError(index, f"its columns are {sorted(row)}; accepted are {accepted}")


def _describe(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _check_ids(index: int, input_ids: object, labels: object, vocabulary: int) -> tuple[list[int], list[int]]:
    for name, value in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
            raise RowError(index, f"{name} must be a list of integers; got {_describe(value)}")
    if len(input_ids) != len(labels):
        raise RowError(
            index,
            f"labels must be as long as input_ids ({len(input_ids)}), -100 on the prompt; got {len(labels)}",
        )
    for name, tokens in (("input_ids", input_ids), ("labels", [label for label in labels if label != IGNORE_INDEX])):
        outside = [token for token in tokens if not 0 <= token < vocabulary]
        if outside:
            raise RowError(index, f"{name} holds {outside[0]}, but the tokenizer has tokens 0 to {vocabulary - 1}")
    return input_ids, labels


def _check_weights(index: int, row: dict) -> list[float] | None:
    weights = row.get("token_weights")
    if weights is None:
        return None
    if not isinstance(weights, list) or len(weights) != len(row["input_ids"]):
        found = len(weights) if isinstance(weights, list) else _describe(weights)
        raise RowError(
            index, f"token_weights must be a list as long as input_ids ({len(row['input_ids'])}); got {found}"
        )
    for i, weight in enumerate(weights):
        if not _is_finite(weight):
            raise RowError(index, f"token_weights[{i}] must be a finite number; got {weight!r}")
    return weights


def _encode_text(prompt: str, completion: str, tokenizer) -> tuple[list[int], list[int]]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so a response would have no end; set tokenizer.eos_token")
    start = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    ids, special = list(start["input_ids"]), start["special_tokens_mask"]
    # Some tokenizers close every text with EOS; a prompt goes on. EOS written in the prompt's own text stays,
    # and so does the only token of an empty prompt, which opens the document.
    if len(ids) > 1 and special[-1] and ids[-1] == eos:
        ids.pop()
    response = list(tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"])
    if response and response[-1] != eos:
        response.append(eos)
    return ids + response, [IGNORE_INDEX] * len(ids) + response


def _encode_chat(index: int, messages: object, tokenizer) -> tuple[list[int], list[int], list[float | None]]:
    from jinja2 import TemplateError

    if not isinstance(messages, list) or not messages:
        raise RowError(index, f"messages must be a list of {{role, content}}; got {_describe(messages)}")
    for i, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                found = message.get(field) if isinstance(message, dict) else message
                raise RowError(index, f"messages[{i}].{field} must be a string; got {_describe(found)}")
        weight = _weight(message.get("weight"), index, f"messages[{i}].weight")
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
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]

    def render(count: int, **options) -> str:
        try:
            return tokenizer.apply_chat_template(turns[:count], tokenize=False, **options)
        except TemplateError as error:
            raise RowError(index, f"the chat template refuses messages[:{count}]: {error}") from error

    text = render(len(turns))
    spans = []  # (begin, end, weight) of characters, each an assistant's part
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
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
    labels, weights = [IGNORE_INDEX] * len(ids), [None] * len(ids)
    for begin, end, weight in spans:
        for t, start in enumerate(starts):
            if begin <= start < end:
                labels[t], weights[t] = ids[t], weight
    return ids, labels, weights


class WeightsCollator:
    """Pads, or concatenates, `token_weights` beside what another collator makes of the other columns.

    For `DataCollatorForSeq2Seq`, either padding side, and `DataCollatorWithFlattening`, which know nothing of it.
    """

    def __init__(self, collator: Callable[[list[dict]], dict]) -> None:
        self.collator = collator

    def __call__(self, features: list[dict]) -> dict:
        if "token_weights" not in features[0]:  # held-out rows
            return self.collator(features)
        batch = self.collator([{k: v for k, v in row.items() if k != "token_weights"} for row in features])
        given = torch.cat([torch.as_tensor(row["token_weights"], dtype=torch.float32) for row in features])
        weights = torch.zeros(batch["input_ids"].shape)  # (B, S)
        mask = batch.get("attention_mask")
        weights[torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.bool()] = given
        batch["token_weights"] = weights
        return batch
