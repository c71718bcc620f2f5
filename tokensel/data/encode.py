"""Rows of text -> token ids and labels (`-100` = not a response token).

Padding and packing are left to transformers: `DataCollatorForSeq2Seq` and `DataCollatorWithFlattening` take
what `encode_rows` returns, inside a `SelectionCollator` where rows have weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute

from tokensel.data.chat import TURNS, Encoded, checked_weight, describe, encode_chat, is_finite
from tokensel.data.layouts import COLUMNS, Chat, Reading, Text, Tokens, read_row
from tokensel.data.pairs import encode_pair
from tokensel.data.rows import RowError, as_dataset
from tokensel.data.text import encode_text
from tokensel.documents import IGNORE_INDEX


@dataclass
class EncodingCounts:
    """What `encode_rows` read, cut and dropped. `truncated` and `without_response` do not overlap.

    Attributes:
        rows: rows read.
        documents: documents kept; a row makes one, a chat or a pair perhaps more.
        truncated: of them, those cut at the length limit.
        without_response: documents dropped: an empty response, or a prompt that fills the limit.
        tokens, response_tokens: of the documents kept, after cutting.
        longest: tokens of the longest of them.
        largest_id: of their token ids.
        layouts: rows of each layout.
        chats: chats that went through the chat template.
        untrained_answers: answers of chats that are not trained, because the template renders earlier turns otherwise.
        answers_as_rows: such answers that became rows of their own, beside the last of their chat.
    """

    rows: int = 0
    documents: int = 0
    truncated: int = 0
    without_response: int = 0
    tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    largest_id: int = 0
    layouts: dict[str, int] = field(default_factory=dict)
    chats: int = 0
    untrained_answers: int = 0
    answers_as_rows: int = 0

    def __str__(self) -> str:
        made = self.documents + self.without_response
        parts = [
            f"{self.rows:,} rows{'' if made == self.rows else f', {made:,} documents'}: {self.documents:,} kept "
            f"({self.truncated:,} of them cut at the length limit), {self.without_response:,} dropped without a "
            "response token",
            f"{self.tokens:,} tokens, {self.response_tokens:,} of them response tokens",
            f"layouts: {', '.join(f'{rows:,} {name}' for name, rows in self.layouts.items())}",
        ]
        rewritten = {
            "are not trained (turns='each' makes a row of each)": self.untrained_answers,
            "became rows of their own": self.answers_as_rows,
        }
        parts += [
            f"the chat template rewrites earlier turns: {answers:,} answers before the last {what}"
            for what, answers in rewritten.items()
            if answers
        ]
        return "; ".join(parts)


def encode_rows(
    rows: datasets.Dataset | datasets.IterableDataset | Iterable[dict],
    tokenizer,
    max_length: int,
    keep_columns: Sequence[str] = (),
    prompt_weight: float = 0.0,
    response_weight: float = 1.0,
    turns: str = "last",
    chat_template: str | None = None,
    rejected_weight: float = 0.0,
    role_names: Mapping[str, str] | None = None,
    both_answers: bool = False,
    weights: bool = True,
) -> tuple[datasets.Dataset | datasets.IterableDataset, EncodingCounts]:
    """Rows of text -> token ids and labels.

    A text row is the prompt with the special tokens that the tokenizer puts at the start, the completion, and
    EOS; the completion and EOS are labelled. Text alone is a completion without a prompt. A BOS or an EOS that the text
    spells out is not put there again. A chat row has the token ids of
    `tokenizer.apply_chat_template(messages)`, with the row's `tools` and `chat_template_kwargs`; labelled are what the
    template marks with `{% generation %}`, or else each answer from its generation prompt to its end-of-turn token. A
    document's first token never is: nothing predicts it. Documents are cut at the right; those without a labelled
    token are dropped; both are counted.

    Weights, negative ones too, may come with the rows: `weight` on an assistant's message, `token_weights` beside
    `input_ids` and `labels`, and `weight` on any row, a factor of its response tokens. Tokens without one have
    `response_weight` or `prompt_weight`. A prompt token whose weight is not 0 is trained, too, though its label stays
    -100.

    Args:
        rows: a `datasets.Dataset`, or dicts; each row has one of `layouts.LAYOUTS`, whichever its columns tell. A
            `datasets.IterableDataset` is encoded, checked and counted as it is read.
        tokenizer: a transformers tokenizer; a fast one with a chat template for chats.
        max_length: tokens a document, at least 2.
        keep_columns: columns to carry over beside `input_ids` and `labels`.
        prompt_weight, response_weight: of prompt and of response tokens (WIT, arXiv 2507.07817); on response tokens
            a factor of what the row gives.
        turns: of chats whose template rewrites earlier turns (drops their reasoning, say) "last" trains the last
            answer, "each" makes of each answer a row that ends with it.
        chat_template: for chats, another than the tokenizer's.
        rejected_weight: of the rejected answers of pairs, which become rows of their own; 0 leaves them out.
        role_names: a role in the messages -> the chat template's name for it.
        both_answers: rows are preference pairs, whose two answers get the tokens and labels of TRL's DPOTrainer.
        weights: read those that the rows give; False leaves them out.
    Returns:
        (Dataset with `input_ids` and `labels`, lists of int64 of one length a row, and, where anything gives weights,
        `token_weights`, float32 of that length; `EncodingCounts`). What comes later in a stream is not known: it has
        weights if a setting gives some, or if its columns or, where they are not known, its first row has any.
    Raises:
        ValueError: no rows, or no row with a response token. RowError, which is one, with the row's number: no layout,
            a column that is missing, empty or of the wrong type, an unknown role, a token id that the tokenizer does
            not have, weights that are not finite or of another length, a weight in a stream that has none, or a chat
            template that refuses the row.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a prompt token and a response token); got {max_length}")
    given = {"prompt_weight": prompt_weight, "response_weight": response_weight, "rejected_weight": rejected_weight}
    for name, value in given.items():
        if not is_finite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
    if not all(isinstance(name, str) for name in [*(role_names or {}), *(role_names or {}).values()]):
        raise ValueError(f"role_names must map names to names, such as bot to assistant; got {role_names!r}")
    if both_answers and rejected_weight:
        raise ValueError("both_answers and rejected_weight both make documents of rejected answers; give one")
    if turns not in TURNS:
        raise ValueError(f"turns must be one of {', '.join(TURNS)}; got {turns!r}")
    encoder = _Encoder(tokenizer, max_length, prompt_weight, response_weight, both_answers)
    encoder.chat = {"turns": turns, "chat_template": chat_template}
    has_template = bool(chat_template or getattr(tokenizer, "chat_template", None))
    encoder.reading = Reading(has_template, role_names or {}, 1.0 if both_answers else rejected_weight)
    encoder.reads_weights = weights
    encoder.weighted = weights and (prompt_weight, response_weight, rejected_weight) != (0, 1, 0)
    if isinstance(rows, datasets.IterableDataset):
        return _encoded_stream(rows, encoder, keep_columns), encoder.counts
    rows = _checked(rows, keep_columns)
    encoder.weighted = encoder.weighted or (weights and _has_weights(rows))
    encoded = _encoded(rows, encoder, keep_columns)
    if not len(encoded):
        raise ValueError(
            f"none of the {len(rows)} rows has a response token within max_length={max_length}; raise "
            "max_length or check the completions"
        )
    return encoded, encoder.counts


