"""Rows of text -> token ids and labels (`-100` = not a response token).

Padding and packing are left to transformers: `DataCollatorForSeq2Seq` and `DataCollatorWithFlattening` take
what `encode_rows` returns, inside a `SelectionCollator` where rows have weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from tokensel.data.chat import Encoded, checked_weight, describe, encode_chat, is_finite
from tokensel.data.rows import RowError, as_dataset
from tokensel.documents import IGNORE_INDEX

FORMATS = {  # in the order of preference when a row fits more than one
    ("input_ids", "labels"): "token ids, as they are",
    ("messages",): "chat: [{role, content}, ...], through the tokenizer's chat template",
    ("prompt", "completion"): "text, concatenated as it is",
    ("question", "answer"): "text, a newline between them",
}


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
                raise TypeError(f"rows must be a datasets.Dataset or dicts; row {i} is {describe(row)}")
        rows = as_dataset(rows, [f"row {i}" for i in range(len(rows))])
    if not len(rows):
        raise ValueError("rows is empty; give at least one row")
    missing = [column for column in keep_columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"keep_columns names {missing}, but the columns are {rows.column_names}")

    for name, value in (("prompt_weight", prompt_weight), ("response_weight", response_weight)):
        if not is_finite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
    weighted = (prompt_weight, response_weight) != (0, 1) or _has_weights(rows.features)

    count = dict.fromkeys(("truncated", "without_response", "tokens", "response_tokens", "longest", "largest_id"), 0)

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        encoded: dict[str, list[Any]] = {column: [] for column in features}
        for i, index in enumerate(indices):
            row = {column: batch[column][i] for column in rows.column_names}
            for ids, labels, weights in _encode(row, index, tokenizer):
                labels = [IGNORE_INDEX, *labels[1:max_length]]
                responses = sum(label != IGNORE_INDEX for label in labels)
                if responses == 0:
                    count["without_response"] += 1
                    continue
                count["truncated"] += len(ids) > max_length
                count["tokens"] += len(labels)
                count["response_tokens"] += responses
                values: dict[str, list[Any]] = {"input_ids": ids[:max_length], "labels": labels}
                if weighted:
                    factor = response_weight * checked_weight(row.get("weight"), index, "weight")
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


def _encode(row: dict, index: int, tokenizer) -> list[Encoded]:
    """The documents of one row, of their full length."""
    # Where lines of a file mix formats, the columns of the others are None; an incomplete row falls back to
    # the columns alone, so that the field which is None can be named.
    filled = {column for column, value in row.items() if value is not None}
    for columns in (filled, set(row)):
        for fields in FORMATS:
            if columns.issuperset(fields):
                values: list[Any] = [row[field] for field in fields]
                if fields == ("input_ids", "labels"):
                    ids, labels = _check_ids(index, values[0], values[1], len(tokenizer))
                    return [Encoded(ids, labels, _check_weights(index, row))]
                if row.get("token_weights") is not None:
                    raise RowError(
                        index,
                        "token_weights goes with input_ids and labels, whose tokens it counts; give text rows one "
                        "`weight`, and messages one each",
                    )
                if fields == ("messages",):
                    return encode_chat(index, values[0], tokenizer)
                for field, value in zip(fields, values, strict=True):
                    if not isinstance(value, str):
                        raise RowError(index, f"{field} must be a string; got {describe(value)}")
                prompt, completion = values
                ids, labels = _encode_text(prompt + "\n" * (fields[0] == "question"), completion, tokenizer)
                return [Encoded(ids, labels, [None] * len(ids))]
    accepted = "; ".join(f"{' and '.join(fields)} ({what})" for fields, what in FORMATS.items())
    raise RowError(index, f"its columns are {sorted(row)}; accepted are {accepted}")


def _check_ids(index: int, input_ids: Any, labels: Any, vocabulary: int) -> tuple[list[int], list[int]]:
    for name, value in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
            raise RowError(index, f"{name} must be a list of integers; got {describe(value)}")
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


def _check_weights(index: int, row: dict) -> Sequence[float | None]:
    weights = row.get("token_weights")
    if weights is None:
        return [None] * len(row["input_ids"])
    if not isinstance(weights, list) or len(weights) != len(row["input_ids"]):
        length = len(weights) if isinstance(weights, list) else describe(weights)
        raise RowError(
            index, f"token_weights must be a list as long as input_ids ({len(row['input_ids'])}); got {length}"
        )
    for i, weight in enumerate(weights):
        if not is_finite(weight):
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
