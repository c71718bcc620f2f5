"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter (small, ragged shapes)."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE, NAMES, attention_inputs, make
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import tokensel_kernels.attention_mass
import tokensel_kernels.block_grad
import tokensel_kernels.logits_stats
import tokensel_kernels.vocab_grad
import tokensel_kernels.vocab_stats
from tokensel import (
    prompt_attention_mass,
    selected_cross_entropy,
    token_stats_from_logits,
    token_stats_pair,
)
from tokensel.ops.token_stats import TokenStats, stats_of_sums
from tokensel_kernels import tiles

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")


# Labels that no logit has

OUTSIDE = (-7, -1, 150, 151, 10_000, 2**40, -(2**40))


def surrounded(t):
    """The tensor inside a wider one that is NaN (a label: 3) around it, so that what is read beside it shows."""
    wide = torch.full((t.shape[0] + 64, *t.shape[1:]), torch.nan if t.is_floating_point() else 3, device=DEVICE)
    wide = wide.to(t.dtype)
    wide[32:-32] = t
    return wide[32:-32]


def test_a_label_outside_the_vocabulary_reads_nothing_and_has_no_likelihood():
    hidden, weight, _, bias = (surrounded(t) for t in make(N=len(OUTSIDE) + 1))
    labels = surrounded(torch.tensor([*OUTSIDE, 149], device=DEVICE))
    old_hidden, old_weight = (surrounded(t) for t in make(N=len(labels), D=24)[:2])
    models = [(hidden, weight), (old_hidden, old_weight)]
    head = {"bias": bias, "softcap": None, "logit_scale": 1.0, "entropy": False, "ignore_index": -100}
    logits = [surrounded(x @ w.T) for x, w in models]
    of_logits = torch.full((3, 2, 1, len(labels)), torch.nan, device=DEVICE)
    tokensel_kernels.logits_stats.write_logits_sums(logits, labels, of_logits[:, :, 0], bias=bias, ignore_index=-100)
    z, old = (z + bias for z in logits)
    found = [stats_of_sums(of_logits, labels, -100, ())]
    for entropy in (False, True):
        fields = tokensel_kernels.vocab_stats.hidden_stats(models, labels, **head | {"entropy": entropy})
        found.append([TokenStats(*of_model) for of_model in fields.unbind(1)])
    for pair in found:
        for stats, truly in zip(pair, (z, old), strict=True):
            torch.testing.assert_close(stats.lse, truly.logsumexp(-1))
            assert (stats.nll[:-1] == torch.inf).all() and stats.nll[-1].isfinite()


def test_the_gradient_of_a_label_outside_the_vocabulary_has_no_one_hot():
    hidden, weight, _, bias = (surrounded(t) for t in make(N=len(OUTSIDE)))
    labels, coefficient = surrounded(torch.tensor(OUTSIDE, device=DEVICE)), torch.ones(len(OUTSIDE), device=DEVICE)
    z = hidden @ weight.T + bias
    lse, p = z.logsumexp(-1), z.softmax(-1)
    head = {"bias": bias, "softcap": None, "logit_scale": 1.0}
    found = tokensel_kernels.vocab_grad.selected_gradients(
        hidden, weight, labels, coefficient, lse, want=(True, True, True), **head
    )
    for ours, truly in zip(found, (p @ weight, p.T @ hidden, p.sum(0)), strict=True):
        torch.testing.assert_close(ours, truly, rtol=1e-5, atol=1e-5)
    dz = torch.full_like(z, torch.nan)
    products = surrounded(hidden @ weight.T)
    tokensel_kernels.block_grad.write_block_gradient(products, labels, coefficient, lse, dz, first_column=0, **head)
    torch.testing.assert_close(dz, p)


# The host does not wait


