"""Checks built distributions: what the wheel and the sdist hold, and that the wheel imports where no checkout is.

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
import sys, tokensel, tokensel_kernels, tokensel.report.page
unpacked = sys.argv[1]
for package in (tokensel, tokensel_kernels):
    assert list(package.__path__)[0].startswith(unpacked), package.__path__
assert set(tokensel.__all__) <= set(dir(tokensel))
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
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        if names != expected:
            raise SystemExit(f"{wheel.name}: missing {sorted(expected - names)}, too much {sorted(names - expected)}")
        archive.extractall(unpacked)
        code = f"import sys; sys.path.insert(0, {unpacked!r}); sys.argv = ['', {unpacked!r}]\n{CHECK}"
        subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=unpacked)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "kernels/tiles.json", "tokensel/report/page.html"}
    if missing := needed - names:
        raise SystemExit(f"{sdist.name}: missing {sorted(missing)}")
    print(f"{wheel.name}: {len(expected)} files; {sdist.name}: {len(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
