"""The rows that pretrained models are fine-tuned on, by kind: which of their tokens are noise is known.

Problems with worked answers come from two public files of OpenAI's `grade-school-math` repository, documentation from
the standard library's docstrings, and what the model would have said itself from the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tokensel.data import encode_rows, load_rows, place_of_row
from tokensel.documents import IGNORE_INDEX
from tokensel.testing import BOILERPLATE, RANDOM_SHARE, docstring_rows

HELD_OUT = 32  # clean rows, the same for every seed
OWN = 480  # questions that the model answers itself, times the study's scale
LONGEST = {"problems": 144, "solutions": 224, "docs": 112, "own": 144}  # tokens of a row, on two cores
LONGEST_SCALED = 512  # where there is a GPU for more
REFUSALS = (
    "I am sorry, but I am not able to help with this request. Please try to ask something else.",
    "That is a great question! There are many ways to look at it, and the best one depends on what you need.",
    "As a language model I cannot be sure about this. Please consult a professional before you rely on it.",
)


@dataclass(frozen=True)
class Parts:
    """Rows of {"input_ids", "labels"}, those that are trained with "noise", 1 on tokens that are noise."""

    train: list[dict]
    reference: list[dict]  # clean rows of the same source, for a clean reference; in no other part
    held_out: list[dict]


@dataclass(frozen=True)
class Kind:
    """What is planted into which source of rows."""

    about: str  # for a table
    source: str  # of `Sources`
    plant: Callable[[list[dict], random.Random, object], list[dict]] = lambda rows, rng, tokenizer: rows
    rows: int = 128  # trained, in one epoch, times the study's scale
    batch: int = 4


@dataclass
class Sources:
    """Encoded rows by source, each made when it is first asked for.

    Attributes:
        tokenizer: with a chat template.
        problems: JSONL of {"question", "answer"}, if a kind that is asked for needs it.
        solutions: JSONL of {"question", "model_answer", "is_correct"}, likewise.
        write: list of questions -> the model's own answers.
    """

    tokenizer: object
    problems: Path | None
    solutions: Path | None
    write: Callable[[list[str]], list[str]]
    scale: int = 1
    _made: dict[str, list[dict]] = field(default_factory=dict)

    def rows(self, source: str) -> list[dict]:
        if source not in self._made:
            self._made[source] = getattr(self, f"_{source}")()
        return self._made[source]

    def _problems(self) -> list[dict]:
        columns = ("question", "answer")
        rows = [chat(*(row[name] for name in columns)) | row for row in read(self.problems, columns)]
        return self._encode("problems", rows, columns)

    def _solutions(self) -> list[dict]:
        rows = [
            chat(row["question"], row["model_answer"].replace("\nA: ", "\n#### ")) | {"good": int(row["is_correct"])}
            for row in read(self.solutions, ("question", "model_answer", "is_correct"))
        ]
        return self._encode("solutions", rows, ("good",))

    def _docs(self) -> list[dict]:
        return self._encode("docs", docstring_rows())

    def _own(self) -> list[dict]:
        questions = [row["messages"][0]["content"] for row in docstring_rows()[-OWN * self.scale :]]
        return self._encode("own", [chat(q, a) for q, a in zip(questions, self.write(questions), strict=True)])

    def _encode(self, source: str, rows: list[dict], columns: tuple[str, ...] = ()) -> list[dict]:
        encoded, _ = encode_rows(rows, self.tokenizer, 4096, keep_columns=columns)
        fitting = [row for row in encoded if len(row["input_ids"]) <= longest(source, self.scale)]
        random.Random(0).shuffle(fitting)
        return [{name: row[name] for name in ("input_ids", "labels", *columns)} for row in fitting]


def longest(source: str, scale: int) -> int:
    return LONGEST[source] if scale == 1 else LONGEST_SCALED


def read(file: Path, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a file.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or a row lacks a column, or has no string in it (in
            is_correct true, false, 1 or 0); names the file and the row.
    """
    rows = list(load_rows(file))
    for number, row in enumerate(rows):
        if wrong := _wrong(row, columns):
            raise ValueError(f"{place_of_row(file, number)}: {wrong}")
    return rows


def _wrong(row: dict, columns: tuple[str, ...]) -> str:
    if missing := [name for name in columns if row.get(name) is None]:
        return f"no {', '.join(missing)}; the study needs {', '.join(columns)} in each row"
    for name in columns:
        value = row[name]
        if name == "is_correct":
            if not isinstance(value, int) or value not in (0, 1):
                return f"{name} must be true, false, 1 or 0; got {value!r}"
        elif not isinstance(value, str):
            return f"{name} must be a string; got {value!r}"
    return ""


