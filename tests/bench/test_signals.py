"""What the study of signals measures: each figure by hand or by brute force, and a study that goes on."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import tokensel
from benchmarks.machine import short_commit
from benchmarks.quality import real_worlds, signal_plots, signals
from benchmarks.quality.real import RealStudy
from benchmarks.quality.real_rows import Parts
from benchmarks.resume import attempt, digest
from tokensel.testing import make_model, make_rows, make_tokenizer, plant_noise


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny Llama, half of whose rows have random tokens; its lower two of three layers are frozen."""
    folder = tmp_path_factory.mktemp("world")
    texts = make_rows(90, seed=0)
    tokenizer = make_tokenizer(texts)
    make_model(tokenizer, hidden_size=32, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    train = plant_noise(texts[:30], tokenizer, kind="random", share=0.5, seed=0)
    clean = plant_noise(texts[30:], tokenizer, kind="none", share=0, seed=0)
    clean = [{name: row[name] for name in ("input_ids", "labels")} for row in clean]
    parts = Parts(train, clean[:30], clean[30:50])
    return real_worlds.build_world(folder / "world", parts, clean[50:], folder / "model", 2, 0)


@pytest.fixture(scope="module")
def found(world):
    return signals.world_signals(world, batch=4)


def brute_force_area(values, noise):
    hits, others = ([v for v, n in zip(values, noise, strict=True) if n == which] for which in (True, False))
    pairs = list(itertools.product(hits, others))
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("different", [2, 7, 1000])  # values, so that many, some or few are equal
def test_the_area_is_that_of_all_pairs_and_equal_ones_count_half(different):
    values, noise = torch.randint(different, (200,)).double(), torch.rand(200) < 0.3
    assert signals.roc_area(values + noise, noise) == pytest.approx(
        brute_force_area((values + noise).tolist(), noise.tolist()), abs=1e-12
    )
    assert signals.roc_area(-values, noise) == pytest.approx(1 - signals.roc_area(values, noise), abs=1e-12)
    assert signals.roc_area(torch.zeros(200), noise) == 0.5
    assert (signals.roc_area(noise.double(), noise), signals.roc_area(-noise.double(), noise)) == (1, 0)


def test_an_area_without_noise_or_without_clean_tokens_is_refused():
    for noise in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="needs noise and clean tokens; got [04] of noise"):
            signals.roc_area(torch.rand(4), noise)


def test_the_price_of_a_threshold_by_hand():
    values = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    noise = torch.tensor([1, 0, 1, 0, 1, 0, 0, 1, 0, 1]).bool()  # at 9, 7, 5, 2 and 0
    behind = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0, 0, 0]).bool()  # clean ones at 8 and 4
    assert signals.price(values, noise, behind, 50) == {"clean_lost": 2 / 5, "behind": 1 / 2}  # 9, 7, 5 of five: 8, 6
    assert signals.price(values, noise, behind, 80) == {"clean_lost": 4 / 5, "behind": 2 / 4}
    assert signals.price(values, noise, behind, 20) == {"clean_lost": 0, "behind": None}
    equal = torch.ones(10)  # no threshold catches some of them
    assert signals.price(equal, noise, behind, 20) == {"clean_lost": 1, "behind": 2 / 5}


def test_the_five_around_a_token_are_those_that_are_response():
    values = torch.tensor([[100.0, 1, 2, 4, 8, 16, 100]])
    response = torch.tensor([[0, 1, 1, 1, 1, 1, 0]]).bool()
    assert signals.mean_of_near(values, response).tolist() == [
        pytest.approx([0, 7 / 3, 15 / 4, 31 / 5, 30 / 4, 28 / 3, 0])
    ]


def test_two_tokens_behind_noise_are_right_behind_it():
    noise = torch.tensor([[1, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0]]).bool()
    assert signals.right_behind(noise).int().tolist() == [[0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1]]


def test_a_pair_tells_what_neither_signal_tells_alone():
    first, second, row = torch.rand(2000).double(), torch.rand(2000).double(), torch.arange(2000) // 20
    noise = first + second > 1.2
    alone = [signals.roc_area(values, noise) for values in (first, second)]
    assert max(alone) < 0.9 and signals.pair_area(first.exp(), second**3, noise, row) > 0.995
    noise = (first > 0.5) ^ (second > 0.5)  # what only the product tells
    assert signals.pair_area(first, second, noise, row) > 0.95


def test_a_pair_is_tested_on_rows_that_it_was_not_fitted_on():
    row = torch.arange(60) // 3
    areas = [signals.pair_area(torch.rand(60), torch.rand(60), torch.rand(60) < 0.4, row) for _ in range(60)]
    assert sum(areas) / 60 == pytest.approx(0.5, abs=0.04)  # fitted on itself, it would be 0.62


