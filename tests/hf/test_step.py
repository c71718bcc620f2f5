"""The oracles: what a whole selection step must be, on tiny random models in float64."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import next_token_nll
from tiny import causal_lm, lora, packed, padded, samples

from tokensel import AdapterOff, Selection, apply_to, methods
from tokensel.documents import BatchLayout


def history_of(batch):
    """A made-up recorded history: each token's loss is a function of its id and place, so layouts agree."""
    position = (batch["position_ids"] if "position_ids" in batch else batch["attention_mask"].cumsum(-1) - 1).double()
    return (torch.sin(batch["input_ids"] * 12.9898 + position * 78.233) * 2 + 4.5).float()


def run(model, batch, method="sstoken", history=None, **settings):
    parameters = {k: settings.pop(k) for k in ("gamma", "rho", "rel_sign", "debias") if k in settings}
    selection = Selection(methods.get(method, **parameters), history=history, **settings)
    extra = {} if history is not None else {"history_nll": history_of(batch)}
    return model(**batch, **extra, selection=selection)


def patched(family="Llama", **changes):
    # eager's softmax is float32 whatever the model is; SDPA has no softcap
    model = causal_lm(family, attention="eager" if family == "Gemma2" else "sdpa", **changes)
    apply_to(model)
    return model


def by_sample(x, batch):  # values at valid tokens in the order of samples, whatever the layout
    return x[batch["attention_mask"].bool()] if "attention_mask" in batch else x[0]


def responses(labels, **masks):
    layout = BatchLayout.from_batch({"input_ids": labels, "labels": labels, **masks})
    return layout.response, layout.sample


# The published rule, with full logits and full attention


def published_mask(model, batch, history, gamma, rho):
    """Single-turn, right-padded samples, one at a time, as the published code does it."""
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True)
    keep = torch.zeros(batch["labels"].shape)
    for b, labels in enumerate(batch["labels"]):
        length = int(batch["attention_mask"][b].sum())
        start = int((labels[:length] == -100).sum())
        attention = out.attentions[-1][b].mean(0)  # [S, S], heads averaged
        nll = [float(torch.nn.functional.cross_entropy(out.logits[b, t - 1], labels[t])) for t in range(start, length)]
        rel = torch.tensor([float(history[b, t]) for t in range(start, length)]) - torch.tensor(nll)
        unit = (rel - rel.min()) / (rel.max() - rel.min())
        mass = torch.tensor([float(attention[t, :start].sum()) for t in range(start, length)])
        score = gamma * unit + (1 - gamma) * mass
        kept = score.topk(math.ceil(round(rho * (length - start), 9))).indices + start
        keep[b, kept] = 1
    return keep


@pytest.mark.parametrize("gamma, rho", [(0.5, 0.6), (0.0, 0.6), (1.0, 0.3), (0.3, 0.5), (0.5, 1.0)])
def test_the_mask_is_that_of_the_published_rule(gamma, rho):
    batch = padded(samples())
    model = causal_lm()
    expected = published_mask(model, batch, history_of(batch), gamma, rho)
    apply_to(model)
    assert torch.equal(run(model, batch, gamma=gamma, rho=rho).weights, expected)


def test_gamma_zero_is_attention_alone():
    batch, model = padded(samples()), patched()
    ours, attention = run(model, batch, gamma=0.0), run(model, batch, "attention")
    assert torch.equal(ours.weights, attention.weights) and torch.equal(ours.score, attention.mass)
    assert not torch.equal(ours.weights, run(model, batch, gamma=1.0).weights)


def test_gamma_one_sorts_rel_and_ignores_its_scale():
    batch, model = padded(samples()), patched()
    out = run(model, batch, gamma=1.0, rho=0.5)
    rel = history_of(batch) - out.nll
    for b, labels in enumerate(batch["labels"]):
        own = (labels != -100).nonzero()[:, 0]
        best = own[rel[b, own].argsort(descending=True)[: math.ceil(0.5 * len(own))]]
        assert out.weights[b].nonzero()[:, 0].tolist() == best.sort().values.tolist()
    selection = Selection(methods.get("sstoken", gamma=1.0, rho=0.5))
    stretched = out.nll + 3.7 * rel + 1.9  # REL becomes 3.7 REL + 1.9
    assert torch.equal(model(**batch, history_nll=stretched, selection=selection).weights, out.weights)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Gemma2", "Cohere", "Granite"])