def _checked(rows: datasets.Dataset | Iterable[dict], keep_columns: Sequence[str]) -> datasets.Dataset:
    if not isinstance(rows, datasets.Dataset):
        rows = list(rows)
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise TypeError(f"rows must be a datasets.Dataset or dicts; row {i} is {describe(row)}")
        rows = as_dataset(rows, [f"row {i}" for i in range(len(rows))])
    if not len(rows):
        raise ValueError("rows is empty; give at least one row")
    if missing := [column for column in keep_columns if column not in rows.column_names]:
        raise ValueError(f"keep_columns names {missing}, but the columns are {rows.column_names}")
    return rows


def _features(kept: Mapping[str, Any], weighted: bool) -> datasets.Features:
    tokens = datasets.Sequence(datasets.Value("int64"))
    weights = {"token_weights": datasets.Sequence(datasets.Value("float32"))} if weighted else {}
    return datasets.Features({**kept, "input_ids": tokens, "labels": tokens, **weights})


def _encoded(rows: datasets.Dataset, encoder: _Encoder, keep_columns: Sequence[str]) -> datasets.Dataset:
    unread = dict.fromkeys(rows.column_names)
    rows = rows.select_columns(_read(rows.column_names, keep_columns))
    features = _features({column: rows.features[column] for column in keep_columns}, encoder.weighted)
    # `datasets` reads JSON by a parser that is not exact in the last digit of a number.
    texts = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Json)]
    if texts:
        rows = rows.cast(datasets.Features({**rows.features, **dict.fromkeys(texts, datasets.Value("string"))}))

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        every = _rows_of(batch)
        for row in every:
            row.update({name: json.loads(row[name]) for name in texts if row[name] is not None})
        return encoder.batch([unread | row for row in every], indices, list(features))

    return rows.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,  # or int32 token ids that pass through would make int32 labels
        load_from_cache_file=False,  # a cached result would leave the counts at 0
        desc="Tokenising",
    )


