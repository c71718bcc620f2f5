"""What each method must be: formulas in float64, hand-computed cases, limits, gradients and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from made_signals import flat, recorded_of, step
from tiny import packed, padded, samples

from tokensel import Selection, TokenSignals, methods, selected_cross_entropy, token_stats
from tokensel.select.rules import top_share

# Gradients: the loss of a method is its formula with weights that are constants

FORMULAS = {  # Σ over tokens of weight · nll, divided: from statistics in float64
    "dft": lambda nll, c: (torch.exp(-nll.detach()) * nll).mean(),
    "profit": lambda nll, c: (torch.exp(-nll.detach()) > 0.1).double().mul(nll).mean(),
    "eslm": lambda nll, c: nll.topk(math.ceil(0.9 * len(nll)))[0].mean(),
    "rho1": lambda nll, c: nll[(nll - c).topk(math.ceil(0.6 * len(nll))).indices].mean(),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_gradients_are_those_of_the_formula(name, impl):
    N, V, D = 23, 31, 8
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    labels, recorded = torch.randint(0, V, (N,)), torch.rand(N, dtype=torch.float64) * 5
    stats = token_stats(hidden, head, labels, impl=impl)
    method = methods.get(name)
    signals = TokenSignals(torch.ones(N).bool(), torch.zeros(N).long(), nll=stats.nll, reference_nll=recorded)
    loss = selected_cross_entropy(
        hidden, head, labels, method(signals), stats=stats,
        denominator=method.count(signals.response, signals.sample), impl=impl,
    )  # fmt: skip
    ours = torch.autograd.grad(loss, (hidden, head))
    nll = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none")
    expected = FORMULAS[name](nll, recorded)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (hidden, head)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)  # weights are float32


# Invariances through the whole step


def everywhere(name):
    """The method with a scope that one batch can be ranked in."""
    if methods.get(name).scope == "dataset":
        return methods.get(name, scope="batch")
    return methods.get(name)


ROWS = samples(((5, 9), (3, 14), (8, 4), (2, 11)))


@pytest.mark.parametrize("name", methods.names())
def test_layout_and_order_do_not_change_what_is_kept(name, model):
    right, left, together = padded(ROWS), padded(ROWS, side="left"), packed(ROWS)
    expected = step(model, right, everywhere(name))
    for batch in (left, together):
        out = step(model, batch, everywhere(name))
        torch.testing.assert_close(flat(out, batch), flat(expected, right), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-7)
    order = [2, 0, 3, 1]
    out = step(model, {k: v[order] for k, v in right.items()}, everywhere(name))
    torch.testing.assert_close(out.weights, expected.weights[order], rtol=1e-5, atol=1e-6)


PER_SAMPLE = [n for n in methods.names() if methods.get(n).scope == "sample"]


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_micro_batches_add_up_to_the_whole(name, model):
    batch = padded(ROWS)
    method = methods.get(name)
    whole = step(model, batch, method)
    count = method.count(whole.response, whole.sample)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: v[rows] for k, v in batch.items()}
        parts.append(model(**part, **recorded_of(part), selection=Selection(method, denominator=count)).loss)
    torch.testing.assert_close(sum(parts), whole.loss, rtol=1e-6, atol=1e-8)


def test_prompt_tokens_that_the_data_weighs_are_trained(model):
    batch = padded(ROWS)
    valid = batch["attention_mask"].bool()
    given_weights = torch.where(batch["labels"] == -100, 0.2, 1.0) * valid
    out = model(**batch, token_weights=given_weights, selection=Selection(methods.get("weighted", denominator="count")))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    w = given_weights[:, 1:].flatten()
    torch.testing.assert_close(out.loss, ((w * nll).sum() / (w != 0).sum()), rtol=1e-6, atol=0, check_dtype=False)
    assert (out.weights[:, 0] == 0).all() and (out.weights[:, 1] > 0).all()


def test_what_was_chosen_before_is_what_is_trained(model):
    batch = padded(ROWS)
    method = methods.get("rho1", rho=0.4)
    scored = model(**batch, **recorded_of(batch), selection=Selection(method, score_only=True))
    assert scored.loss is None
    keep = top_share(scored.score, scored.response, torch.zeros_like(scored.sample), 0.4)
    torch.testing.assert_close(scored.weights, keep.float())
    chosen = keep.flip(0).float() * scored.response  # something else
    out = model(
        **batch, **recorded_of(batch), chosen_weights=chosen, selection=Selection(method, denominator=chosen.sum())
    )
    assert torch.equal(out.weights, chosen)
    torch.testing.assert_close(out.loss, (chosen * out.nll).sum() / chosen.sum(), rtol=1e-5, atol=0, check_dtype=False)


def test_a_step_says_how_many_tokens_can_be_predicted(model):
    out = step(model, padded(ROWS), methods.get("clean_posterior", warmup_steps=0))
    known = {"nll": out.nll, "vocab_size": model.config.vocab_size}
    expected = methods.get("clean_posterior", warmup_steps=0).score(TokenSignals(out.response, out.sample, **known))
    torch.testing.assert_close(out.score, expected, rtol=1e-6, atol=0)
