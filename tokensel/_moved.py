"""Where what was imported before 0.2 is now. Old imports work for one release, with a warning; then this file goes."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

NAMES = {"TokenSelector": "SelectionMethod"}  # of `tokensel` itself and of the modules below

MODULES = {
    "tokensel.attention": "tokensel.ops.prompt_mass",
    "tokensel.checks": "tokensel.ops.checks",
    "tokensel.loss": "tokensel.ops.loss",
    "tokensel.methods": "tokensel.select.methods",
    "tokensel.planted": "tokensel.testing",
    "tokensel.products": "tokensel.ops.products",
    "tokensel.reference": "tokensel.ops.reference",
    "tokensel.scores": "tokensel.select.scores",
    "tokensel.signals": "tokensel.select.signals",
    "tokensel.stats": "tokensel.ops.stats",
    "tokensel.watch": "tokensel.report.watch",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module of the new name to whoever imports the old one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = MODULES[spec.name]
        warnings.warn(f"{spec.name} is now {new}; the old name goes with 0.3", FutureWarning, stacklevel=2)
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        # not the new module itself: importing sets __spec__ and the parent's attribute on what it is given
        new = importlib.import_module(MODULES[module.__name__])
        module.__dict__.update({name: value for name, value in vars(new).items() if not name.startswith("__")})
        module.__dict__.update({old: vars(new)[name] for old, name in NAMES.items() if name in vars(new)})


def install() -> None:
    """Puts the finder behind all others, so that it is asked for names that nothing else knows."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
