"""The commands as the tests call them, on a tiny model and a few rows."""

from __future__ import annotations

import json
import re

from tokensel.cli import main
from tokensel.testing import make_rows, make_tokenizer

ROWS = make_rows(12, seed=5)
LIMIT = 64
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}A"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


def make_tokenizer_with_chat(seed=5, vocab_size=320):
    tokenizer = make_tokenizer(make_rows(60, seed=seed), vocab_size=vocab_size)
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def score(model_dir, data, output, **settings):
    settings = {"model_name_or_path": model_dir, "dataset_name": data, "max_length": LIMIT, "output": output} | settings
    return main(["score", *flags(**settings)])


TRAIN = {
    "method": "sstoken",
    "use_cpu": "true",
    "report_to": "none",
    "max_length": LIMIT,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
}


def train(model_dir, data, out, *more, **settings):
    settings = TRAIN | {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": out} | settings
    return main(["train", *flags(**settings), *more])


def error_of(capsys):
    """The error message: one line, a hint in the next, no traceback. An unfinished progress bar may stand before."""
    err = capsys.readouterr().err
    (found,) = re.findall(r"tokensel: error: (.*)\n\(set TOKENSEL_TRACEBACK=1 to see where\)\n", err)
    assert "Traceback" not in err
    return found
