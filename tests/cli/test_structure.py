"""The house: who imports whom, how long files are, which words are gone, what old names lead to."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokensel
import tokensel.data
import tokensel.parallel
from tokensel.ops.context_parallel import MassParts

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tokensel"

# From the ground up: a module imports from its own line and from those above it alone.
FLOORS = [
    "_moved",
    "files",
    "ops.products ops.block_shapes",
    "ops.checks ops.operators ops.reference ops.token_stats ops.score_blocks ops.vocab_parallel",
    "ops.chunked ops.context_parallel ops.prompt_mass",
    "ops.chunked_grad ops.stats ops.prompt_mass_varlen ops.logits_blocks",
    "ops.loss ops.logprobs",
    "ops.divergence",
    "documents parallel report.table",
    "report.plot report.page",
    "report",
    "select.signals",
    "select.rules",
    "select",
    "select.scores select.method",
    "select.across select.weightings",
    "select.methods",
    "store.format",
    "store.reader store.writer",
    "store",
    "store.shards store.encoded",
    "capture families",
    "model",
    "model_facts",
    "adapters preferences recording",
    "history",
    "step",
    "data.readers",
    "data.collators data.repeats data.rows data.text",
    "data.chat",
    "data.layouts",
    "data.pairs",
    "data.encode",
    "data",
    "arguments metrics settings",
    "report.watch choose_history checkpoint",
    "trainer pretrained",
    "sft testing trl_logprobs",
    "loading comparison",
    "ranking on_ray",
    "offline finetune",
    "cli",
    "__main__",
]
FLOOR = {f"tokensel.{name}": number for number, names in enumerate(FLOORS) for name in names.split()}
# `tokensel` itself gives the public names, and is imported for its version and its list of methods.
FACE = {"tokensel", "tokensel.ops"}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """Modules of the package that a file imports anywhere but for its types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tokensel"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def test_every_module_has_its_floor():
    assert set(MODULES) - FACE == set(FLOOR)


@pytest.mark.parametrize("module", sorted(set(MODULES) - FACE))
def test_imports_run_downward_so_there_is_no_circle(module):
    for name in imports(MODULES[module]):
        if name in MODULES and name not in FACE:
            inside = name != module and name.startswith(f"{module}.")  # a package's face gives its modules' names
            assert inside or FLOOR[name] < FLOOR[module] or name == module, f"{module} imports {name}"


@pytest.mark.parametrize("folder", ["tokensel", "kernels", "benchmarks", "tools", "examples", "tests"])
def test_no_file_is_longer_than_400_lines(folder):
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


GONE = "Seam TokenSelector statistics_to_loss losses_under cut_of_top may_wait head_weights rel_scale WeightsCollator"
GONE += " EncodingReport rank_per_sample journal _left _right"


@pytest.mark.parametrize("word", GONE.split())
def test_an_old_name_is_where_it_says_what_became_of_it_and_nowhere_else(word):
    allowed = {"_moved.py", "__init__.py", "settings.py", "method.py", "test_structure.py", "CHANGELOG.md"}
    allowed |= {"test_cli_settings.py"}
    folders = ("tokensel", "kernels", "benchmarks", "tools", "examples", "tests", "docs")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".yaml")]
    files = [p for p in files if "_build" not in p.parts and p.name not in allowed] + [ROOT / "README.md"]
    pattern = re.compile(rf"\b{word}\b")
    assert [p.name for p in files if pattern.search(p.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_old_modules_are_imported_with_a_warning_and_give_the_same_objects():
    code = """
import importlib, sys, warnings
import tokensel
from tokensel import _moved
for old, new in _moved.MODULES.items():
    warnings.simplefilter("error")
    try:
        importlib.import_module(old)
    except FutureWarning as warning:
        assert new in str(warning), old
    else:
        raise SystemExit(f"{old}: no warning")
    warnings.simplefilter("ignore")
    old, new = importlib.import_module(old), importlib.import_module(new)
    names = [n for n in vars(new) if not n.startswith("_")]
    assert names and all(getattr(old, n) is getattr(new, n) for n in names), old
from tokensel.methods import TokenSelector
assert TokenSelector is tokensel.SelectionMethod
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_old_public_name_warns_and_is_the_new_one():
    with pytest.warns(FutureWarning, match="tokensel.TokenSelector is now tokensel.SelectionMethod"):
        assert tokensel.TokenSelector is tokensel.SelectionMethod
    with pytest.warns(FutureWarning, match="is now SelectionCollator"):
        assert tokensel.data.WeightsCollator is tokensel.data.SelectionCollator
    with pytest.warns(FutureWarning, match="is now in tokensel.ops.context_parallel"):
        assert tokensel.parallel.MassParts is MassParts
    with pytest.raises(AttributeError, match="module 'tokensel' has no attribute 'TokenSelektor'"):
        _ = tokensel.TokenSelektor


def test_names_that_load_late_are_listed():
    assert set(tokensel.__all__) <= set(dir(tokensel)) and {"apply_to", "SelectiveSFTTrainer"} <= set(tokensel.__all__)