def test_weights_of_a_logistic_regression_are_where_its_gradient_is_zero():
    inputs = torch.cat([torch.ones(300, 1), torch.randn(300, 3)], 1).double()
    target = (torch.rand(300) < torch.sigmoid(inputs @ torch.tensor([0.5, 1, -2, 0]).double())).double()
    weights = signals.logistic_weights(inputs, target)
    slope = inputs.T @ (torch.sigmoid(inputs @ weights) - target) / 300 + 2 * signals.RIDGE * weights
    assert slope.abs().max() < 1e-4 and weights[2] < -1


def noise_posterior(nll, vocab_size):
    """Of one row: EM by hand."""
    share = torch.tensor(0.5).double()
    for _ in range(17):
        drawn = share / vocab_size
        posterior = drawn / (drawn + (1 - share) * torch.exp(-nll))
        share = posterior.mean()
    return posterior


def test_signals_are_those_of_the_models_own_logits_and_attention(world):
    rows = real_worlds.with_reference(world, world.rows("train"))[:20]  # two batches, the second ragged
    base = AutoModelForCausalLM.from_pretrained(world.model, attn_implementation="eager")
    patched = tokensel.apply_to(world.load().train())
    tokens = signals.token_signals(patched, rows, world.tokenizer)
    assert patched.model.training
    place = 0
    for number, row in enumerate(rows):
        with torch.no_grad():
            out = base(torch.tensor([row["input_ids"]]), output_attentions=True)
        prompt = [label == -100 for label in row["labels"]]
        places = [i for i, label in enumerate(row["labels"]) if label != -100]
        log_p = out.logits[0, [i - 1 for i in places]].double().log_softmax(-1)  # (n, V)
        nll = -log_p[range(len(places)), [row["labels"][i] for i in places]]
        entropy = -(log_p.exp() * log_p).sum(-1)
        variance = (log_p.exp() * (log_p + entropy[:, None]) ** 2).sum(-1)
        expected = {
            "nll": nll,
            "base_nll": nll,
            "rel": torch.zeros(len(places)),
            "entropy": entropy,
            "surprise": (nll - entropy) / variance.sqrt(),
            "mass": torch.stack([out.attentions[-1][0, :, i][:, prompt].sum(-1).mean() for i in places]),
            "reference_excess": nll - torch.tensor([row["reference_nll"][i] for i in places]),
            "near_nll": torch.stack([nll[max(0, i - 2) : i + 3].mean() for i in range(len(places))]),
            "row_nll": nll.mean().expand(len(places)),
            "noise_posterior": noise_posterior(nll, log_p.shape[1]),
        }
        assert set(expected) == set(signals.SIGNALS)
        mine = slice(place, place := place + len(places))
        for name, values in expected.items():
            assert torch.allclose(tokens[name][mine], values.double(), atol=2e-4), name
        assert tokens["noise"][mine].tolist() == [bool(row["noise"][i]) for i in places]
        behind = [not row["noise"][i] and any(row["noise"][i - 2 : i]) for i in places]
        assert tokens["behind"][mine].tolist() == behind
        assert set(tokens["row"][mine].tolist()) == {number}
    assert place == len(tokens["nll"]) and any(tokens["noise"]) and any(tokens["behind"])


def test_the_rows_are_looked_at_while_the_model_learns_them(found):
    assert list(found) == ["1", "10", "50", "200"]
    medians = [at["histograms"]["nll"]["clean"]["median"] for at in found.values()]
    assert medians == sorted(medians, reverse=True) and medians[0] > medians[-1] + 0.1
    for at in found.values():
        assert at["rows"] == 30 and 0 < at["noise"] < at["tokens"] and 0 < at["behind"] < 1
        assert set(at["signals"]) == set(signals.SIGNALS) and len(at["pairs"]) == 21
        base = at["histograms"]["base_nll"]
        assert base == found["1"]["histograms"]["base_nll"]  # what is recorded does not move
        assert sum(base["noise"]["counts"]) == at["noise"] == at["tokens"] - sum(base["clean"]["counts"])
    json.dumps(found, allow_nan=False)


def test_rows_without_marks_of_noise_are_refused(world, tmp_path):
    for name, rows in (("unmarked", world.rows("held_out")), ("clean", world.rows("reference"))):
        (tmp_path / name).mkdir()
        rows = [row | {"noise": [0] * len(row["labels"])} for row in rows] if name == "clean" else rows
        (tmp_path / name / "train.json").write_text(json.dumps(rows))
        without = real_worlds.RealWorld(tmp_path / name, world.model, 0, 0)
        with pytest.raises(ValueError, match=r"train\.json: no token is marked as noise"):
            signals.world_signals(without, batch=4)


