"""Files and folders that are whole or not there: what is written takes its place at once."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
A_DAY = 86400  # seconds


def check_directory(setting: str, name_or_path: str | os.PathLike[str] | None) -> None:
    """Refuses what can only be a directory and is none, before a hub's client complains about its name.

    "name" and "owner/name" are left to the hub.

    Raises:
        FileNotFoundError: names the setting.
    """
    path = Path(name_or_path or "")
    only_a_path = isinstance(name_or_path, os.PathLike) or path.is_absolute() or len(path.parts) > 2
    only_a_path = only_a_path or str(name_or_path).startswith((".", "~"))
    only_a_path = only_a_path or str(name_or_path).endswith(os.sep)
    if only_a_path and not path.is_dir():
        what = "it is a file" if path.is_file() else "no such directory"
        raise FileNotFoundError(errno.ENOENT, f"{setting}: {what}; give a model's directory or its hub name", str(path))
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(errno.ENOENT, f"{setting}: no model's directory, for it has no config.json", str(path))


@contextlib.contextmanager
def naming_model(name: object) -> Iterator[None]:
    """Names the model over whose files a library stumbles: they may be anybody's, and what is raised is theirs too.

    Raises:
        ValueError: whatever was raised, but for errors of the system, of imports and of memory, which say enough.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} brings code of its own, which is never run here; read it, load the model in a script with "
                "trust_remote_code=True, and give it to a trainer"
            ) from error
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of a temporary file beside `path`, which takes its place when the block ends well.

    After any exception in the block the temporary file is gone, and `path` is what it was before. A link is replaced
    and not followed: where it leads is for whoever made it to say.

    Raises:
        OSError: `path` is a device or a pipe, which cannot be replaced.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "a device or a pipe cannot be replaced; name a file", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power loss might leave the name of a file that was never written
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def making_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder beside `path`, no one else's, which becomes `path` when the block ends well.

    After any exception in the block that folder is gone. Where someone else made `path` meanwhile, theirs stays: it is
    whole. What a killed process has left of `path` is removed once it is a day old.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(path)
    temporary = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
    try:
        unfinished = temporary / path.name  # mkdtemp's own folder is closed to other users
        unfinished.mkdir()
        yield unfinished
        try:
            os.rename(unfinished, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left_over(path: Path) -> None:
    """Removes what killed processes have left beside a file or folder they were making, a day ago or more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_old(left) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        elif _is_old(left):
            left.unlink(missing_ok=True)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > A_DAY
    except FileNotFoundError:  # whoever made it has just ended
        return False


@contextlib.contextmanager
def naming_a_full_disk(path: str | os.PathLike[str], what: str, advice: str) -> Iterator[None]:
    """An OSError for a full disk keeps its errno and says what was being written and what to do; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)} while writing {what}; {advice}", str(path)) from error
