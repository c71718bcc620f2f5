"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter (small, ragged shapes)."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from kernel_inputs import DEVICE, gradients, make, summed_magnitude
from oracles import DTYPES

import tokensel_kernels.attention_mass
import tokensel_kernels.vocab_grad
import tokensel_kernels.vocab_stats
from tokensel import (
    selected_cross_entropy,
    token_stats,
)
from tokensel_kernels import tiles
from tokensel_kernels.gather_rows import gather_rows, scatter_rows

tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")


# The backward


WEIGHTS, OPTIONS = ("bool", "real", "one", "all"), ({}, {"softcap": 6.0, "logit_scale": 0.7})
# every type with every kind of weights; among these any two of type, weights, options and way of loading meet
CASES = [
    pytest.param(dtype, weights, OPTIONS[(d + w) % 2], (d + w // 2) % 2 == 1, id=f"{dtype}-{weights}")
    for d, dtype in enumerate(DTYPES)
    for w, weights in enumerate(WEIGHTS)
]
# a large softcap hardly bends the logits, and its rounding must not grow with it
CASES += [
    pytest.param(torch.float32, "real", {"softcap": cap}, True, id=f"softcap {cap:g}") for cap in (33.0, 1e4, 1e9)
]


@pytest.mark.parametrize("dtype, weights, options, tma", CASES)
def test_gradients_of_kept_rows(dtype, weights, options, tma, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(tokensel_kernels.vocab_grad, "BLOCK_BYTES", 1)  # three blocks of the vocabulary
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=tma, precision="widened")
        for kind in ("gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], dtype.itemsize, small)
    hidden, weight, labels, bias = make(dtype=dtype)
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    keep = {
        "bool": keep,
        "real": torch.randn(len(labels), device=DEVICE) * keep,
        "one": torch.arange(len(labels), device=DEVICE) == 36,
        "all": torch.ones_like(keep),
    }[weights]
    check_gradients((hidden, weight, bias), labels, keep, dtype, **options)


def check_gradients(inputs, labels, keep, dtype, **options):
    """Loss and gradients against float64 within the budget, zero where dropped, and the same again."""
    ours = gradients(inputs, labels, keep, "fused", **options)
    exact = gradients([t.double() for t in inputs], labels, keep.double(), "reference", **options)
    # products of the logits' gradient take it in the inputs' type, as every mixed-precision training does
    rounding = torch.finfo(dtype).eps
    # a logit z in float32 is off by eps |z|, and exp(z - lse) by that share of itself
    hidden, weight, bias = (t.double() for t in inputs)
    logit = float((hidden @ weight.T + bias).abs().max())
    share = rounding + torch.finfo(torch.float32).eps * logit
    eager = gradients(inputs, labels, keep, "reference", **options)
    for name, a, b, c in zip(("loss", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + 2 * rounding * c.abs().max()
        if name == "loss":
            allowed += 4 * torch.finfo(torch.float32).eps * 10  # a sum of terms of up to ten nats
        else:
            allowed += share * summed_magnitude(name, inputs, labels, keep, exact, **options)
        assert (a.double() - c).abs().max() <= allowed, f"{name}: {(a.double() - c).abs().max():.3g} > {allowed:.3g}"
    dropped = (keep == 0) | (labels == -100)
    assert (ours[1][dropped] == 0).all()
    again = gradients(inputs, labels, keep, "fused", **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.fixture
def memory_adds(monkeypatch):
    """On a CPU, the addition to memory that the interpreter lacks; gives how often each element was added to."""
    additions = Counter()
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def add(self, kind, desc, value, indices):
            assert kind.name == "ADD"
            pointers, inside = desc.materialize_pointers(indices)
            inside = TensorHandle(inside, tl.int1)
            old = self.create_masked_load(pointers, inside, None, None, None, False)
            self.create_masked_store(pointers, TensorHandle(old.data + value.data, value.dtype), inside, None, None)
            additions.update(pointers.data[inside.data].tolist())

        monkeypatch.setattr(InterpreterBuilder, "create_descriptor_reduce", add, raising=False)
        monkeypatch.setattr(tokensel_kernels.vocab_grad, "_memory_adds", lambda tile: tile.tma)
    return additions


PATHS = ("pointers", "descriptors", "memory adds")
# rows, vocabulary, hidden size, kept: more tiles than programs, fewer; as many rows as a tile, one, none, all
WALKS = [
    pytest.param(40, 130, 40, 40, torch.bfloat16, id="all"),
    pytest.param(40, 70, 40, 16, torch.float32, id="a tile"),
    pytest.param(20, 60, 72, 1, torch.float32, id="one"),
    pytest.param(20, 60, 24, 0, torch.bfloat16, id="none"),
    pytest.param(9, 60, 16, 4, torch.float16, id="few"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("N, V, D, kept, dtype", WALKS)
def test_programs_walk_over_all_tiles(N, V, D, kept, dtype, path, request, monkeypatch):
    additions = request.getfixturevalue("memory_adds") if path == "memory adds" else None
    if DEVICE == "cpu":
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=path != "pointers", precision="widened")
        for kind in ("gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], dtype.itemsize, small)
        monkeypatch.setattr(tokensel_kernels.vocab_grad, "BLOCK_BYTES", 128 * N * dtype.itemsize)  # two column tiles
    hidden, weight, labels, bias = make(N, V, D, dtype)
    labels[:] = torch.randint(0, V, (N,))
    keep = torch.zeros(N, dtype=torch.bool, device=DEVICE)
    keep[torch.randperm(N)[:kept]] = True
    inputs = (hidden, weight, bias)
    if kept:
        check_gradients(inputs, labels, keep, dtype, **OPTIONS[kept % 2])
    else:
        assert all((t == 0).all() for t in gradients(inputs, labels, keep, "fused"))
    if additions is not None and DEVICE == "cpu" and kept:
        additions.clear()
        gradients(inputs, labels, keep, "fused")
        assert len(additions) >= kept * D
        assert set(additions.values()) == {-(-V // 128)}  # one for each block of the vocabulary


def test_kept_rows_are_gathered_as_the_products_read_them():
    hidden, _, labels, _ = make(N=75, D=24)
    hidden[40:] = torch.nan
    labels[:4] = torch.tensor([-7, 150, 2**40, 149])
    coefficient = torch.zeros(75, device=DEVICE)
    order = torch.tensor([0, 1, 2, 3, 15, 16, 17, 33, 39], device=DEVICE)
    coefficient[order] = torch.arange(1.0, 10, device=DEVICE)
    lse = torch.randn(75, device=DEVICE)
    kept = gather_rows(hidden, labels, coefficient, lse, 150, 0.5, 32)
    assert kept.count.tolist() == [9] and torch.equal(kept.x[:9], hidden[order])
    assert (kept.x[9:32] == 0).all() and kept.x[32:].isnan().all()  # to the end of the tile and no further
    assert kept.label[:9].tolist() == torch.where((labels >= 0) & (labels < 150), labels, -1)[order].tolist()
    torch.testing.assert_close(kept.lse[:9], lse[order] * torch.tensor(2.0).log().reciprocal())
    assert torch.equal(kept.coefficient[:9], coefficient[order] * 0.5)
    assert torch.equal(kept.place[order], torch.arange(9, dtype=torch.int32, device=DEVICE))
    assert (kept.place == -1).sum() == 75 - 9
    back = scatter_rows(kept.x[:, :24].float(), kept.place, hidden.half())
    assert torch.equal(back[order], hidden[order].half())
    assert (back[kept.place < 0] == 0).all()
    # rows that do not fill a tile are not written past the last of them
    assert gather_rows(hidden[:33], labels, coefficient[:33], lse, 150, 1.0, 32).x.shape == (33, 24)


HOPPER = tiles.ProductTile(128, 256, 64, 8, 4, tma=True, processors=132)
# rows, vocabulary, hidden size, and what the waves take beside what they are needed for: the widest that fits is 1.03
SHAPES = [
    (8192, 128256, 4096, 1.026), (8192, 151936, 3584, 1.022), (8192, 256000, 2304, 1.019), (4096, 128256, 4096, 1.02),
    (16384, 32000, 4096, 1.044),
]  # fmt: skip


@pytest.mark.parametrize("N, V, D, most", SHAPES)
def test_blocks_of_the_vocabulary_are_whole_waves(N, V, D, most):
    """Waves of the logits' gradient and of dW, for every number of kept rows from a quarter on."""
    width = tokensel_kernels.vocab_grad.block_columns(N, V, D, HOPPER, HOPPER, 2**28, 2)
    assert width % 256 == 0 and N * width * 2 <= 2**28

    def wasted(width):
        shares = []
        for row_tiles in range(N // 512, N // 128 + 1):
            taken = used = 0
            for first in range(0, V, width):
                columns = -(-min(width, V - first) // 256)
                for count, steps in ((row_tiles * columns, D), (2 * columns * -(-D // 256), row_tiles * 128)):
                    taken += -(-count // 132) * 132 * steps
                    used += count * steps
            shares.append(taken / used)
        return sum(shares) / len(shares)

    assert wasted(width) <= min(most, wasted(8192))


def test_blocks_of_the_vocabulary_keep_to_the_memory_and_the_vocabulary():
    def width(N, V, D=64, most=2**28, tile=HOPPER):
        return tokensel_kernels.vocab_grad.block_columns(N, V, D, tile, tile, most, 2)

    assert width(8, 100) == 256  # one tile, past the vocabulary
    assert width(8, 300) == 512
    assert width(10**7, 128256) == 256  # one tile, whatever it takes
    assert width(8192, 128256, 4096) * 8192 * 2 + 8192 * 4096 * (2 + 4) <= 512 * 2**20  # all of the backward
    assert tokensel_kernels.vocab_grad.programs_of(HOPPER) == 132
    assert tokensel_kernels.vocab_grad.programs_of(dataclasses.replace(HOPPER, warps=4)) == 264


def test_a_backward_makes_few_small_launches(monkeypatch):
    """One to gather, one to clear dX, one to scatter, and the products; the rest of PyTorch launches nothing."""
    if DEVICE != "cpu":
        pytest.skip("counts the interpreter's launches")
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    launched = []
    launch = GridExecutor.__call__

    def record(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ not in (
                "empty",
                "empty_like",
                "new_empty",
                "slice",
                "alias",
                "view",
                "fill_",
            ):
                launched.append(function.overloadpacket.__name__)
            return out

    hidden, weight, labels, _ = make()
    monkeypatch.setattr(GridExecutor, "__call__", record)
    monkeypatch.setattr(tokensel_kernels.vocab_grad, "BLOCK_BYTES", 1)
    coefficient, lse = torch.rand(len(labels)), torch.rand(len(labels))
    head = {"bias": None, "softcap": None, "logit_scale": 1.0, "want": (True, True, False)}
    with Recorded():
        tokensel_kernels.vocab_grad.selected_gradients(hidden, weight, labels, coefficient, lse, **head)
    products = ["_logits_gradient_kernel", "_hidden_gradient_kernel", "_head_gradient_kernel"] * 3
    assert launched == ["zeros", "_gather_kept_kernel", *products, "_scatter_kept_kernel"]


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_gradients_of_far_off_logits(tma, shift, monkeypatch):
    """What stands past the kept rows and past the vocabulary must not overflow into what is summed."""
    if DEVICE == "cpu":
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=tma, precision="widened")
        for kind in ("gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], 4, small)
    hidden, weight, labels, bias = make()
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    inputs = (hidden, weight, torch.full_like(bias, shift))
    ours, eager = (gradients(inputs, labels, keep, impl)[1:] for impl in ("fused", "reference"))
    exact = gradients([t.double() for t in inputs], labels, keep.double(), "reference")[1:]
    for a, b, c in zip(ours, eager, exact, strict=True):
        spacing = torch.finfo(torch.float32).eps * 1e4  # of the logits and their lse
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 2 * spacing * c.abs().max()


def test_gradients_of_strided_inputs():
    hidden, weight, labels, bias = make()
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    expected = gradients((hidden, weight, bias), labels, keep, "fused")
    every_other = [torch.stack([t, t * 0], -1)[..., 0] for t in (hidden, bias)]
    tall = weight.T.contiguous().T
    assert not (every_other[0].is_contiguous() or every_other[1].is_contiguous() or tall.is_contiguous())
    x, w, b = (t.detach().requires_grad_() for t in (every_other[0], tall, every_other[1]))
    twice = [torch.stack([t, ~t if t.dtype == torch.bool else t * 0], 1)[:, 0] for t in (labels, keep)]
    loss = selected_cross_entropy(x, w, twice[0], twice[1], bias=b, impl="fused")
    (loss * -1.7).backward()
    for ours, theirs in zip((loss.detach(), x.grad, w.grad, b.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias"])
def test_what_is_frozen_is_skipped(frozen):
    hidden, weight, labels, bias = make()
    keep = torch.rand(len(labels), device=DEVICE) < 0.6
    full = dict(
        zip(("loss", "hidden", "weight", "bias"), gradients((hidden, weight, bias), labels, keep, "fused"), strict=True)
    )
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        tensor.requires_grad_(name not in frozen.split(" and "))
    loss = selected_cross_entropy(hidden, weight, labels, keep, bias=bias, impl="fused")
    (loss * -1.7).backward()
    for name, tensor in named.items():
        assert tensor.grad is None if name in frozen.split(" and ") else torch.equal(tensor.grad, full[name])


def test_no_rows_at_all_have_zero_gradients():
    hidden, weight, labels, bias = make()
    none = torch.zeros(0, dtype=torch.bool, device=DEVICE)
    for value in gradients((hidden[:0], weight, bias), labels[:0], none, "fused"):
        assert (value == 0).all()


def test_nothing_kept_has_zero_gradients_and_dropped_rows_are_never_read():
    hidden, weight, labels, bias = make()
    keep = torch.zeros(len(labels), dtype=torch.bool, device=DEVICE)
    for value in gradients((hidden, weight, bias), labels, keep, "fused"):
        assert (value == 0).all()
    keep[33] = True
    expected = gradients((hidden, weight, bias), labels, keep, "fused")
    stats = token_stats(hidden, weight, labels, bias=bias, impl="fused")
    hidden[:33] = torch.nan
    weight.requires_grad_()
    (selected_cross_entropy(hidden, weight, labels, keep, stats=stats, bias=bias, impl="fused") * -1.7).backward()
    assert torch.equal(weight.grad, expected[2])


# The whole step


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_training_step_with_the_kernels_is_the_reference_step(family, layout):
    tiny = pytest.importorskip("tiny")
    from tokensel import Selection, apply_to, methods

    batch = getattr(tiny, layout)(tiny.samples())
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    history = torch.rand(batch["labels"].shape, device=DEVICE) * 4
    results = []
    for impl in ("fused", "reference"):
        model = tiny.causal_lm(family, torch.float32).to(DEVICE)
        apply_to(model)
        out = model(**batch, history_nll=history, selection=Selection(methods.get("sstoken"), impl=impl))
        out.loss.backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (ours, gradients_ours), (reference, gradients_reference) = results
    assert torch.equal(ours.weights, reference.weights)
    for name in ("loss", "nll", "score", "mass"):
        torch.testing.assert_close(getattr(ours, name), getattr(reference, name), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradients_ours, gradients_reference, rtol=1e-3, atol=1e-6)