class NoWaiting(TorchDispatchMode):
    """Refuses operators whose result the host has to wait for on a GPU: a value, or a shape that depends on values."""

    REFUSED = {
        "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "nonzero_numpy", "masked_select", "unique",
        "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere",
        "lift_fresh",  # torch.tensor(a number): copied to the device, and waited for
    }  # fmt: skip
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.REFUSED:
            raise AssertionError(f"the host waits for {function}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise AssertionError(f"the host waits for {function} by a mask")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise AssertionError(f"the host waits for {function}")
        self.seen += 1
        return function(*args, **(kwargs or {}))


def _tolist(tensor):
    raise AssertionError("the host waits for tolist")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The way of a GPU: checks are asynchronous, and a launch, in the interpreter many operators, is none."""
    monkeypatch.setattr("tokensel.ops.checks.may_read_values", lambda like: False)
    monkeypatch.setattr("tokensel.select.method.may_read_values", lambda like: False)
    monkeypatch.setattr(torch.Tensor, "tolist", _tolist)  # which no dispatcher sees
    if DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def alone(self, *args, **kwargs):
            with _disable_current_modes():
                return launch(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", alone)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_the_host_waits_for_nothing(tma, on_a_gpu, monkeypatch):
    from tokensel import TokenSignals, methods, uniform_prompt_mass

    if DEVICE == "cpu":
        small = tiles.ProductTile(16, 64, 16, 4, 1, tma=tma, precision="widened")
        for kind in ("stats", "full_stats", "gradient", "matmul"):
            monkeypatch.setitem(tiles.TILES["interpreter"][kind], 2, small)
    hidden, weight, labels, bias = make(dtype=torch.bfloat16)
    old = make(D=24, dtype=torch.bfloat16)[:2]
    q, k, prompt, options = attention_inputs(NAMES, torch.bfloat16, S=len(labels))
    q, k, prompt = q[:1], k[:1], prompt[:1]
    sample, response = torch.arange(len(labels), device=DEVICE) // 12 * 12, labels != -100
    for name in ("key_mask", "segment_ids", "turn_ids"):
        options[name] = options[name][:1]
    options["query_mask"] = response[None]
    masks = {name: options[name] for name in ("key_mask", "segment_ids", "turn_ids", "window")}
    trained = [t.requires_grad_() for t in (hidden, weight, bias)]
    head = {"bias": bias, "softcap": 20.0, "impl": "fused"}
    with NoWaiting() as mode:
        now, before = token_stats_pair((hidden, weight), old, labels, entropy=True, **head)
        token_stats_from_logits((hidden @ weight.T).detach(), labels, impl="fused")
        signals = {"nll": now.nll, "history_nll": before.nll}
        mass = prompt_attention_mass(q, k, prompt, impl="fused", **options)[0]
        signals |= {"mass": mass, "uniform_mass": uniform_prompt_mass(prompt, **masks)[0]}
        signals = TokenSignals(response, sample, **signals)
        keep = methods.get("sstoken", debias="uniform")(signals)
        loss = selected_cross_entropy(hidden, weight, labels, keep, stats=now, denominator=7.0, **head)
        loss = loss + selected_cross_entropy(hidden, weight, labels, keep.float() * -0.5, stats=now, **head)
        (loss * 3).backward()
    assert all(t.grad.isfinite().all() for t in trained) and mode.seen > 100


def test_what_would_make_the_host_wait_is_refused(on_a_gpu):
    x = torch.arange(4.0, device=DEVICE)
    waits = [
        lambda: x.sum().item(), lambda: bool((x > 1).any()), lambda: x[x > 1], lambda: x.nonzero(),
        lambda: x.masked_select(x > 1), lambda: x.index_put_((x > 1,), -x[:2]), lambda: torch.equal(x, x),
        lambda: torch.tensor(2.0), lambda: x.long().bincount(), lambda: x.tolist(), lambda: x.unique(),
    ]  # fmt: skip
    for wait in waits:
        with pytest.raises(AssertionError, match="the host waits for"), NoWaiting():
            wait()
    hidden, weight, labels, _ = make()
    hidden.requires_grad_()
    keep = labels != -100
    with pytest.raises(AssertionError, match="nonzero"), NoWaiting():  # the CPU's way gathers rows
        selected_cross_entropy(hidden, weight, labels, keep, impl="chunked").backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="an interpreted launch is a Python call")
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch, gpu_chunked):
    """Without the guard Triton would launch on the current GPU, whichever holds the tensors."""
    import contextlib
    import sys

    from triton.runtime.interpreter import GridExecutor

    inside, launched = [], set()

    @contextlib.contextmanager
    def on_device(like):
        inside.append(like.device)
        yield
        inside.pop()

    for name, module in list(sys.modules.items()):
        if name.startswith("tokensel_kernels.") and hasattr(module, "on_device"):
            monkeypatch.setattr(module, "on_device", on_device)
    launch = GridExecutor.__call__

    def guarded(self, *args, **kwargs):
        assert inside, f"{self.fn.__name__} is launched on whatever GPU is current"
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", guarded)
    hidden, weight, labels, bias = make()
    for t in (hidden, weight, bias):
        t.requires_grad_()
    for impl in ("fused", "chunked"):
        pair = token_stats_pair((hidden, weight), (hidden, weight), labels, bias=bias, impl=impl)
        selected_cross_entropy(hidden, weight, labels, labels != -100, stats=pair[0], bias=bias, impl=impl).backward()
    token_stats_from_logits((hidden @ weight.T).detach(), labels, impl="fused")
    q, k, prompt, options = attention_inputs(NAMES, torch.float32)
    prompt_attention_mass(q, k, prompt, impl="fused", **options)
    assert len(launched) >= 12 and not inside
