from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml

import tokensel

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, cwd: Path, *args: object) -> str:
    """Standard output of a fresh interpreter that starts in `cwd`, away from the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tokensel_kernels_is_the_kernels_folder(tmp_path):
    code = "import tokensel_kernels; print(*tokensel_kernels.__path__, sep='\\n')"
    assert ROOT / "kernels" in [Path(path).resolve() for path in run_python(code, tmp_path).splitlines()]


def test_kernels_folder_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "see setup.py"


def test_checkout_on_the_path_does_not_shadow_the_hugging_face_kernels(tmp_path):
    other = tmp_path / "site-packages" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    code = "import sys; sys.path[:0] = sys.argv[1:]; import kernels; print(kernels.__file__)"
    assert run_python(code, tmp_path, ROOT, other.parent) == str(other / "__init__.py")


def test_import_needs_torch_alone(tmp_path):
    code = "import sys, tokensel; print(*{name.partition('.')[0] for name in sys.modules}, sep='\\n')"
    imported = set(run_python(code, tmp_path).splitlines())
    assert {"tokensel", "torch"} <= imported
    optional = {"transformers", "triton", "datasets", "pyarrow", "peft", "accelerate", "matplotlib", "trl"}
    assert imported & optional == set()


def test_a_cpu_needs_torch_alone_to_train_on_selected_tokens(tmp_path):
    code = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # an import of these fails
import torch, tokensel
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
labels = torch.tensor([1, 2, -100, 3, 4, 8])
stats = tokensel.token_stats(hidden, weight, labels)
tokensel.selected_cross_entropy(hidden, weight, labels, torch.tensor([1.0, 0, 0, 1, 0, 1])).backward()
print(bool(stats.nll.isfinite().all() and hidden.grad[0].any() and not hidden.grad[1].any()))
"""
    absent = "transformers triton datasets pyarrow peft accelerate matplotlib trl yaml tqdm"
    assert run_python(code, tmp_path, *absent.split()) == "True"


def test_every_public_name_loads():
    for name in tokensel.__all__:
        assert getattr(tokensel, name) is not None


def test_metadata_has_the_version_and_a_console_script_that_loads():
    assert importlib.metadata.version("tokensel") == tokensel.__version__
    (script,) = importlib.metadata.distribution("tokensel").entry_points.select(group="console_scripts")
    assert script.name == "tokensel"
    assert callable(script.load())


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == tokensel.__version__
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest[1] == tokensel.__version__


def test_wheel_holds_both_packages_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tokensel", "kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for copied in source.rglob("*"):  # of a checkout that may be read-only
        copied.chmod(0o755 if copied.is_dir() else 0o644)
    (source / "kernels" / "probe.py").write_text("FOUND = True\n")  # so that there is a module to be found

    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", tmp_path, source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("tokensel-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    assert {name.partition("/")[0] for name in names} == {
        "tokensel",
        "tokensel_kernels",
        f"tokensel-{tokensel.__version__}.dist-info",
    }
    assert {name for name in names if name.startswith("tokensel/")} == {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "py.typed", "page.html")
        for path in (ROOT / "tokensel").rglob(pattern)
    }
    tables = {"tiles.json", "rates.json", "estimates.json"}
    assert {n.split("/")[1] for n in names if n.startswith("tokensel_kernels/") and not n.endswith(".py")} == tables
    for name in tables:
        shipped = tmp_path / "unpacked" / "tokensel_kernels" / name
        assert shipped.read_text() == (ROOT / "kernels" / name).read_text()

    code = "import sys; sys.path.insert(0, sys.argv[1]); import tokensel_kernels.probe as p; print(p.__file__)"
    unpacked = tmp_path / "unpacked"
    assert run_python(code, tmp_path, unpacked) == str(unpacked / "tokensel_kernels" / "probe.py")
