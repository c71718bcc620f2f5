"""README and docs: what they show runs, what they name is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import lora
from transformers import DataCollatorForSeq2Seq

from tokensel.cli import COMMANDS, main
from tokensel.data import encode_rows
from tokensel.select import method
from tokensel.testing import make_model, make_rows, make_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"^\w+ = \.\.\..*$", re.MULTILINE)  # `model = ...`, which the test stands in for


def blocks(page):
    """(code, line that it begins in, why it is not run or None) of every block of Python."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        yield block["code"], text[: block.start("code")].count("\n"), block["reason"]


WITH_BLOCKS = [page for page in PAGES if any(blocks(page))]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What a reader has: models with adapters, a tokenizer, rows, batches, an optimizer; files go to a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(method, "_METHODS", dict(method._METHODS))  # what a page registers
    text = make_rows(8, seed=3)
    tokenizer = make_tokenizer(text, vocab_size=300)
    model, peft_model = (
        lora(make_model(tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=1, seed=3)) for _ in range(2)
    )
    rows, _ = encode_rows(text, tokenizer, 64)
    collator = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    return {
        "model": model,
        "peft_model": peft_model,
        "tokenizer": tokenizer,
        "rows": rows,
        "collator": collator,
        "loader": [collator([rows[i] for i in range(first, first + 4)]) for first in (0, 4)],
        "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
    }


def trained(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_in_its_order(page, given):
    for code, line, reason in blocks(page):
        # padded, so that a traceback names the line of the page
        compiled = compile("\n" * line + PLACEHOLDER.sub("", code), str(page), "exec")
        if reason is None:
            exec(compiled, given)


def test_the_loop_of_the_readme_runs_from_an_empty_file_and_advances(tmp_path):
    ((loop, _, _),) = blocks(ROOT / "README.md")
    file = tmp_path / "loop.py"
    file.write_text(loop + "print(selection.progress)\n", encoding="utf-8")
    done = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, last, progress = done.stdout.splitlines()
    assert progress == "Progress(steps=8, samples=64, rows=0)"
    loss, kept, responses = map(float, re.fullmatch(r"loss (\S+), kept (\d+) of (\d+) tokens", last).groups())
    assert loss < 6 and 0.6 <= kept / responses < 0.7


def test_the_trainer_of_the_first_steps_trains(given):
    code = next(code for code, *_ in blocks(ROOT / "docs" / "start.md") if "SelectiveTrainer(" in code)
    before = trained(given["peft_model"])
    exec(code, given)
    assert given["args"].method == "sstoken" and list(Path("run").iterdir())
    assert any(not torch.equal(a, b) for a, b in zip(before, trained(given["peft_model"]), strict=True))


def commands(page, program):
    """The arguments of every call of a program in the blocks of shell and in the inline code of a page."""
    text = page.read_text(encoding="utf-8")
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = re.findall(r"^    (\S.*)", text, re.MULTILINE)
    inline = re.findall(rf"`({program} [^`]+)`", text)
    for line in [*shell.replace("\\\n", " ").splitlines(), *indented, *inline]:
        if line.startswith(f"{program} "):
            yield shlex.split(line, comments=True)[1:]


@pytest.fixture(scope="module")
def help_of():
    """What `tokensel COMMAND --help` prints, asked once."""
    printed = {}

    def ask(command, capsys):
        if command not in printed:
            with pytest.raises(SystemExit):
                main([command, "--help"])
            printed[command] = capsys.readouterr().out
        return printed[command]

    return ask


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_their_flags_are_there(page, capsys, help_of):
    for command, *words in commands(page, "tokensel"):
        if command.startswith("--"):
            continue
        assert command in COMMANDS, f"tokensel {command}"
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"(?<!\S){re.escape(flag)}\b", help_of(command, capsys)), f"tokensel {command} {flag}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_targets_of_make_and_modules_are_there(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target, *_ in commands(page, "make"):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"make {target}"
    for flag, module, *_ in commands(page, "python"):
        path = ROOT / module.replace(".", "/")
        assert flag == "-m" and (path.with_suffix(".py").exists() or (path / "__main__.py").exists()), module


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://", "#")):
            assert (page.parent / target.partition("#")[0]).is_file(), f"{page.name}: {target}"


def test_the_first_page_is_short_and_the_tree_is_whole():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = (path.relative_to(ROOT / "tokensel").as_posix() for path in (ROOT / "tokensel").rglob("*.py"))
    assert [name for name in files if not name.endswith("__init__.py") and f"`{name}`" not in design] == []
