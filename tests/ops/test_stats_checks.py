from __future__ import annotations

import pytest
import torch
from oracles import make

import tokensel.ops.stats
from tokensel import (
    selected_cross_entropy,
    token_stats,
    token_stats_contrast,
    token_stats_from_logits,
    token_stats_pair,
)
from tokensel.ops.checks import check_label_range

# Bad input

HIDDEN, WEIGHT = torch.zeros(6, 4), torch.zeros(9, 4)
LABELS = torch.tensor([0, 1, -100, 3, 8, 2])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor; got list"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must have a floating-point dtype; got torch.int64"),
        ({"hidden": torch.zeros(6, 5)}, ValueError, r"D = 4 as in weight \[V, D\]; got \[6, 5\]"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight must have shape \[V, D\]; got \[9\]"),
        ({"labels": LABELS[:5]}, ValueError, r"labels must have shape \[6\]"),
        ({"labels": LABELS.short()}, TypeError, "labels must be torch.int64 or torch.int32; got torch.int16"),
        ({"labels": LABELS.where(LABELS != 3, 9)}, ValueError, r"labels\[3\] is 9, outside \[0, 9\)"),
        ({"labels": LABELS.where(LABELS != 3, -1)}, ValueError, r"labels\[3\] is -1"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta but hidden is on cpu"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor; got NoneType"),
        ({"labels": [0] * 6}, TypeError, "labels must be a torch.Tensor; got list"),
        ({"hidden": HIDDEN[0, 0]}, ValueError, r"hidden must have shape \[..., D\].*; got \[\]"),
        ({"hidden": HIDDEN[0]}, ValueError, r"labels must have shape \[\] \(one label a row\); got \[6\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive; got 0"),
        ({"temperature": None}, TypeError, "temperature must be a number; got None"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \[9\]"),
        ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor; got float"),
        ({"bias": torch.zeros(9).long()}, TypeError, "bias must have a floating-point dtype"),
        ({"bias": torch.zeros(9, device="meta")}, ValueError, "bias is on meta but hidden is on cpu"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive; got 0"),
        ({"softcap": -2.0}, ValueError, "softcap must be positive; got -2"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive; got nan"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib must be positive"),
        ({"workspace_mib": -1}, ValueError, "workspace_mib must be positive"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, chunked, reference, fused; got 'fast'"),
        ({"impl": "fused"}, ValueError, "needs a GPU and the tensors are on cpu; use impl='chunked'"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message, no_interpreter):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | change
    with pytest.raises(error, match=message):
        token_stats(**arguments)


def test_bad_input_of_pairs_and_logits_is_named(no_interpreter):
    with pytest.raises(ValueError, match="history weight has 8 vocabulary rows but current weight has 9"):
        token_stats_pair((HIDDEN, WEIGHT), (HIDDEN, WEIGHT[:8]), LABELS)
    logits = torch.zeros(6, 9)
    with pytest.raises(ValueError, match=r"history_logits must have the shape of logits \[6, 9\]; got \[6, 8\]"):
        token_stats_from_logits(logits, LABELS, logits[:, :8])
    with pytest.raises(ValueError, match=r"labels must have shape \[6\]"):
        token_stats_from_logits(logits, LABELS[:5])
    with pytest.raises(TypeError, match="logits must have a floating-point dtype"):
        token_stats_from_logits(logits.long(), LABELS)
    with pytest.raises(TypeError, match=r"history_logits must be a torch.Tensor; got list"):
        token_stats_from_logits(logits, LABELS, [1.0])
    with pytest.raises(ValueError, match="history_logits is on meta but logits is on cpu"):
        token_stats_from_logits(logits, LABELS, logits.to("meta"))
    with pytest.raises(ValueError, match=r"labels\[0, 1\] is 9, outside \[0, 9\) and not ignore_index=-100"):
        token_stats_from_logits(logits.view(3, 2, 9), torch.tensor([[0, 9], [1, 2], [3, 4]]))
    with pytest.raises(ValueError, match="workspace_mib must be positive"):
        token_stats_from_logits(logits, LABELS, workspace_mib=0)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_does_not_round_what_is_float32_on_purpose(impl):
    hidden, weight, labels, _ = make(dtype=torch.bfloat16)
    q, k = torch.randn(1, 2, 9, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    prompt = torch.arange(9)[None] < 4
    keep = torch.rand(len(labels)) < 0.6

    def everything():
        w = weight.clone().requires_grad_()
        loss = selected_cross_entropy(hidden, w, labels, keep, impl=impl)
        with torch.autocast("cpu", enabled=False):  # where PyTorch wants a backward to be
            loss.backward()
        stats = token_stats(hidden, weight, labels, entropy=True, impl=impl)
        mass = tokensel.prompt_attention_mass(q, k, prompt, impl=impl)
        return [loss.detach(), w.grad, stats.nll, stats.entropy, mass]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


def test_bad_input_of_a_contrast_is_named(no_interpreter):
    hidden, weight, labels, _ = make()
    model = (hidden, weight)
    with pytest.raises(ValueError, match="beta must be finite and not negative; got -1"):
        token_stats_contrast(model, model, labels, beta=-1)
    with pytest.raises(TypeError, match="beta must be a number; got None"):
        token_stats_contrast(model, model, labels, beta=None)
    with pytest.raises(ValueError, match="negative weight has 8 vocabulary rows but positive weight has 2300"):
        token_stats_contrast(model, (hidden, weight[:8]), labels)
    with pytest.raises(TypeError, match="one dtype here; got torch.bfloat16 and torch.float32; cast one"):
        token_stats_contrast(model, (hidden.bfloat16(), weight.bfloat16()), labels)


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda")


def test_a_wrong_label_on_a_device_is_asserted_there_and_named_on_request(monkeypatch):
    labels = torch.tensor([[3, -100], [9, 12]]).as_subclass(Elsewhere)
    monkeypatch.delenv("TOKENSEL_CHECK", raising=False)
    with pytest.raises(RuntimeError, match="labels: outside .0, V. and not ignore_index; TOKENSEL_CHECK=1 names it"):
        check_label_range(labels, 10, -100)  # the CPU's assertion is not asynchronous
    monkeypatch.setenv("TOKENSEL_CHECK", "1")
    with pytest.raises(ValueError, match=r"labels\[1, 1\] is 12, outside \[0, 10\) and not ignore_index=-100"):
        check_label_range(labels, 10, -100)
    check_label_range(labels, 13, -100)