@pytest.mark.parametrize("layout", [padded, packed])
def test_rho_one_is_ordinary_fine_tuning(family, layout):
    batch = layout(samples())
    model = patched(family)
    run(model, batch, rho=1.0).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    if layout is packed:  # transformers' loss would count the first token of the second document
        starts = batch["position_ids"] == 0
        expected = model(**batch | {"labels": batch["labels"].masked_fill(starts, -100)}, use_cache=False).loss
    else:
        expected = model(**batch).loss
    loss = run(model, batch, rho=1.0).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=False)
    expected.backward()
    for name, parameter in model.named_parameters():
        # transformers computes the loss in float32, so that is what can agree
        scale = parameter.grad.abs().max()
        assert (ours[name] - parameter.grad).abs().max() <= 1e-5 * scale + 1e-9, name


def test_a_history_equal_to_the_current_model_has_rel_zero():
    base = causal_lm()
    model = lora(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    apply_to(model)
    batch = padded(samples())
    out = run(model, batch, gamma=1.0, history=AdapterOff(model))
    assert torch.equal(out.history_nll, out.nll) and (out.score == 0).all()


def test_a_live_history_is_the_base_models_loss():
    base = causal_lm()
    batch = padded(samples())
    patched = apply_to(base)
    expected = patched.token_nll({k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"])
    base_weights = {n: p.clone() for n, p in base.named_parameters()}
    model = lora(base).train()
    out = run(model, batch, history=AdapterOff(model))
    torch.testing.assert_close(out.history_nll, expected)
    assert (out.nll - expected).abs().max() > 0.1
    out.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    assert all(torch.equal(p, base_weights[n]) for n, p in base.named_parameters() if n in base_weights)


def test_without_learnt_attention_the_first_tokens_are_kept():
    batch, model = padded(samples()), patched()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.zero_()
        model.model.layers[2].self_attn.k_proj.weight.zero_()
    out = run(model, batch, gamma=0.0, rho=0.6)
    for b, (prompt, response) in enumerate(((5, 9), (3, 14), (8, 4), (2, 11))):
        places = torch.arange(prompt, prompt + response)
        torch.testing.assert_close(out.mass[b, places], (prompt / (places + 1.0)).to(out.mass.dtype))
        kept = math.ceil(round(0.6 * response, 9))
        assert out.weights[b].nonzero()[:, 0].tolist() == places[:kept].tolist()
    debiased = run(model, batch, "attention", debias="uniform").score
    torch.testing.assert_close(debiased[out.response], torch.ones_like(debiased[out.response]))


# Layouts


@pytest.mark.parametrize("method", ["sstoken", "random", "history_excess"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_left_padding_right_padding_and_packing_keep_the_same_tokens(family, method):
    rows = samples()
    # eager attention makes NaN of the padding rows of a float64 model
    model = patched(family, dtype=torch.float32 if family == "Gemma2" else torch.float64)
    outs = []
    for batch in (padded(rows, "right"), padded(rows, "left"), packed(rows)):
        out = run(model, batch, method)
        outs.append((by_sample(out.weights, batch), by_sample(out.nll, batch), out.loss))
    for weights, nll, loss in outs[1:]:
        assert torch.equal(weights, outs[0][0])
        torch.testing.assert_close(nll, outs[0][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, outs[0][2], rtol=1e-6, atol=1e-7)


def test_a_sample_alone_is_selected_as_in_a_batch():
    rows, model = samples(), patched()
    batch = padded(rows)
    together = run(model, batch)
    for b, row in enumerate(rows):
        alone = run(model, padded([row]))
        assert torch.equal(alone.weights[0], together.weights[b, : len(row[0])])


@pytest.mark.parametrize("method", ["sstoken", "random"])
def test_permuting_a_batch_permutes_the_mask(method):
    batch, model = padded(samples()), patched()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: x[order] for name, x in batch.items()}
    assert torch.equal(run(model, shuffled, method).weights, run(model, batch, method).weights[order])


@pytest.mark.parametrize("method", ["sstoken", "random"])
def test_splitting_a_step_into_micro_batches_changes_no_gradient(method):
    rows, model = samples(), patched()
    batch = padded(rows)
    kept = methods.get(method).count(*responses(batch["labels"], attention_mask=batch["attention_mask"]))
    whole = run(model, batch, method)
    whole.loss.backward()
    assert int(whole.weights.sum()) == int(kept)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for part in (rows[:1], rows[1:3], rows[3:]):
        out = run(model, padded(part), method, denominator=kept)
        out.loss.backward()
        total += float(out.loss.detach())
    assert total == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_a_history_that_is_shifted_by_one_changes_the_mask():
    batch, model = padded(samples()), patched()
    selection = Selection(methods.get("rel"))
    history = history_of(batch)
    aligned = model(**batch, history_nll=history, selection=selection).weights
    shifted = model(**batch, history_nll=history.roll(1, 1), selection=selection).weights
    assert not torch.equal(aligned, shifted)


# What is learnt


def test_dropped_tokens_have_no_part_in_loss_or_gradient():
    batch, model = padded(samples()), patched()
    out = run(model, batch, rho=0.4)
    out.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    keep = out.weights[:, 1:]
    expected = (next_token_nll(logits, batch["input_ids"]) * keep).sum() / keep.sum()
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("denominator", [None, 0, 10])
def test_a_batch_without_responses_has_loss_zero_and_finite_gradients(denominator):
    batch, model = padded(samples()), patched()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = run(model, batch, denominator=denominator)
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and not out.weights.any()
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Gemma2"])
def test_chunked_and_reference_take_the_same_step(family):
    batch = padded(samples())
    results = []
    for impl in ("chunked", "reference"):
        model = patched(family)
        out = run(model, batch, impl=impl)
        out.loss.backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (a, grads_a), (b, grads_b) = results
    assert torch.equal(a.weights, b.weights)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(grads_a, grads_b)


# Options


def two_turns():
    ids = torch.randint(3, 97, (1, 14))
    labels = ids.clone()
    labels[0, [0, 1, 2, 3, 8, 9]] = -100  # prompt 0-3, answer 4-7, prompt 8-9, answer 10-13
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    "prompt, first, second",
    [
        ("all", [0, 1, 2, 3], [0, 1, 2, 3, 8, 9]),
        ("first", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("context", [0, 1, 2, 3], list(range(10))),
    ],
)
@pytest.mark.parametrize("row", ["token", "predictor"])
def test_prompt_keys_and_query_rows_of_two_turns(prompt, first, second, row):
    if (row, prompt) == ("predictor", "context"):
        with pytest.raises(ValueError, match="row='predictor' cannot be combined with prompt='context'"):
            Selection(methods.get("full"), row=row, prompt=prompt)
        return
    batch = two_turns()
    model = causal_lm()
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[-1][0].double().mean(0)
    apply_to(model)
    mass = run(model, batch, "attention", row=row, prompt=prompt).mass[0]
    for t in (*range(4, 8), *range(10, 14)):
        keys = first if t < 8 else second
        query = t if row == "token" else t - 1
        visible = [j for j in keys if j <= query]
        assert float(mass[t]) == pytest.approx(float(weights[query, visible].sum()), abs=1e-6)


def test_first_turn_answers_compete_like_all_others():
    batch, model = two_turns(), patched()
    out = run(model, batch, gamma=0.0, rho=0.5)
    assert int(out.weights.sum()) == 4  # half of eight, not the whole first answer and half of the rest
    assert not out.weights[0, [0, 1, 2, 3, 8, 9]].any()


@pytest.mark.parametrize("prompt", ["all", "first", "context"])
def test_packed_conversations_measure_the_mass_of_their_own_prompt(prompt):
    model = patched()
    turns = two_turns()
    row = (turns["input_ids"][0], turns["labels"][0])
    other = samples([(2, 6)])[0]
    alone = [run(model, padded([r]), "attention", prompt=prompt).mass[0] for r in (other, row)]
    together = run(model, packed([other, row]), "attention", prompt=prompt).mass[0]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_labelled_first_token_of_a_packed_document_has_no_loss():
    rows = samples([(0, 5), (0, 7)])  # no prompt at all
    out = run(patched(), packed(rows), "full")
    assert out.nll[0, [0, 5]].tolist() == [0, 0] and int(out.weights.sum()) == 10
    alone = [run(patched(), padded([r]), "full").nll[0] for r in rows]
    torch.testing.assert_close(out.nll[0], torch.cat(alone))


def test_output_is_label_aligned():
    batch, model = padded(samples()), patched(dtype=torch.float32)
    out = run(model, batch)
    shape = batch["labels"].shape
    assert torch.equal(out.response, batch["labels"] != -100)
    for name in ("weights", "score", "nll", "history_nll", "mass"):
        value = getattr(out, name)
        assert value.shape == shape and value.dtype == torch.float32 and not value.requires_grad
    assert (out.nll[~out.response] == 0).all() and (out.mass[~out.response] == 0).all()
    assert out.loss.requires_grad and out.loss.shape == ()


def test_a_first_token_or_a_padding_label_is_no_response():
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    response, sample = responses(labels, attention_mask=mask)
    assert response.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert sample.tolist() == [[0] * 4, [4] * 4]
    response, sample = responses(labels[:1], position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert response.tolist() == [[False, True, False, True]] and sample.tolist() == [[0, 0, 2, 2]]


def test_sink_tokens_are_no_prompt():
    batch = packed(samples())
    model = causal_lm(attention="eager")
    with torch.no_grad():
        eager = model(**batch, output_attentions=True, use_cache=False).attentions[-1][0].double()  # (H, T, T)
    apply_to(model)
    start = torch.where(batch["position_ids"] == 0, torch.arange(56), 0).cummax(-1).values[0]
    prompt = (batch["labels"][0] == -100) & (start[:, None] == start)  # (T, T)
    response = run(model, batch, "attention").response[0]
    for sink in (0, 1, 2):
        mass = run(model, batch, "attention", sink=sink).mass[0].double()
        counts = prompt & (batch["position_ids"][0] >= sink)
        expected = (eager * counts).sum(-1).mean(0)
        torch.testing.assert_close(mass[response], expected[response], rtol=1e-5, atol=1e-6)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="sink must not be negative"):
        Selection(methods.get("full"), sink=-1)
    with pytest.raises(ValueError, match="row must be one of token, predictor; got 'own'"):
        Selection(methods.get("full"), row="own")
    with pytest.raises(ValueError, match="prompt must be one of all, first, context; got 'last'"):
        Selection(methods.get("full"), prompt="last")
    batch, model = padded(samples()), patched()
    with pytest.raises(ValueError, match="needs signals.history_nll"):
        model(**batch, selection=Selection(methods.get("rel")))
    together = packed(samples()) | {"attention_mask": torch.ones(1, 56, dtype=torch.int64)}
    with pytest.raises(ValueError, match="Leave attention_mask out of packed batches"):
        model(**together, selection=Selection(methods.get("full")))
    square = batch | {"attention_mask": torch.ones(4, 1, 17, 17)}
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\]"):
        model(**square, selection=Selection(methods.get("full")))


def test_token_metrics_are_those_of_the_logits():
    model, batch = patched(), padded(samples())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    guess, following = logits.argmax(-1), batch["labels"][:, 1:]
    even = (torch.arange(following.shape[1]) % 2 == 0) & (following != -100)
    following[even] = guess[even]  # every other label is the likeliest token
    output = run(model, batch, "random", token_metrics=True)
    response = output.response[:, 1:]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output.entropy[:, 1:][response].double(), expected[response], rtol=1e-5, atol=1e-6)
    assert torch.equal(output.correct[:, 1:] & response, (guess == following) & response)
    assert 0 < int((output.correct & output.response).sum()) < int(output.response.sum())
    assert run(model, batch, "random").entropy is None