@pytest.fixture
def run(monkeypatch, tmp_path, found):
    """`run(kinds, results)` in one process, where measuring is instant; `run.asked` has what was measured."""

    def serial(function, tasks, label):
        for key, arguments in tasks.items():
            yield key, attempt(function, *arguments)

    def kind_signals(arguments, batch):
        run.asked.append((*arguments, batch))
        if arguments[0] in run.errors:
            raise run.errors.pop(arguments[0])
        return dict(found)

    def run(kinds, results):
        run.asked, run.saved = [], []
        study = RealStudy("smollm2", None, None, tmp_path, 1, 3, kinds, ())
        signals.run_signals(study, results, lambda: run.saved.append(json.dumps(results)))

    run.errors = {}
    monkeypatch.setattr(signals, "run_all", serial)
    monkeypatch.setattr(signals, "kind_signals", kind_signals)
    monkeypatch.setattr(signals, "pretrained_folder", lambda study: tmp_path)
    monkeypatch.setattr(signals, "make_sources", lambda study, folder: None)
    monkeypatch.setattr(signals, "world_arguments", lambda study, kind, seed, sources, folder: (kind, seed))
    return run


def test_a_study_goes_on_with_the_kinds_that_it_lacks(run):
    results = {}
    run.errors = {"chats": ValueError("no luck"), "docs": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(("random", "chats", "docs", "own"), results)
    assert run.asked == [("random", 0, 4), ("chats", 0, 2), ("docs", 0, 4)] and len(run.saved) == 2
    results = json.loads(run.saved[-1])
    table = signals.signals_table(results)
    assert "| signal | random | chats | docs | own |\n" in table and "| failed | not measured | not measured |" in table
    assert "\n- failed: chats: ValueError: no luck\n- unfinished: 2 of 4 kinds\n- " in table
    assert table.endswith(f"; commit {short_commit(results['machines'][0]['commit'])}.")
    run(("random", "chats", "docs", "own"), results)
    assert [kind for kind, *_ in run.asked] == ["chats", "docs", "own"]  # what failed is tried again
    assert "failed" not in (table := signals.signals_table(results)) and "unfinished" not in table
    assert results["kinds"]["own"]["machine"] == 0 and len(results["machines"]) == 1
    run(("random", "chats"), results)
    assert not run.asked and not run.saved


def test_a_kind_without_noise_is_refused_before_anything_is_trained(run):
    with pytest.raises(ValueError, match="kinds must have noise to tell apart: random, .*; got clean"):
        run(("random", "clean"), {})
    assert not run.asked


def test_the_table_has_areas_prices_and_the_best_pair(run, found):
    run(("random",), results := {})
    table = signals.signals_table(results)
    at = found["200"]
    later = table[table.index("After 200 steps:") :]
    nll = at["signals"]["nll"]
    assert f"| NLL | {nll['auc']:.3f} ({100 * nll['80']['clean_lost']:.1f} %) |\n" in later
    best = max(at["pairs"].values())
    assert f"| best pair | {best:.3f} |\n" in later and best < 1
    assert f"noise, of all clean | {100 * at['behind']:.0f} % |\n" in later
    assert f"noise, of what NLL loses | {100 * nll['80']['behind']:.0f} % |\n" in later
    one, other = (
        signals.SIGNALS[name] for pair, area in at["pairs"].items() if area == best for name in pair.split(", ")
    )
    assert f"- random: {at['tokens']:,} response tokens of 30 rows, " in later
    assert f"; {one} and {other} at step 200\n" in later


def test_the_picture_names_the_results_that_it_shows(run, tmp_path):
    run(("random", "docs"), results := {})
    signal_plots.plot_signals(results, tmp_path / "signals.png")
    assert digest(results["kinds"]).encode() in (tmp_path / "signals.png").read_bytes()
    with pytest.raises(ValueError, match="no kind that is measured"):
        signal_plots.plot_signals({"kinds": {"random": None}}, tmp_path / "none.png")


def test_kinds_are_measured_in_worlds_that_are_built_where_they_lack(world, monkeypatch):
    monkeypatch.setattr(signals, "world_signals", lambda made, batch: {"made": made, "batch": batch})
    arguments = (world.folder, Parts([], [], []), [], world.model, 2, 0)
    assert signals.kind_signals(arguments, 4) == {"made": world, "batch": 4}
    assert math.isfinite(world.rows("train")[0]["base_nll"][0])