def _encoded_stream(
    rows: datasets.IterableDataset, encoder: _Encoder, keep_columns: Sequence[str]
) -> datasets.IterableDataset:
    columns = rows.column_names
    rows = rows if columns is None else rows.select_columns(_read(columns, keep_columns))
    encoder.weighted = encoder.weighted or (encoder.reads_weights and _weighs(next(iter(rows), {})))
    if untyped := columns is None:  # each row may have columns of its own
        rows, columns = rows.map(_one_column).select_columns(["row"]), ["row"]
    features = _features({}, encoder.weighted)

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        every = batch["row"] if untyped else _rows_of(batch)
        filled = [{name: value for name, value in row.items() if value is not None} for row in every]
        return encoder.batch(filled, indices, [*keep_columns, *features])

    typed = {} if keep_columns else {"features": features}
    return rows.map(encode, batched=True, with_indices=True, remove_columns=columns, **typed)


def _one_column(row: dict[str, Any]) -> dict[str, dict]:
    return {"row": row}


def _read(columns: list[str], keep_columns: Sequence[str]) -> list[str]:
    """The columns that are used; or else one, without which there would be no rows."""
    return [name for name in columns if name in COLUMNS or name in keep_columns] or columns[:1]


def _rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _has_weights(rows: datasets.Dataset) -> bool:
    """Whether a row may give weights."""
    if {"weight", "token_weights"} & {*rows.column_names}:
        return True
    return any(_may_weigh(rows, name, feature) for name, feature in rows.features.items() if name in COLUMNS)


def _weighs(row: dict[str, Any]) -> bool:
    """Whether a row of a stream has a place for weights."""
    lists = [value for name, value in row.items() if name in COLUMNS and isinstance(value, list)]
    return bool({"weight", "token_weights"} & row.keys()) or any(
        isinstance(message, dict) and "weight" in message for messages in lists for message in messages
    )


def _may_weigh(rows: datasets.Dataset, name: str, feature: Any) -> bool:
    """Whether messages of a column may have a weight."""
    if isinstance(feature, datasets.Json):  # the key; inside a text its quotes have a backslash
        texts = rows.data.column(name).cast(pa.string())
        return bool(pyarrow.compute.any(pyarrow.compute.match_substring(texts, '"weight"')).as_py())
    message = getattr(feature, "feature", feature)  # what a list is made of
    message = message[0] if isinstance(message, list) else message
    return isinstance(message, datasets.Json) or (isinstance(message, dict) and "weight" in message)


