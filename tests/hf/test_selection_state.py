"""A selection advances with the optimizer: draws, warm-ups, averages and what was seen; its state brings them back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import causal_lm, lora, padded, samples
from training import ROWS, build, build_lora, largest_difference, make_trainer, record, run, weights

import tokensel
from tokensel import AdapterOff, LastSeen, ModelCopy, Selection, apply_to, auto_history, methods
from tokensel.arguments import SelectiveTrainingArguments


def patched(model=None):
    model = causal_lm(dtype=torch.float32) if model is None else model
    apply_to(model)
    return model.train()


def kept(model, batch, selection):
    return model(**batch, selection=selection).weights > 0


def loop(model, batch, selection, steps=1, lr=0.1):
    """What README shows; gives the weights of each step."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=lr)
    outputs = []
    for _ in range(steps):
        outputs.append(model(**batch, selection=selection))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
    return outputs


# Advancing


def test_random_draws_anew_in_each_step_of_a_loop():
    model, batch, selection = patched(), padded(samples()), Selection(methods.get("random"))
    first, second = (out.weights for out in loop(model, batch, selection, steps=2))
    assert not torch.equal(first, second) and torch.equal(first.sum(1), second.sum(1))
    fresh = Selection(methods.get("random"))
    assert torch.equal(first, model(**batch, selection=fresh).weights)
    fresh.step()
    assert torch.equal(second, model(**batch, selection=fresh).weights)


def test_a_warm_up_ends_after_its_samples():
    rows = samples()
    model, batch = patched(), padded(rows)
    selection = Selection(methods.get("sstoken", rel_warmup=8), history=ModelCopy(model))
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    for _ in range(2):  # 2 steps of 4 rows, in micro-batches of 3 and 1
        for part in (padded(rows[:3]), padded(rows[3:])):
            score = model(**part, selection=selection)
            response = score.response
            assert torch.equal(score.score[response], 0.5 * score.mass[response])
        selection.step()
    assert (selection.progress.steps, selection.progress.samples) == (2, 8)
    after = model(**batch, selection=selection)
    assert not torch.equal(after.score[after.response], 0.5 * after.mass[after.response])


def test_forgetting_unlearns_more_with_every_step():
    rows = padded(samples())
    model, selection = patched(), Selection(methods.get("forgetting", lambda_max=0.2, lambda_steps=4))
    nll = {"base_nll": torch.rand(rows["labels"].shape), "reference_nll": torch.rand(rows["labels"].shape)}
    lowest = [float(out.weights.min()) for out in loop(model, rows | nll, selection, steps=3)]
    assert lowest[0] == 0 and lowest[2] < lowest[1] < 0


def test_an_average_moves_by_its_decay():
    model = patched()
    history = ModelCopy(model, decay=0.75)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loop(model, padded(samples()), Selection(methods.get("rel"), history=history))
    expected = {name: torch.lerp(before[name], p.detach(), 0.25) for name, p in model.named_parameters()}
    assert largest_difference(history.state_dict(), expected) <= 1e-7
    assert largest_difference(expected, before) > 1e-4


def test_a_threshold_moves_after_its_second_step():
    selection = Selection(methods.get("ada_eslm", alpha=0.3, speed=2.0))
    model, batch, alphas = patched(), padded(samples()), []
    for _ in range(2):
        loop(model, batch, selection)
        alphas.append(float(selection.method.rule.alpha))
    assert alphas[0] == pytest.approx(0.3) and abs(alphas[1] - 0.3) > 1e-4


def test_last_seen_knows_the_step_before_and_holds_no_batches():
    model, batch, history = patched(), padded(samples()), LastSeen()
    first, second = loop(model, batch, Selection(methods.get("rel"), history=history), steps=2)
    assert torch.equal(second.history_nll[second.response], first.nll[first.response])
    assert history._visits == []


