"""What a figure has to be read with: processor, memory, versions, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import tokensel

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn", "flash-attn-3",
)  # fmt: skip


def machine(device: torch.device) -> dict:
    """The machine, and the state of everything that is measured on it."""
    values = {
        "device": device.type,
        "capability": torch.backends.cpu.get_cpu_capability(),  # what PyTorch uses of the processor
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokensel": tokensel.__version__,
        "commit": _commit() or "unknown",
    }
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            values[package] = metadata.version(package)
    if device.type == "cuda":
        values |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or torch.version.hip}
    return values


def short_commit(commit: str) -> str:
    """A commit as tables print it: ten digits, and "+changes" where what is measured was not as committed."""
    digits, plus, changes = commit.partition("+")
    return digits[:10] + plus + changes


def _processor() -> str:
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            if "model name" in line:
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """TOKENSEL_COMMIT, or the commit that is checked out; "" without git."""
    commit = os.environ.get("TOKENSEL_COMMIT", "")
    if commit or not shutil.which("git"):
        return commit
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    # what the suite itself writes changes nothing that is measured
    status = [*git, "status", "--porcelain", "-uno", "--", "tokensel", "kernels", "benchmarks/*.py"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    return commit + "+changes" * bool(changed)