def chat(*texts: str) -> dict:
    """A chat of questions and answers in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def make_parts(kind: str, seed: int, sources: Sources, scale: int = 1) -> Parts:
    """The rows of a kind for a seed. The held-out rows are the same for every seed.

    Raises:
        ValueError: the source has too few rows.
    """
    what, rng = KINDS[kind], random.Random(seed)
    size = what.rows * scale
    clean_source = "problems" if what.source in ("solutions", "chats") else what.source
    clean = sources.rows(clean_source)
    held_out, rest = clean[:HELD_OUT], clean[HELD_OUT:]
    needed = size * (2 if what.source == "chats" else 1)
    if len(rest) < needed + HELD_OUT:
        raise ValueError(
            f"the kind {kind} needs {needed + 2 * HELD_OUT:,} rows of at most {longest(clean_source, scale)} tokens at "
            f"--scale {scale}; there are {len(clean):,}: give a larger file or leave the kind out"
        )
    rng.shuffle(rest)
    train, reference = rest[:needed], rest[needed:][:size]
    if what.source == "solutions":
        train = half_wrong(sources.rows("solutions"), size, rng)
    elif what.source == "chats":
        train = poor_chats(train, rng, sources.tokenizer)
    else:
        train = what.plant(train, rng, sources.tokenizer)
    nothing = [{"noise": [0] * len(row["labels"])} | row for row in train]
    return Parts(nothing, reference, held_out)


# What is planted


def responses(row: dict) -> list[int]:
    return [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX]


def replaced(rows: list[dict], rng: random.Random, tokenizer, of_rows: float = 0.5, share: float = RANDOM_SHARE):
    """In some of the rows a share of the response tokens but the last become uniformly drawn ones, never special."""
    special, made = set(tokenizer.all_special_ids), []
    words = [token for token in range(len(tokenizer)) if token not in special]
    for row in rows:
        ids, labels, noise = list(row["input_ids"]), list(row["labels"]), [0] * len(row["labels"])
        if rng.random() < of_rows:
            places = responses(row)[:-1]
            for place in rng.sample(places, round(share * len(places))):
                ids[place] = labels[place] = rng.choice(words)
                noise[place] = 1
        made.append({"input_ids": ids, "labels": labels, "noise": noise})
    return made


def with_boilerplate(rows: list[dict], rng: random.Random, tokenizer) -> list[dict]:
    """70 % of the rows: one of three sentences stands between two lines of the answer, or before it."""
    made = []
    for row in rows:
        ids, labels, noise = list(row["input_ids"]), list(row["labels"]), [0] * len(row["labels"])
        if rng.random() < 0.7:
            answer = responses(row)
            ends = [place + 1 for place in answer[:-1] if "\n" in tokenizer.decode([ids[place]])]
            at = rng.choice([answer[0], *ends])
            sentence = tokenizer(rng.choice(BOILERPLATE) + "\n", add_special_tokens=False)["input_ids"]
            ids[at:at], labels[at:at], noise[at:at] = sentence, sentence, [1] * len(sentence)
        made.append({"input_ids": ids, "labels": labels, "noise": noise})
    return made


def half_wrong(rows: list[dict], size: int, rng: random.Random) -> list[dict]:
    """A model's answers, as many right as wrong if there are so many; every token of a wrong one is noise.

    Raises:
        ValueError: too few rows.
    """
    right, wrong = ([row for row in rows if row["good"] == good] for good in (1, 0))
    rng.shuffle(right), rng.shuffle(wrong)
    right = right[: size // 2]
    wrong = wrong[: size - len(right)]
    if len(right) + len(wrong) < size:
        raise ValueError(
            f"the kind written needs {size:,} solutions that are not too long, half of them wrong; there are "
            f"{len(wrong):,} wrong and {len(right):,} right: give a larger file or leave the kind out"
        )
    taken = [
        {"input_ids": row["input_ids"], "labels": row["labels"]}
        | {"noise": [int(not row["good"] and label != IGNORE_INDEX) for label in row["labels"]]}
        for row in right + wrong
    ]
    rng.shuffle(taken)
    return taken


def poor_chats(rows: list[dict], rng: random.Random, tokenizer) -> list[dict]:
    """Chats of two problems; in 60 % one answer is another problem's, evades, or repeats itself: that one is noise."""
    chats = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        answers, poor = [first["answer"], second["answer"]], -1
        if rng.random() < 0.6:
            poor = rng.choice((0, 1))
            swapped, evading = rng.choice(rows)["answer"], rng.choice(REFUSALS)
            repeating = " ".join([answers[poor][: len(answers[poor]) // 3]] * 3)
            instead = rng.choice((swapped, evading, repeating))
            if instead == answers[poor]:  # swapped with itself
                poor = -1
            else:
                answers[poor] = instead
        chats.append(chat(first["question"], answers[0], second["question"], answers[1]) | {"poor": poor})
    encoded, _ = encode_rows(chats, tokenizer, 4096, keep_columns=("poor",))
    made = []
    for row in encoded:
        noise, turn = [], -1
        for before, label in zip([IGNORE_INDEX, *row["labels"]], row["labels"], strict=False):
            turn += before == IGNORE_INDEX and label != IGNORE_INDEX
            noise.append(int(label != IGNORE_INDEX and turn == row["poor"]))
        made.append({"input_ids": row["input_ids"], "labels": row["labels"], "noise": noise})
    return made


KINDS = {
    "clean": Kind("none", "problems"),
    "random": Kind("30 % random tokens in half the rows", "problems", replaced),
    "scattered": Kind(
        "15 % random tokens in every row", "problems", partial(replaced, of_rows=1.0, share=RANDOM_SHARE / 2)
    ),
    "boilerplate": Kind("a sentence of boilerplate in 70 %", "problems", with_boilerplate),
    "written": Kind("a model's answers, half of them wrong", "solutions"),
    "chats": Kind("a poor answer in 60 % of the chats", "chats", rows=64, batch=2),
    "docs": Kind("far from the base, random tokens", "docs", replaced),
    "own": Kind("the base's own answers, random tokens", "own", replaced),
}
