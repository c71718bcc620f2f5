"""The state of a selection in a trainer's checkpoint: what was drawn, averaged and seen goes on in a resumed run."""

from __future__ import annotations

import os
import re
import reprlib
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tokensel.files import replacing
from tokensel.step import Selection

STATE_FILE = "selection_state.safetensors"


def save_selection(directory: str, selection: Selection, history: str) -> None:
    """Writes the state into a checkpoint. history: the name that the settings give it."""
    state = selection.state_dict() | {"history": history}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.pop("tensors").items()}
    with replacing(os.path.join(directory, STATE_FILE)) as temporary:
        save_file(tensors, temporary, {name: str(value) for name, value in state.items()})


def load_selection(directory: str, selection: Selection, history: str, steps: int, samples: int) -> None:
    """Takes the state from a checkpoint.

    Args:
        steps, samples: done, where the checkpoint does not say.
    Raises:
        ValueError: it was made with another history or method, or without what they need, or it is damaged.
    """
    file = os.path.join(directory, STATE_FILE)
    own, done = selection.state_dict(), {"steps": steps, "samples": samples}
    if os.path.isfile(file):
        state = done | _read(file)
    elif not own["tensors"]:  # with save_only_model, and from 0.1: nothing but the steps has advanced
        state = done | {"method": selection.method.name, "history": history, "tensors": {}}
    else:
        raise ValueError(
            f"{file} is missing: the checkpoint was made without history {history!r} and method "
            f"{selection.method.name!r}, or with save_only_model; start anew or resume with its settings"
        )
    if state.get("history") != history:
        raise ValueError(
            f"{file} was made with history={state.get('history')!r}, this run has {history!r}; resume with that"
        )
    try:
        selection.load_state_dict(state | {"history": own["history"]})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read(file: str) -> dict[str, Any]:
    """The state as `Selection.load_state_dict` takes it. safetensors hold no code, and claim no more than they have.

    Raises:
        ValueError: the file is damaged, or says nothing of a selection.
    """
    try:
        with safe_open(file, "pt") as saved:
            # 0.1 called a rule a selector, and left out what the trainer's own state says
            old = {n: f"rule.{n.removeprefix('selector.')}" for n in saved.keys() if n.startswith("selector.")}
            tensors = {old.get(n, n): saved.get_tensor(n) for n in saved.keys()}
            state: dict[str, Any] = dict(saved.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); resume from another checkpoint") from error
    for name in state.keys() & {"steps", "samples"}:
        if not re.fullmatch("[0-9]{1,18}", state[name]):
            raise ValueError(f"{file}: {name} must be a whole number; got {reprlib.repr(state[name])}")
        state[name] = int(state[name])
    return state | {"tensors": tensors}
