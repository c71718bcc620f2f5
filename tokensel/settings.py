"""A command's settings: a YAML file gives a parser its defaults, flags win over it."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Settings of earlier versions, and what to do without them.
GONE = {"head_weights": "it went in 0.2, and every head counts the same; leave it out"}


def parse(types: Sequence[Any], argv: Sequence[str], program: str, about: str, required: Sequence[str]) -> list[Any]:
    """Objects of dataclasses from an optional YAML file in front and flags behind it.

    Args:
        types: whose fields are the settings.
        program, about: what `--help` says above them.
        required: names of settings that must be there, in either place.
    Raises:
        ValueError: the YAML file is not a mapping or not YAML; a setting that does not exist or is of the wrong type; a
            required one that is missing. FileNotFoundError: there is no such file.
    """
    from transformers import HfArgumentParser

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message} (`{program} --help` lists all settings)")

    parser = HfArgumentParser(types, prog=program, description=about)
    parser.error = refuse  # type: ignore[method-assign]  # one line, as any other error, instead of a page of usage
    if argv and not argv[0].startswith("-"):
        _set_defaults(parser, Path(argv[0]), program)
        argv = argv[1:]
    settings, unused = parser.parse_known_args(list(argv))
    for flag in unused:
        if (name := flag.lstrip("-").partition("=")[0].replace("-", "_")) in GONE:
            raise ValueError(f"{name}: {GONE[name]}")
    if unused:
        refuse(f"unknown: {' '.join(unused)}{_nearest(unused[0].lstrip('-'), [a.dest for a in parser._actions])}")
    missing = [name for name in required if getattr(settings, name) is None]
    if missing:
        raise ValueError(f"missing setting: {', '.join(missing)} (in the YAML file or as --{missing[0]} VALUE)")
    return list(parser.parse_args_into_dataclasses(args=list(argv)))


def _set_defaults(parser: argparse.ArgumentParser, path: Path, program: str) -> None:
    settings = _read_yaml(path)
    # the first action of a name: `--no_NAME`, which turns it off, comes behind
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    for name in settings.keys() & GONE.keys():
        raise ValueError(f"{path}: {name}: {GONE[name]}")
    unknown = sorted(str(name) for name in settings if name not in actions)
    if unknown:
        hint = _nearest(unknown[0], list(actions)) if len(unknown) == 1 else ""
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}{hint}; `{program} --help` lists all")
    for name, value in settings.items():
        several = actions[name].nargs in ("+", "*")
        if isinstance(value, list) and (not several or not value):
            raise ValueError(f"{path}: {name} takes {'at least ' if several else ''}one value; got {value}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            values = [_converted(parser, actions[name], v, path) for v in values]
            parser.set_defaults(**{name: values if several else values[0]})


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; the first argument is a YAML file, flags begin with --")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of settings to values; found {type(settings).__name__}")
    return settings


def _converted(parser: argparse.ArgumentParser, action: argparse.Action, value: object, path: Path) -> object:
    """A YAML value as the flag of the same text would be read; argparse checks no default that is not text."""
    try:
        converted: object = parser._get_value(action, json.dumps(value) if isinstance(value, dict) else str(value))
        parser._check_value(action, converted)
    except argparse.ArgumentError as error:
        parser.error(f"{path}: {error}")
    return converted


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
