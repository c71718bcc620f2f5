from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, selection_step
from benchmarks.selection_step import WAYS, Case, Step

CASE = Case(rows=100, vocabulary=3000, hidden=24, rho=0.6, dtype="float32")


@pytest.mark.parametrize("way", ["tokensel", "published", "torch_chunked"])
def test_every_way_computes_the_same_step(way):
    step = Step.make(CASE)
    loss, keep = WAYS[way](step)
    old, now = (
        torch.nn.functional.cross_entropy(h.detach().double() @ w.detach().double().T, step.labels, reduction="none")
        for h, w in ((step.old_hidden, step.old_weight), (step.hidden, step.weight))
    )
    assert keep.nonzero()[:, 0].tolist() == (old - now).topk(60).indices.sort().values.tolist()
    assert loss == pytest.approx(float(now[keep].mean()), rel=1e-5)

    hidden, weight = step.hidden.detach().double().requires_grad_(), step.weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden[keep] @ weight.T, step.labels[keep]).backward()
    torch.testing.assert_close(step.hidden.grad.double(), hidden.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(step.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("way", ["tokensel", "matrix_products"])
def test_a_step_is_two_products_of_all_rows_and_three_of_the_kept(way):

    def in_place(out, a, b, **_):  # PyTorch's counter knows addmm only out of place
        return 2 * a[0] * a[1] * b[1]

    step = Step.make(CASE)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        WAYS[way](step)
    one_product = 2 * CASE.rows * CASE.vocabulary * CASE.hidden
    assert counter.get_total_flops() == pytest.approx(3.8 * one_product)


def test_peak_extra_memory_sees_what_was_allocated_and_freed():
    def run():
        torch.ones(64 * 2**20 // 4)

    assert 60 < measure.peak_extra_mib(run) < 90
    assert measure.peak_extra_mib(lambda: None) < 10


def test_rounds_are_interleaved_and_medians_taken():
    calls = []
    seconds = measure.interleaved_seconds({name: lambda n=name: calls.append(n) for name in "ab"}, rounds=3)
    assert calls == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert measure.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_command_writes_results_with_the_machine_beside_them(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "result.json"
    small = "--rows 70 --vocabulary 300 --hidden 16 --rounds 1".split()
    monkeypatch.setattr(sys, "argv", ["selection_step", *small, "--output", str(output)])
    selection_step.main()
    written = json.loads(output.read_text())
    assert {"cpu", "threads", "torch", "commit"} <= set(written["machine"])
    assert [r["case"]["dtype"] for r in written["results"]] == ["float32", "bfloat16"]
    for result in written["results"]:
        assert set(result["ways"]) == set(WAYS)
        assert result["ways"]["tokensel"]["rows_kept_unlike_float64"] == 0
        assert all(way["median_seconds"] > 0 for way in result["ways"].values())
    assert "time / tokensel" in capsys.readouterr().out