def test_scoring_and_evaluation_are_no_part_of_the_progress():
    model, batch, selection = patched(), padded(samples()), Selection(methods.get("random"))
    model(**batch, selection=replace(selection, score_only=True))
    threshold = Selection(methods.get("ada_eslm"))
    with torch.no_grad():
        model(**batch, selection=selection)
        model(**batch, selection=threshold)
    assert selection.progress.rows == 0 and threshold.method.rule._sums.tolist() == [0, 0]
    copy = replace(selection, denominator=7.0)  # shares what advances
    model.eval()(**batch, selection=copy)  # trained as from_pretrained gives it, without dropout
    assert selection.progress.rows == 4
    copy.step(samples=16)
    assert (selection.progress.steps, selection.progress.samples, selection.progress.rows) == (1, 16, 0)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew_in_every_step():
    model = patched(causal_lm(dtype=torch.float32, num_hidden_layers=1))
    batch, selection = padded(samples()), Selection(methods.get("random"))
    expected = [kept(model, batch, selection)]
    for _ in range(5):
        selection.step()
        expected.append(kept(model, batch, selection))
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled, selection = torch.compile(model, backend=backend), Selection(methods.get("random"))
    found, made = [], []
    for _ in range(6):
        found.append(kept(compiled, batch, selection))
        made.append(len(graphs))
        selection.step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert made[2] == made[5]


# The state


def saved(selection, tmp_path):
    torch.save(selection.state_dict(), tmp_path / "selection.pt")
    return torch.load(tmp_path / "selection.pt", weights_only=True)