@dataclass
class _Encoder:
    """Rows -> documents, counted. What is set once and read for every row."""

    tokenizer: Any
    max_length: int
    prompt_weight: float
    response_weight: float
    both_answers: bool
    reads_weights: bool = True
    weighted: bool = True
    chat: dict[str, Any] = field(default_factory=dict)  # arguments of `encode_chat`
    reading: Reading = Reading(False, {}, 0.0)
    counts: EncodingCounts = field(default_factory=EncodingCounts)

    def batch(self, rows: list[dict[str, Any]], indices: list[int], columns: list[str]) -> dict[str, list[Any]]:
        """The documents of rows, a list a column; columns that are not encoded are their row's."""
        made: dict[str, list[Any]] = {column: [] for column in columns}
        for row, index in zip(rows, indices, strict=True):
            for document in self.documents(row, index):
                for column, values in made.items():
                    values.append(document[column] if column in document else row.get(column))
        return made

    def documents(self, row: dict[str, Any], index: int) -> Iterator[dict[str, list[Any]]]:
        """What becomes of a row: `input_ids`, `labels` and, if `weighted`, `token_weights`."""
        layout, parts = read_row(row, index, self.reading)
        if layout != "token ids" and row.get("token_weights") is not None:
            raise RowError(
                index,
                "token_weights goes with input_ids and labels, whose tokens it counts; give text rows one "
                "`weight`, and messages one each",
            )
        weight = self.response_weight * checked_weight(row.get("weight"), index, "weight")
        self.counts.rows += 1
        self.counts.layouts[layout] = self.counts.layouts.get(layout, 0) + 1
        if self.both_answers and layout != "pair":
            raise RowError(
                index, f"both_answers takes preference pairs (chosen and rejected), but the row is a {layout}"
            )
        for part, encoded in zip(parts, self._encode(parts, row, index), strict=True):
            self.counts.answers_as_rows += max(len(encoded) - 1, 0)
            for document in encoded:
                weighs = row.get("weight") is not None or {*document.weights} - {None}
                if weighs and self.reads_weights and not self.weighted:
                    raise RowError(
                        index,
                        "it gives a weight, but the first row of the stream gives none, and so the stream has none; "
                        "give the first row one, too (1 changes nothing)",
                    )
                self.counts.untrained_answers += document.untrained
                if (cut := self._cut(document, weight * getattr(part, "weight", 1.0))) is not None:
                    yield cut

    def _encode(self, parts: list[Any], row: dict[str, Any], index: int) -> list[list[Encoded]]:
        """The documents of each part, of their full length."""
        if not self.both_answers:
            return [self._encode_alone(part, row, index) for part in parts]
        self.counts.chats += isinstance(parts[0], Chat)
        return [[answer] for answer in encode_pair(index, parts, self.tokenizer, row, self.chat["chat_template"])]

    def _encode_alone(self, part: Tokens | Text | Chat, row: dict[str, Any], index: int) -> list[Encoded]:
        if isinstance(part, Chat):
            self.counts.chats += 1
            return encode_chat(
                index,
                part.messages,
                self.tokenizer,
                tools=row.get("tools"),
                template_kwargs=row.get("chat_template_kwargs"),
                prompt_messages=part.prompt_messages,
                **self.chat,
            )
        if isinstance(part, Tokens):
            ids, labels = _check_ids(index, part.input_ids, part.labels, len(self.tokenizer))
            return [Encoded(ids, labels, _check_weights(index, part))]
        ids, labels = encode_text(part.prompt, part.response, self.tokenizer)
        return [Encoded(ids, labels, [None] * len(ids))]

    def _cut(self, document: Encoded, factor: float) -> dict[str, list[Any]] | None:
        """The document within the limit; None without a response token."""
        ids, weights = document.ids[: self.max_length], document.weights[1 : self.max_length]
        labels = [IGNORE_INDEX, *document.labels[1 : self.max_length]]
        counts = self.counts
        responses = sum(label != IGNORE_INDEX for label in labels)
        if responses == 0:
            counts.without_response += 1
            return None
        counts.documents += 1
        counts.truncated += len(document.ids) > self.max_length
        counts.tokens += len(ids)
        counts.response_tokens += responses
        counts.longest = max(counts.longest, len(ids))
        counts.largest_id = max(counts.largest_id, *ids)
        cut: dict[str, list[Any]] = {"input_ids": ids, "labels": labels}
        if self.weighted:
            cut["token_weights"] = [0.0] + [
                (self.prompt_weight if weight is None else weight)
                if label == IGNORE_INDEX
                else factor * (1.0 if weight is None else weight)
                for label, weight in zip(labels[1:], weights, strict=True)
            ]
        return cut


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


def _check_weights(index: int, row: Tokens) -> Sequence[float | None]:
    weights = row.token_weights
    if weights is None:
        return [None] * len(row.input_ids)
    if not isinstance(weights, list) or len(weights) != len(row.input_ids):
        length = len(weights) if isinstance(weights, list) else describe(weights)
        raise RowError(index, f"token_weights must be a list as long as input_ids ({len(row.input_ids)}); got {length}")
    for i, weight in enumerate(weights):
        if not is_finite(weight):
            raise RowError(index, f"token_weights[{i}] must be a finite number; got {weight!r}")
    return weights
