"""Checks built distributions: what wheel and sdist hold, and that the wheel installs and imports with no checkout.

python -m tools.check_dist dist
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib.metadata, tokensel, tokensel_kernels, tokensel.report.page
for package in (tokensel, tokensel_kernels):
    assert list(package.__path__)[0].startswith(sys.argv[1]), package.__path__
for name in tokensel.__all__:
    getattr(tokensel, name)
assert importlib.metadata.version("tokensel") == tokensel.__version__
print("imports:", tokensel.__version__)
"""


def package_files(folder: str, name: str) -> set[str]:
    """What a package of the checkout has to ship."""
    kinds = {".py", ".typed", ".html", ".json"}
    files = (path for path in (ROOT / folder).rglob("*") if path.suffix in kinds and "__pycache__" not in path.parts)
    return {f"{name}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}


def main(folder: Path) -> int:
    """Raises SystemExit with what is missing or too much."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    expected = package_files("tokensel", "tokensel") | package_files("kernels", "tokensel_kernels")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    if names != expected:
        raise SystemExit(f"{wheel.name}: missing {sorted(expected - names)}, too much {sorted(names - expected)}")
    with tempfile.TemporaryDirectory() as site:  # beside what is installed here, which it needs
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site]
        subprocess.run([*pip, str(wheel)], check=True)
        subprocess.run([sys.executable, "-I", "-c", CHECK, site], check=True, cwd=site)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "kernels/tiles.json", "tokensel/report/page.html"}
    if missing := needed - names:
        raise SystemExit(f"{sdist.name}: missing {sorted(missing)}")
    print(f"{wheel.name}: {len(expected)} files; {sdist.name}: {len(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
