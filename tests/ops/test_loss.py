from __future__ import annotations

import pytest
import torch
from oracles import DTYPES, head_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tokensel.ops.loss
from tokensel import TokenStats, selected_cross_entropy, token_stats, token_stats_from_logits


def make(N=45, V=2300, D=24, dtype=torch.float32):
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) / D**0.5 * 3, torch.randn(V)
    labels = torch.randint(0, V, (N,))
    labels[::6] = -100
    keep = torch.rand(N) < 0.6
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], labels, keep


def definition(inputs, labels, keep, denominator=None, softcap=None, logit_scale=1.0, dtype=torch.float64):
    """Σ keep · nll / denominator from [N, V] logits."""
    z = head_of(*inputs, softcap, logit_scale, dtype)
    valid = labels != -100
    w = keep.to(dtype) * valid
    nll = z.logsumexp(-1) - z[torch.arange(len(z)), labels.clamp(min=0)]
    return (w[valid] * nll[valid]).sum() / (w.abs().sum() if denominator is None else denominator)


def gradients(loss, inputs, upstream=1.0):
    return torch.autograd.grad(loss * upstream, [t for t in inputs if t is not None], allow_unused=True)


def assert_within_budget(ours, eager, exact, dtype, size=10.0):
    """Twice the eager error, plus a rounding of the result to its own type and of a float32 lse of `size` nats.

    The lse is part of the interface. Its rounding moves the loss by itself and gradients in proportion.
    """
    for name, a, b, c in zip(("loss", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        error = (a.double() - c).abs().max()
        allowed = 2 * (b.double() - c).abs().max() + 2 * torch.finfo(dtype).eps * c.abs().max()
        allowed += torch.finfo(torch.float32).eps * size * (1 if name == "loss" else c.abs().max())
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 6.0}, {"logit_scale": 0.3}, {"softcap": 30.0, "logit_scale": 2.0}], ids=str
)
@pytest.mark.parametrize("weights", ["bool", "real"])
def test_value_and_gradients_equal_the_definition(weights, options, dtype, impl):
    inputs, labels, keep = make(dtype=dtype)
    keep = keep if weights == "bool" else torch.randn(len(labels)) * keep  # real weights, also negative
    hidden, weight, bias = inputs

    def all_of(loss):
        return [loss.detach(), *gradients(loss, inputs, upstream=-1.7)]

    ours = all_of(selected_cross_entropy(hidden, weight, labels, keep, bias=bias, impl=impl, **options))
    exact = all_of(definition(inputs, labels, keep, **options))
    eager = all_of(definition(inputs, labels, keep, **options, dtype=torch.float32))
    assert_within_budget(ours, eager, exact, dtype)
    assert ours[0].dtype == torch.float32 and [g.dtype for g in ours[1:]] == [dtype] * 3


def test_gradcheck_in_float64():
    inputs, labels, keep = make(N=7, V=11, D=5, dtype=torch.float64)
    weights = torch.randn(7, dtype=torch.float64)

    def loss(hidden, weight, bias):
        return selected_cross_entropy(hidden, weight, labels, weights, bias=bias, softcap=4.0, logit_scale=0.7)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_statistics_may_be_given(given):
    inputs, labels, keep = make(dtype=torch.float64)
    hidden, weight, bias = inputs
    stats = token_stats(hidden, weight, labels, bias=bias) if given else None
    loss = selected_cross_entropy(hidden, weight, labels, keep, stats=stats, bias=bias)
    exact = definition(inputs, labels, keep)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradients(loss, inputs), gradients(exact, inputs))


@pytest.mark.parametrize("spread, shift", [(0.0, 0.0), (40.0, 0.0), (1000.0, 0.0), (1.0, -1e4), (1.0, 1e4)], ids=str)
def test_flat_peaked_and_shifted_logits(spread, shift):
    inputs, labels, keep = make()
    with torch.no_grad():
        inputs[0].mul_(spread), inputs[2].add_(shift)

    def all_of(loss):
        return [loss.detach(), *gradients(loss, inputs, upstream=-1.7)]

    ours = all_of(selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2]))
    exact, eager = (all_of(definition(inputs, labels, keep, dtype=d)) for d in (torch.float64, torch.float32))
    assert_within_budget(ours, eager, exact, torch.float32, size=max(10.0, abs(shift)))


