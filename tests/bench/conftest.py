"""A tiny pretrained model and files of rows, for the study of pretrained models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from benchmarks.quality import real_rows
from benchmarks.quality.real_rows import KINDS, Sources
from tokensel.testing import make_model, make_rows, make_tokenizer

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SMALL = dict.fromkeys(KINDS, 12) | dict.fromkeys(("random", "boilerplate", "chats", "docs", "own"), 30)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder of a tiny model, and files of problems and solutions."""
    folder = tmp_path_factory.mktemp("made")
    texts = make_rows(300, seed=0)
    tokenizer = make_tokenizer(texts, vocab_size=400)
    tokenizer.chat_template = TEMPLATE
    make_model(tokenizer, hidden_size=32, heads=2, kv_heads=1, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = [{"question": row["prompt"], "answer": row["completion"] + "\n#### 7"} for row in distinct(texts)]
    write(folder / "problems.jsonl", problems)
    solutions = [
        {"question": r["prompt"], "model_answer": "wrong" if i % 3 else "right", "is_correct": i % 3 == 0}
        for i, r in enumerate(texts[:30])
    ]
    write(folder / "solutions.jsonl", solutions)
    return folder


def distinct(rows):
    return list({row["prompt"]: row for row in rows}.values())


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def small(monkeypatch):
    """Few rows of each kind, and few docstrings."""
    docs = [real_rows.chat(f"What is {row['prompt']}", row["completion"]) for row in distinct(make_rows(80, seed=1))]
    monkeypatch.setattr(real_rows, "docstring_rows", lambda: docs)
    monkeypatch.setattr(real_rows, "HELD_OUT", 8)
    for kind, what in KINDS.items():
        monkeypatch.setitem(KINDS, kind, replace(what, rows=SMALL[kind]))


@pytest.fixture
def sources(made, small):
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    files = (made / "problems.jsonl", made / "solutions.jsonl")
    return Sources(
        tokenizer,
        *files,
        lambda questions: [f"I say {i} of what you ask, and no more." for i, _ in enumerate(questions)],
    )
