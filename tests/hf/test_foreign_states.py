"""The state of a selection in a checkpoint from elsewhere: what is wrong in it is named, with the file."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import causal_lm, padded, samples

from tokensel import LastSeen, ModelCopy, Selection, apply_to, methods
from tokensel.checkpoint import STATE_FILE, load_selection, save_selection


@pytest.fixture
def checkpoint(tmp_path):
    """Writes the state of a selection with changes, and reads it back."""

    def write_and_read(metadata=None, **tensors):
        def make():
            return Selection(methods.get("ada_eslm"), history=LastSeen())

        save_selection(str(tmp_path), make(), "last_seen")
        with safe_open(tmp_path / STATE_FILE, "pt") as saved:
            old, names = saved.metadata(), {n: saved.get_tensor(n) for n in saved.keys()}
        for name, tensor in tensors.items():
            names[name.replace("__", ".")] = tensor
        names = {name: tensor.clone() for name, tensor in names.items() if tensor is not None}
        save_file(names, tmp_path / STATE_FILE, None if metadata == {} else old | (metadata or {}))
        selection = make()
        load_selection(str(tmp_path), selection, "last_seen", 1, 2)
        return selection

    return write_and_read


INT = torch.tensor([1, 2])
STATES_OF_A_SELECTION = [
    ({"metadata": {}}, "history=None, this run has 'last_seen'"),
    ({"metadata": {"steps": "x"}}, "steps must be a whole number; got 'x'"),
    ({"metadata": {"steps": "-1"}}, "steps must be a whole number; got '-1'"),
    ({"metadata": {"samples": "9" * 5000}}, "samples must be a whole number"),
    ({"metadata": {"method": "<img src=x onerror=alert(1)>"}}, "method '<img"),
    ({"rule__alpha": torch.tensor([0.1, 0.2])}, r"rule.alpha must be a number in \[0, 1\)"),
    ({"rule__alpha": torch.tensor(math.nan)}, "rule.alpha must be a number"),
    ({"rule__cvar": torch.tensor(1)}, "rule.cvar a number"),
    ({"rule__alpha": None}, "another rule of method 'ada_eslm'"),
    ({"history__key": None}, "saved history lacks 'key'"),
    ({"history__key": INT}, "saved history is damaged"),
    ({"history__key": INT, "history__length": INT, "history__nll": torch.zeros(2)}, "saved history is damaged"),
    ({"history__key": INT, "history__length": INT - 2, "history__nll": torch.zeros(1)}, "saved history is damaged"),
    ({"history__key": INT, "history__length": INT * 2**61, "history__nll": torch.zeros(0)}, "history is damaged"),
    ({"history__key": INT / 2, "history__length": INT, "history__nll": torch.zeros(3)}, "saved history is damaged"),
    ({"history__key": INT, "history__length": INT, "history__nll": INT.repeat(2)[:3]}, "saved history is damaged"),
    ({"history__key": torch.tensor(1)}, "saved history is damaged"),
]


@pytest.mark.parametrize("changes, message", STATES_OF_A_SELECTION)
def test_a_wrong_state_of_a_selection_is_named_with_its_file(checkpoint, changes, message):
    with pytest.raises(ValueError, match=f"{STATE_FILE}.*{message}"):
        checkpoint(**changes)


def test_a_right_state_is_taken(checkpoint):
    selection = checkpoint({"steps": "7"}, history__key=INT, history__length=INT, history__nll=torch.ones(3))
    assert selection.progress.steps == 7 and [len(nll) for nll in selection.history._seen.values()] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}", b"\x80\x04."])
def test_a_state_that_is_no_safetensors_is_named(tmp_path, content):
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged .*; resume from another checkpoint"):
        load_selection(str(tmp_path), Selection(methods.get("random")), "none", 1, 2)


def test_losses_of_another_length_than_their_document_are_refused():
    model, batch = causal_lm(dtype=torch.float32), padded(samples())
    apply_to(model)
    selection = Selection(methods.get("rel"), history=LastSeen())
    model.train()(**batch, selection=selection).loss.backward()
    selection.step()
    state = selection.state_dict()
    state["tensors"]["history.length"][:2] += torch.tensor([1, -1])
    selection.load_state_dict(state)
    with pytest.raises(ValueError, match="'last_seen' has .* losses of a document of .* tokens: its saved state is"):
        model(**batch, selection=selection)


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t.long(), None], ids=["shape", "type", "missing"])
def test_weights_of_another_history_are_refused(tmp_path, change):
    selection = Selection(methods.get("rel"), history=ModelCopy(causal_lm(dtype=torch.float32)))
    save_selection(str(tmp_path), selection, "frozen")
    with safe_open(tmp_path / STATE_FILE, "pt") as saved:
        metadata, tensors = saved.metadata(), {n: saved.get_tensor(n) for n in saved.keys()}
    name, tensor = tensors.popitem()
    save_file(tensors if change is None else tensors | {name: change(tensor)}, tmp_path / STATE_FILE, metadata)
    with pytest.raises(ValueError, match=f"{STATE_FILE}: the saved history is of another model: {name[8:]}"):
        load_selection(str(tmp_path), selection, "frozen", 1, 2)


def test_a_weight_that_is_named_as_a_rule_of_old_keeps_its_name(tmp_path):
    selection = Selection(methods.get("random"), history=ModelCopy(causal_lm(dtype=torch.float32)))
    old = "router.selector.weight"
    selection.history.values[old] = torch.zeros(2)
    selection.history.copied[old] = torch.zeros(2)
    save_selection(str(tmp_path), selection, "frozen")
    load_selection(str(tmp_path), selection, "frozen", 1, 2)