def test_labels_at_the_edges_of_vocabulary_blocks():
    (hidden, weight, bias), _, _ = make(N=8, V=4500, dtype=torch.float64)
    labels, keep = torch.tensor([0, 1, 2047, 2048, 2049, 4095, 4096, 4499]), torch.ones(8, dtype=torch.bool)
    inputs = (hidden, weight, bias)
    ours = gradients(selected_cross_entropy(hidden, weight, labels, keep, bias=bias), inputs)
    torch.testing.assert_close(ours, gradients(definition(inputs, labels, keep), inputs))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("ignore_index", [-1, 7])
def test_ignore_index_may_be_any_number(ignore_index, impl):
    inputs, labels, keep = make(dtype=torch.float64)
    labels[labels == 7] = 8
    other = torch.where(labels == -100, ignore_index, labels)
    loss = selected_cross_entropy(*inputs[:2], other, keep, bias=inputs[2], ignore_index=ignore_index, impl=impl)
    exact = definition(inputs, labels, keep)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradients(loss, inputs), gradients(exact, inputs))


def products():
    """Counts the floating-point operations of matrix products, the ones in place included."""
    inplace = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    return FlopCounterMode(display=False, custom_mapping=inplace)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_products_are_made_for_kept_rows_in_the_backward_alone(frozen):
    (hidden, weight, _), labels, keep = make()
    weight.requires_grad_(not frozen)
    stats = token_stats(hidden, weight, labels)
    with products() as forward:
        loss = selected_cross_entropy(hidden, weight, labels, keep, stats=stats)
    assert forward.get_total_flops() == 0
    with products() as backward:
        loss.backward()
    kept = int((keep & (labels != -100)).sum())
    assert backward.get_total_flops() == (2 if frozen else 3) * 2 * kept * weight.numel()


def test_without_gradients_the_loss_is_the_same_number():
    inputs, labels, keep = make()
    loss = selected_cross_entropy(*inputs[:2], labels, keep)
    with torch.no_grad():
        plain = selected_cross_entropy(*inputs[:2], labels, keep)
    assert loss.requires_grad and not plain.requires_grad
    assert torch.equal(plain, loss.detach())


@pytest.mark.parametrize("denominator", [7, 7.0, torch.tensor(7)], ids=repr)
def test_denominator_may_be_given(denominator):
    inputs, labels, keep = make(dtype=torch.float64)
    hidden, weight, _ = inputs
    inputs = (hidden, weight, None)
    loss = selected_cross_entropy(hidden, weight, labels, keep, denominator=denominator)
    exact = definition(inputs, labels, keep, denominator=7)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradients(loss, inputs), gradients(exact, inputs))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden and bias"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    inputs, labels, keep = make(dtype=torch.float64)
    full = dict(zip(("hidden", "weight", "bias"), gradients(definition(inputs, labels, keep), inputs), strict=True))
    named = dict(zip(("hidden", "weight", "bias"), inputs, strict=True))
    for name in frozen.split(" and "):
        named[name].requires_grad_(False)
    selected_cross_entropy(named["hidden"], named["weight"], labels, keep, bias=named["bias"]).backward()
    for name, tensor in named.items():
        if name in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, full[name])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("why", ["nothing kept", "all ignored", "no rows"])
@pytest.mark.parametrize("denominator", [None, 0, 5])
def test_nothing_kept_is_zero_with_zero_gradients(why, denominator, impl):
    (hidden, weight, bias), labels, keep = make()
    if why == "nothing kept":
        keep = torch.zeros_like(keep)
    elif why == "all ignored":
        labels = torch.full_like(labels, -100)
    else:
        hidden, labels, keep = hidden.detach()[:0].requires_grad_(), labels[:0], keep[:0]
    loss = selected_cross_entropy(hidden, weight, labels, keep, bias=bias, denominator=denominator, impl=impl)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all((t.grad == 0).all() for t in (hidden, weight, bias))


def test_kept_rows_alone_are_read_in_the_backward():
    inputs, labels, keep = make(dtype=torch.float64)
    hidden, weight, _ = inputs
    inputs = (hidden, weight, None)
    exact = gradients(definition(inputs, labels, keep), inputs)
    stats = token_stats(hidden, weight, labels)
    with torch.no_grad():
        hidden[~keep | (labels == -100)] = torch.nan
    ours = gradients(selected_cross_entropy(hidden, weight, labels, keep, stats=stats), inputs)
    torch.testing.assert_close(ours, exact)


