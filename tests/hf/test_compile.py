"""torch.compile: the functions are one graph, and give what they give without it."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_lm, padded, samples

from tokensel import (
    Selection,
    TokenSignals,
    apply_to,
    methods,
    prompt_attention_mass,
    selected_cross_entropy,
    token_logprobs,
    token_stats,
    token_stats_pair,
)
from tokensel.ops.products import HAS_TRITON
from tokensel.ops.token_stats import EXTRAS, MOMENTS


def step(hidden, weight, old_hidden, bias, labels, sample, q, k, impl):
    """Statistics, attention, scores, keep and loss in one graph."""
    head = {"bias": bias, "softcap": 20.0, "impl": impl}
    now, old = token_stats_pair((hidden, weight), (old_hidden, weight), labels, **head)
    response = labels != -100
    mass = prompt_attention_mass(q, k, ~response[None], impl=impl)[0]
    signals = TokenSignals(response, sample, nll=now.nll, history_nll=old.nll, mass=mass)
    keep = methods.get("sstoken")(signals)
    return selected_cross_entropy(hidden, weight, labels, keep, stats=now, **head), keep


def inputs():
    N, V, D = 24, 90, 16
    labels = torch.randint(0, V, (N,))
    labels[[0, 1, 2, 12, 13, 14, 15]] = -100
    hidden, weight, bias = (t.requires_grad_() for t in (torch.randn(N, D), torch.randn(V, D), torch.randn(V)))
    q, k = torch.randn(1, 4, N, 8), torch.randn(1, 2, N, 8)
    return hidden, weight, torch.randn(N, D), bias, labels, torch.arange(N) // 12 * 12, q, k


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_a_whole_step_is_one_graph(impl):
    pytest.importorskip("triton")
    arguments = inputs()
    trained = [t for t in arguments if t.requires_grad]
    loss, keep = step(*arguments, impl)
    expected = torch.autograd.grad(loss, trained)
    torch._dynamo.reset()
    compiled_loss, compiled_keep = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments, impl)
    assert torch.equal(compiled_keep, keep)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(torch.autograd.grad(compiled_loss, trained), expected)


def test_a_frozen_head_compiles_too():
    hidden, weight, _, bias, labels, *_ = inputs()
    weight.requires_grad_(False), bias.requires_grad_(False)

    def loss_of(hidden):
        stats = token_stats(hidden, weight, labels, entropy=True)
        return selected_cross_entropy(hidden, weight, labels, stats.entropy > 1.0, stats=stats)

    torch._dynamo.reset()
    (expected,) = torch.autograd.grad(loss_of(hidden), hidden)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), hidden)[0], expected)


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probabilities_are_one_graph(entropy):
    hidden, weight, _, bias, labels, *_ = inputs()
    trained = (hidden, weight, bias)

    def loss_of(hidden, weight, bias):
        ranks = token_stats(hidden, weight, labels, bias=bias, rank=True, renyi2=True).rank
        log_p, entropies = token_logprobs(hidden, weight, labels, bias=bias, entropy=entropy, temperature=0.7)
        return -(log_p * (ranks < 40)).sum() + (0.1 * entropies.sum() if entropy else 0)

    torch._dynamo.reset()
    loss = loss_of(*trained)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(*trained)
    torch.testing.assert_close(compiled, loss)
    torch.testing.assert_close(torch.autograd.grad(compiled, trained), torch.autograd.grad(loss, trained))


def test_operators_keep_their_promises():
    hidden, weight, old, bias, labels, _, q, k = (t.detach() for t in inputs())
    every = [*MOMENTS, *EXTRAS]
    of_every = [("chunked", every), *([("fused", ["renyi2", "rank"])] if HAS_TRITON else [])]
    for impl, wanted in (("chunked", []), *of_every):
        head = (labels, torch.randn(2, 24) if wanted else None, bias, 20.0, 1.0, wanted, -100, impl, 256.0)
        torch.library.opcheck(torch.ops.tokensel.models_stats, ([hidden, old], [weight, weight], *head))
    lse, coefficient = torch.randn(24) + 8, torch.rand(24)
    for terms in (None, torch.rand(3, 24)):
        rows = (labels.clamp(min=0), coefficient, lse, terms)
        backward = (hidden, weight, bias, *rows, None, 1.0, [True, False, True], "chunked")
        torch.library.opcheck(torch.ops.tokensel.selected_gradients, backward)
    mask = torch.ones(1, 24, dtype=torch.bool)
    mass = (q, k, mask, mask, mask, None, None, None, 0.3, None, 5, None, "chunked")
    torch.library.opcheck(torch.ops.tokensel.prompt_mass, mass)


@pytest.mark.slow
def test_a_patched_model_compiles_with_gradient_checkpointing():
    model, batch = causal_lm(dtype=torch.float32, attention="sdpa", num_hidden_layers=1), padded(samples())
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    apply_to(model)
    selection = Selection(methods.get("attention"))
    out = model(**batch, selection=selection)
    out.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")(**batch, selection=selection)
    compiled.loss.backward()
    assert torch.equal(compiled.weights, out.weights)
    torch.testing.assert_close(compiled.loss, out.loss)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
