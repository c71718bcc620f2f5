"""Chunked as it runs on a GPU: what a CUDA graph needs, what is multiplied, and what is held."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE, make, summed_magnitude
from test_kernels_waits import NoWaiting, on_a_gpu  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import tokensel.ops.chunked
import tokensel.ops.chunked_grad
from tokensel import selected_cross_entropy, token_stats, token_stats_contrast, token_stats_pair

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_scratch", "gpu_chunked", "on_a_gpu")
HEAD = {"softcap": 20.0, "logit_scale": 0.7}


def step(hidden, weight, labels, bias, old, keep):
    """Statistics of two models and of their contrast, and the gradients of kept rows."""
    trained = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    now, before = token_stats_pair((hidden, weight), old, labels, entropy=True, bias=bias, impl="chunked", **HEAD)
    contrast = token_stats_contrast((hidden, weight), old, labels, impl="chunked", **HEAD)
    options = {"stats": now, "bias": trained[2], "denominator": 7.0, "impl": "chunked", **HEAD}
    (selected_cross_entropy(*trained[:2], labels, keep, **options) * 3).backward()
    return now, before, contrast, [t.grad for t in trained]


@pytest.fixture
def inputs():
    hidden, weight, labels, bias = make(dtype=torch.bfloat16)
    return hidden, weight, labels, bias, make(D=24, dtype=torch.bfloat16)[:2]


class Recorded(TorchDispatchMode):
    """Operators in their order, with the shapes that they return."""

    def __init__(self):
        super().__init__()
        self.seen, self.products, self.largest = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        name = function.overloadpacket.__name__
        self.seen.append((name, [tuple(t.shape) for t in tensors]))
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() for t in tensors if name == "empty")])
        if name in ("mm", "addmm", "addmm_"):
            a, b = [t for t in args if t.dim() == 2][-2:]
            self.products += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out


def test_the_host_waits_for_nothing(inputs):
    keep = torch.rand(len(inputs[2]), device=DEVICE) < 0.6
    with NoWaiting() as mode:
        now, before, contrast, gradients = step(*inputs, keep)
        token_stats(*inputs[:3], impl="chunked")
    assert mode.seen > 100 and all(stats.nll.isfinite().all() for stats in (now, before, contrast))
    assert all(g.isfinite().all() for g in gradients)


def test_operators_and_shapes_are_the_same_whatever_the_values(inputs):
    """As a CUDA graph needs it: rows kept, rows ignored and labels are on the device alone."""
    hidden, weight, labels, bias, old = inputs
    traces = []
    for kept in (0, len(labels) // 2, len(labels)):
        y = torch.where(torch.arange(len(labels), device=DEVICE) < kept, labels.clamp(min=0), -100)
        with Recorded() as mode:
            step(hidden, weight, y, bias, old, torch.arange(len(y), device=DEVICE) % 2 == 0)
        traces.append(mode.seen)
    assert all(trace == traces[0] for trace in traces) and len(traces[0]) > 100


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_captures_statistics_and_gradients(inputs):
    hidden, weight, labels, bias, old = inputs
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    step(*inputs, keep)  # what libraries and Triton load once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs, keep)
    hidden.copy_(torch.randn_like(hidden))
    keep.copy_(~keep)
    labels.copy_(torch.where(labels == -100, -100, labels.flip(0).clamp(min=0)))
    graph.replay()
    expected = step(*inputs, keep)
    for found, true in zip(captured[:3], expected[:3], strict=True):
        torch.testing.assert_close(found.nll, true.nll, rtol=0, atol=0)
    for found, true in zip(captured[3], expected[3], strict=True):
        torch.testing.assert_close(found, true, rtol=0, atol=0)


@pytest.mark.parametrize("kept", [0, 5, 37])
def test_products_are_of_all_rows(inputs, kept, monkeypatch):
    hidden, weight, labels, _, old = inputs
    if DEVICE == "cpu":  # the fixture's products are of several operators; these are one
        for module in (tokensel.ops.chunked, tokensel.ops.chunked_grad):
            monkeypatch.setattr(module, "product", lambda a, b, out: torch.mm(a.float(), b.float(), out=out))
        add_product = lambda t, a, b: t.addmm_(a.float(), b.float())  # noqa: E731
        monkeypatch.setattr(tokensel.ops.chunked_grad, "add_product", add_product)
    N, V, D = len(labels), *weight.shape
    labels, keep = labels.clamp(min=0), torch.arange(N, device=DEVICE) < kept
    with Recorded() as mode:
        stats, _ = token_stats_pair((hidden, weight), old, labels, impl="chunked")
    assert mode.products == 2 * N * V * (D + 24)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = selected_cross_entropy(hidden, weight, labels, keep, stats=stats, impl="chunked")
    with Recorded() as mode:
        loss.backward()
    assert mode.products == 3 * 2 * N * V * D


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("mib", [0.004, 0.009, 0.03, 256])
def test_what_is_held_stays_below_the_workspace(inputs, mib, models):
    hidden, weight, labels, _, old = inputs
    whole = token_stats(hidden, weight, labels, impl="reference")
    with Recorded() as mode:
        if models == 1:
            found = token_stats(hidden, weight, labels, impl="chunked", workspace_mib=mib)
        else:
            found = token_stats_contrast((hidden, weight), old, labels, beta=0.0, impl="chunked", workspace_mib=mib)
    assert mode.largest <= min(mib * 2**20, 2 / 3 * 2**15)  # of both models' logits
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_block_stays_below_its_workspace(inputs, monkeypatch):
    monkeypatch.setattr(tokensel.ops.chunked_grad, "WORKSPACE_MIB", 0.03)
    hidden, weight, labels, _, _ = inputs
    stats = token_stats(hidden, weight, labels, impl="chunked")
    shape, asked = tokensel.ops.chunked.resident_block, []
    monkeypatch.setattr(
        tokensel.ops.chunked, "resident_block", lambda *args, **wanted: asked.append(wanted) or shape(*args, **wanted)
    )
    loss = selected_cross_entropy(hidden.requires_grad_(), weight, labels, labels != -100, stats=stats, impl="chunked")
    with Recorded() as mode:
        loss.backward()
    assert asked == [{"most_columns": int(0.02 * 2**20) // (2 * len(labels)), "sums": True}]
    assert mode.largest <= 0.02 * 2**20


def test_a_workspace_without_room_for_a_row_is_named(inputs):
    with pytest.raises(ValueError, match=r"workspace_mib=1e-05 holds no row of 1 x 64 float32 logits"):
        token_stats(*inputs[:3], impl="chunked", workspace_mib=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dropped_rows_may_be_anything(inputs, bad):
    hidden, weight, labels, bias, _ = inputs
    keep = torch.where(torch.rand(len(labels), device=DEVICE) < 0.5, torch.randn(len(labels), device=DEVICE), 0)
    keep[1] = 0.7
    dropped = (keep == 0) | (labels == -100)
    assert 5 < dropped.sum() < len(labels) - 5
    stats = token_stats(hidden, weight, labels, bias=bias, impl="chunked", **HEAD)
    found = []
    for x, impl in ((hidden.masked_fill(dropped[:, None], bad), "chunked"), (hidden.double(), "reference")):
        trained = [t.to(x.dtype).clone().requires_grad_() for t in (x, weight, bias)]
        own = stats if impl == "chunked" else None
        options = {"stats": own, "bias": trained[2], "impl": impl, **HEAD}
        (selected_cross_entropy(*trained[:2], labels, keep.to(x.dtype), **options) * -1.7).backward()
        found.append([t.grad for t in trained])
    assert not found[0][0][dropped].any()
    rounding = torch.finfo(torch.bfloat16).eps
    for name, ours, truly in zip(("hidden", "weight", "bias"), *found, strict=True):
        allowed = 2 * rounding * truly.abs().max()
        allowed += rounding * summed_magnitude(name, (hidden, weight, bias), labels, keep, truly, **HEAD)
        assert (ours.double() - truly).abs().max() <= allowed, name


def test_no_rows_have_no_statistics_and_zero_gradients(inputs):
    hidden, weight, labels, bias, old = inputs
    now, _, contrast, gradients = step(
        hidden[:0], weight, labels[:0], bias, old=(old[0][:0], old[1]), keep=labels[:0] > 0
    )
    assert now.nll.shape == contrast.nll.shape == (0,)
    assert gradients[0].shape == (0, 40) and not gradients[1].any() and not gradients[2].any()