def test_rows_of_nan_that_are_ignored_or_dropped_leave_every_gradient_as_it_was():
    inputs, labels, keep = make(dtype=torch.float64)
    exact = gradients(definition(inputs, labels, keep), inputs)
    with torch.no_grad():
        inputs[0][~keep | (labels == -100)] = torch.nan
    loss = selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2])  # computes the statistics itself
    torch.testing.assert_close(gradients(loss, inputs), exact)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_rows_of_nan_that_are_ignored_leave_the_loss_as_it_was(impl):
    inputs, labels, keep = make(dtype=torch.float64)
    exact = definition(inputs, labels, keep).detach()
    with torch.no_grad():
        inputs[0][labels == -100] = torch.nan
    loss = selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2], impl=impl)
    torch.testing.assert_close(loss.detach(), exact)


def test_a_kept_row_that_is_ignored_does_not_count():
    inputs, labels, keep = make(dtype=torch.float64)
    hidden, weight, _ = inputs
    all_kept = selected_cross_entropy(hidden, weight, labels, torch.ones_like(keep))
    torch.testing.assert_close(all_kept, torch.nn.functional.cross_entropy(hidden @ weight.T, labels))


def test_small_blocks_of_rows_change_nothing_and_reruns_are_bitwise_equal(monkeypatch):
    inputs, labels, keep = make()
    hidden, weight, bias = inputs
    whole, again = (
        gradients(selected_cross_entropy(hidden, weight, labels, keep, bias=bias), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    monkeypatch.setattr("tokensel.ops.chunked_grad.WORKSPACE_MIB", 0.05)  # six rows of 2,048 columns
    split = gradients(selected_cross_entropy(hidden, weight, labels, keep, bias=bias), inputs)
    torch.testing.assert_close(split, whole)


def test_scratch_is_not_read(monkeypatch):
    inputs, labels, keep = make(dtype=torch.bfloat16)
    first = gradients(selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2]), inputs)
    empty = torch.empty
    monkeypatch.setattr(tokensel.ops.loss.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    second = gradients(selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2]), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_half_gradients_of_many_row_blocks_are_as_exact_as_of_one(monkeypatch):
    monkeypatch.setattr("tokensel.ops.chunked_grad.WORKSPACE_MIB", 1e-3)  # one row of 200 columns
    inputs, labels, keep = make(N=600, V=200, dtype=torch.bfloat16)
    loss = selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2])
    exact, eager = (definition(inputs, labels, keep, dtype=d) for d in (torch.float64, torch.float32))
    ours, exact, eager = ([x.detach(), *gradients(x, inputs)] for x in (loss, exact, eager))
    assert_within_budget(ours, eager, exact, torch.bfloat16)


