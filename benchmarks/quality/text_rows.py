"""Rows of a file of text, for the study of real text: what the base learns from, what is corrupted, what is clean."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.worlds import SHORT
from tokensel.data import encode_rows, load_rows, place_of_row
from tokensel.testing import make_tokenizer

LENGTH = 256  # tokens of a row
TEXT_ROWS = {"held_out": 200, "noisy": SHORT * 16, "clean": SHORT * 16}


def text_parts(file: Path, scale: int) -> dict:
    """A file's rows for (b): the base learns from one half, the rest is in the other and nowhere else.

    Raises:
        ValueError: too few rows, or one that is no prompt with a completion; names the file.
    """
    rows = []
    for number, row in enumerate(load_rows(file)):
        try:
            rows.append(as_prompt_and_completion(row))
        except ValueError as error:
            raise ValueError(f"{place_of_row(file, number)}: {error}") from error
    noisy, clean = TEXT_ROWS["noisy"] * scale, TEXT_ROWS["clean"] * scale
    if len(rows) < (needed := 2 * (noisy + clean)):
        raise ValueError(
            f"{file} has {len(rows):,} rows, and `text` needs {needed:,} at --scale {scale}: half for the base and the "
            f"held-out rows, {noisy:,} to corrupt, {clean:,} for a clean reference; give a larger file"
        )
    held_out, half = TEXT_ROWS["held_out"], len(rows) // 2
    parts = {
        "held_out": rows[:held_out],
        "base": rows[held_out:half],
        "later": rows[half:-clean],
        "clean": rows[-clean:],
    }
    tokenizer = make_tokenizer(parts["base"], vocab_size=2048)
    for name in ("held_out", "base", "clean"):
        try:
            parts[name] = [dict(row) for row in encode_rows(parts[name], tokenizer, LENGTH)[0]]
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return parts | {"tokenizer": tokenizer}


def as_prompt_and_completion(row: dict) -> dict:
    """The texts of a row; of a chat the last answer, behind all that was said before it.

    Raises:
        ValueError: it has none of the columns, or no answer.
    """
    for prompt, completion, joint in (("prompt", "completion", ""), ("question", "answer", "\n")):
        if isinstance(row.get(prompt), str) and isinstance(row.get(completion), str):
            return {"prompt": row[prompt] + joint, "completion": row[completion]}
    if isinstance(turns := row.get("messages"), list):
        fields = [(turn.get("role"), turn.get("content")) for turn in turns if isinstance(turn, dict)]
        if len(fields) < len(turns) or not all(isinstance(field, str) for turn in fields for field in turn):
            raise ValueError("messages must be a list of {role, content}, both strings")
        while fields and fields[-1][0] != "assistant":
            fields.pop()
        if not fields:
            raise ValueError("messages must hold an assistant's message")
        # no chat template: the tokenizer is made of these rows
        before = "".join(f"{role}: {content}\n" for role, content in fields[:-1])
        return {"prompt": f"{before}assistant: ", "completion": fields[-1][1]}
    columns = sorted(name for name, value in row.items() if value is not None)
    raise ValueError(f"rows must have prompt and completion, question and answer, or messages; got {columns}")