@pytest.mark.parametrize("kind", ["random", "last_seen", "ema", "ada_eslm"])
def test_a_resumed_loop_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    def make(model):
        if kind in ("random", "ada_eslm"):
            return Selection(methods.get(kind))
        return Selection(methods.get("rel"), history=LastSeen() if kind == "last_seen" else ModelCopy(model, 0.5))

    batch = padded(samples())
    whole = patched()
    outputs = loop(whole, batch, make(whole), steps=4)
    first = patched()
    selection = make(first)
    loop(first, batch, selection, steps=2)
    state = saved(selection, tmp_path)
    assert (state["steps"], state["samples"]) == (2, 8)
    model = patched()
    resumed = make(model)
    model.load_state_dict(first.state_dict())
    resumed.load_state_dict(state)
    for found, expected in zip(loop(model, batch, resumed, steps=2), outputs[2:], strict=True):
        assert torch.equal(found.weights, expected.weights) and torch.equal(found.loss, expected.loss)


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    model = patched()
    seen = Selection(methods.get("rel"), history=LastSeen())
    loop(model, padded(samples()), seen)
    state = seen.state_dict()
    for other, message in (
        (Selection(methods.get("random")), "state belongs to method 'rel', but this selection has 'random'"),
        (Selection(methods.get("rel"), history=ModelCopy(model)), "belongs to history 'last_seen', but .* 'frozen'"),
        (Selection(methods.get("rel")), "belongs to history 'last_seen', but .* 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.progress.steps == 0
    with pytest.raises(ValueError, match="state lacks 'samples'"):
        seen.load_state_dict({name: value for name, value in state.items() if name != "samples"})


def test_a_step_without_a_forward_is_an_error():
    selection = Selection(methods.get("full"))
    with pytest.raises(ValueError, match="no forward has used this selection since the last step.*apply_to"):
        selection.step()
    model, batch = causal_lm(), padded(samples())
    model(**batch, selection=selection).loss.backward()  # not patched: transformers swallows the keyword
    with pytest.raises(ValueError, match="no forward has used this selection"):
        selection.step()
    loop(patched(), batch, selection)
    with pytest.raises(ValueError, match="no forward has used this selection"):
        selection.step()


def test_a_name_is_no_method_and_no_history():
    with pytest.raises(TypeError, match=r"method must be what tokensel.methods.get\(NAME\) gives; got 'sstoken'"):
        Selection("sstoken")
    with pytest.raises(TypeError, match="history must be None or a live history: .*; got 'frozen'"):
        Selection(methods.get("rel"), history="frozen")


@pytest.mark.parametrize("kind", ["last_seen", "ada_eslm"])
def test_going_back_to_a_state_forgets_a_step_that_did_not_end(kind):
    rows, ends = samples(), []
    for interrupted in (False, True):
        model, history = patched(), LastSeen() if kind == "last_seen" else None
        selection = Selection(methods.get("rel" if history else kind), history=history)
        loop(model, padded(rows[:2]), selection)
        if interrupted:
            state = selection.state_dict()
            model(**padded(rows[2:]), selection=selection)  # and no step
            selection.load_state_dict(state)
        loop(model, padded(rows[:2]), selection)
        ends.append(selection.state_dict())
    tensors = [end.pop("tensors") for end in ends]
    assert ends[0] == ends[1] and ends[0]["samples"] == 4
    torch.testing.assert_close(tensors[0], tensors[1], rtol=0, atol=0, equal_nan=True)


def test_a_state_without_its_rule_changes_nothing():
    model, batch = patched(), padded(samples())
    selection = Selection(methods.get("ada_eslm"))
    loop(model, batch, selection, steps=2)
    state = selection.state_dict() | {"tensors": {}}
    with pytest.raises(
        ValueError, match=r"another rule of method 'ada_eslm': it has \[\], this selection \['rule.alpha'"
    ):
        selection.load_state_dict(state | {"steps": 99})
    assert selection.progress.steps == 2


# The trainers use the same


def test_a_trainer_advances_by_the_samples_of_its_steps(tmp_path):
    trainer = run(tmp_path, method="random", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    steps = len(ROWS) // 4
    assert (trainer._selection.progress.steps, trainer._selection.progress.samples) == (steps, len(ROWS))
    draws = [out.weights for _, out in trainer.seen]
    trainer.seen.clear()
    trainer.train()  # once more, from the beginning
    assert trainer._selection.progress.steps == steps
    assert all(torch.equal(a, out.weights) for a, (_, out) in zip(draws, trainer.seen, strict=True))


@pytest.mark.parametrize("with_state", [True, False], ids=["as saved", "of 0.1, which saved none for random"])
def test_a_trainer_resumes_its_draws(with_state, tmp_path):
    settings = {"method": "random", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = run(tmp_path, **settings)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    if not with_state:
        (checkpoint / "selection_state.safetensors").unlink()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (_, a), (_, b) in zip(whole.seen[2:], resumed.seen, strict=True):
        assert torch.equal(a.weights, b.weights)
    assert largest_difference(weights(whole), weights(resumed)) == 0
    if with_state:
        other = make_trainer(tmp_path, **settings | {"method": "full"})
        with pytest.raises(ValueError, match="belongs to method 'random', but this selection has 'full'"):
            other.train(resume_from_checkpoint=str(checkpoint))


# Defaults


def test_a_history_for_a_loop_is_the_adapters_off_or_a_frozen_copy(capsys):
    adapters = patched(lora(causal_lm()))
    assert isinstance(auto_history(adapters), AdapterOff)
    assert capsys.readouterr().out == (
        "history 'auto' is 'adapter_off': the same model with its adapters disabled; it costs one forward per step, no "
        "memory\n"
    )
    whole = patched()
    frozen = auto_history(whole)
    assert type(frozen) is ModelCopy and frozen.name == "frozen"
    assert (
        "is 'frozen': the model as it was when the run began; it costs one forward per step" in capsys.readouterr().out
    )
    first, second = loop(whole, padded(samples()), Selection(methods.get("rel"), history=frozen), steps=2)
    assert torch.equal(second.history_nll, first.nll) and not torch.equal(second.nll, first.nll)


@pytest.mark.parametrize(
    ("model", "settings", "history"),
    [
        (build, {"method": "rel"}, "frozen"),
        (build_lora, {"method": "rel"}, "adapter_off"),
        (build_lora, {"method": "rel", "history_store": True}, "recorded"),
        (build_lora, {"method": "rel", "recorded": True}, "none"),
        (build_lora, {"method": "random"}, "none"),
        (build_lora, {"method": "rel", "history": "frozen"}, "frozen"),
    ],
)
def test_a_trainer_chooses_its_history_says_so_and_logs_it(model, settings, history, tmp_path, capsys):
    file = record(tmp_path / "h.parquet", build())
    if "history_store" in settings:
        settings = settings | {"history_store": file}
    if "recorded" in settings:
        settings = settings | {"recorded": {"history": file}}
    trainer = make_trainer(tmp_path, model(), **settings)
    told = capsys.readouterr().out
    assert trainer.args.history == history and trainer.args.to_dict()["history"] == history
    assert (f"history 'auto' is {history!r}" in told) == ("history" not in settings and history != "none")


def test_the_callers_arguments_stay_auto_for_the_next_model(tmp_path):
    args = SelectiveTrainingArguments(output_dir=str(tmp_path), method="rel", report_to="none", use_cpu=True)
    for model, history in ((build(), "frozen"), (build_lora(), "adapter_off")):
        trainer = tokensel.SelectiveTrainer(model, args, train_dataset=ROWS)
        assert (trainer.args.history, args.history) == (history, "auto")


def test_a_method_is_asked_for_by_name(tmp_path):
    with pytest.raises(ValueError, match="method is missing, and has no default; set it to one of ada_eslm, "):
        make_trainer(tmp_path)