@pytest.mark.parametrize("workspace_mib", [256, 0.5], ids=["one block of rows", "many"])
@pytest.mark.parametrize("units", [False, True], ids=["emulated bfloat16", "bfloat16 units"])
def test_bfloat16_gradients_are_within_twice_the_error_of_bfloat16_autograd(units, workspace_mib, monkeypatch):
    """Over five blocks of the vocabulary, each of which rounds its part of dX where the CPU has bfloat16 products."""
    monkeypatch.setattr("tokensel.ops.products.multiplies_bfloat16", lambda: units)
    monkeypatch.setattr("tokensel.ops.chunked_grad.WORKSPACE_MIB", workspace_mib)
    inputs, labels, keep = make(N=300, V=9000, D=72, dtype=torch.bfloat16)

    class ProductTypes(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name in ("aten::mm", "aten::addmm_"):
                self.seen.append(args[-1].dtype)
            return function(*args, **(kwargs or {}))

    loss = selected_cross_entropy(*inputs[:2], labels, keep, bias=inputs[2])
    with ProductTypes() as products:
        ours = gradients(loss, inputs)
    logits, behind = products.seen[::3], products.seen[1::3] + products.seen[2::3]
    assert set(logits) == {torch.float32} and set(behind) == {torch.bfloat16 if units else torch.float32}
    eager, exact = (
        gradients(definition(inputs, labels, keep, dtype=d), inputs) for d in (inputs[0].dtype, torch.float64)
    )
    for name, a, b, c in zip(("hidden", "weight", "bias"), ours, eager, exact, strict=True):
        error, allowed = ((t.double() - c).norm() for t in (a, b))
        assert error <= 2 * allowed, f"{name}: error {error:.3g}, of bfloat16 autograd {allowed:.3g}"


def test_leading_dimensions_and_strides_do_not_matter():
    inputs, labels, keep = make(N=44, dtype=torch.float64)
    hidden, weight, bias = inputs
    exact = gradients(definition(inputs, labels, keep), inputs)
    strided = hidden.view(4, 11, -1).transpose(0, 1)  # not contiguous
    labels, keep = (t.view(4, 11).T for t in (labels, keep))
    loss = selected_cross_entropy(strided, weight.T.contiguous().T, labels, keep, bias=bias)
    torch.testing.assert_close(gradients(loss, inputs), exact)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_weights_of_the_loss_are_constants(impl):
    inputs, labels, keep = make(dtype=torch.float64)
    weights = keep.double().requires_grad_()
    selected_cross_entropy(inputs[0], inputs[1], labels, weights, impl=impl).backward()
    assert weights.grad is None


def test_bad_input_is_named(no_interpreter):
    (hidden, weight, _), labels, keep = make(N=6, V=9, D=4)
    with pytest.raises(ValueError, match=r"keep must have shape \[6\]"):
        selected_cross_entropy(hidden, weight, labels, keep[:5])
    with pytest.raises(TypeError, match="keep must be bool or floating-point weights; got torch.int64"):
        selected_cross_entropy(hidden, weight, labels, keep.long())
    with pytest.raises(ValueError, match=r"stats.lse must have shape \[6\]"):
        selected_cross_entropy(hidden, weight, labels, keep, stats=token_stats(hidden[:5], weight, labels[:5]))
    with pytest.raises(TypeError, match="keep must be a torch.Tensor; got list"):
        selected_cross_entropy(hidden, weight, labels, [True] * 6)
    with pytest.raises(ValueError, match="softcap must be positive; got 0"):
        selected_cross_entropy(hidden, weight, labels, keep, softcap=0.0)
    with pytest.raises(ValueError, match=r"bias must have shape \[9\]"):
        selected_cross_entropy(hidden, weight, labels, keep, bias=torch.zeros(8))
    with pytest.raises(ValueError, match="impl must be one of auto, chunked, reference, fused; got 'fast'"):
        selected_cross_entropy(hidden, weight, labels, keep, impl="fast")
    with pytest.raises(ValueError, match="keep is on meta but hidden is on cpu"):
        selected_cross_entropy(hidden, weight, labels, keep.to("meta"))
    with pytest.raises(ValueError, match=r"labels\[1\] is 9, outside"):
        selected_cross_entropy(hidden, weight, torch.full_like(labels, 9).index_fill(0, torch.tensor([0]), 0), keep)
    with pytest.raises(ValueError, match="impl='fused' needs a GPU and the tensors are on cpu"):
        selected_cross_entropy(hidden, weight, labels, keep, impl="fused")


def test_a_denominator_that_is_no_scalar_is_named():
    (hidden, weight, _), labels, keep = make(N=6, V=9, D=4)
    with pytest.raises(ValueError, match="denominator"):
        selected_cross_entropy(hidden, weight, labels, keep, denominator=torch.ones(6))


def test_statistics_on_another_device_are_named():
    (hidden, weight, _), labels, keep = make(N=6, V=9, D=4)
    elsewhere = TokenStats(torch.zeros(6, device="meta"), torch.zeros(6, device="meta"))
    with pytest.raises(ValueError, match="stats"):
        selected_cross_entropy(hidden, weight, labels, keep, stats=elsewhere)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_dropped_row_may_be_anything(impl):
    inputs, labels, keep = make(N=9, V=30, D=4, dtype=torch.float64)
    hidden, weight, bias = inputs
    labels[:] = torch.arange(9)
    keep[:] = torch.arange(9) != 4
    expected = gradients(definition(inputs, labels, keep), inputs)
    with torch.no_grad():
        hidden[4] = torch.nan
    loss = selected_cross_entropy(hidden, weight, labels, keep, bias=bias, impl=impl)
    assert loss.isfinite()
    torch.testing.assert_close(gradients(loss, inputs), expected)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_token_that_cannot_be_has_no_part_in_the_moments(impl):
    logits = torch.randn(3, 10, dtype=torch.float64)
    labels = torch.tensor([1, 2, 3])
    expected = token_stats_from_logits(logits[:, :9], labels, entropy=True, impl="reference")[0]
    logits[:, 9] = -torch.inf
    found = token_stats_from_logits(logits, labels, entropy=True, impl=impl)[0]
    torch.testing.assert_close(found.entropy, expected.entropy)
    torch.testing.assert_close(found.logp_var, expected.logp_var)
