from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tokensel import SelectionMethod, TokenSignals, methods
from tokensel.documents import token_keys
from tokensel.select import method
from tokensel.select.rules import TopShare

# two samples side by side: 5 and 4 response tokens behind prompts
RESPONSE = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]).bool()
SAMPLE = torch.tensor([0] * 7 + [7] * 5)
NLL = torch.tensor([9.0, 9, 1.0, 2.0, 0.5, 3.0, 1.5, 9, 4.0, 1.0, 2.0, 2.0])
HISTORY = torch.tensor([0.0, 0, 2.0, 2.0, 3.5, 1.0, 1.5, 0, 4.5, 1.0, 3.0, 0.0])
MASS = torch.tensor([0.0, 0, 0.9, 0.2, 0.1, 0.8, 0.3, 0, 0.5, 0.4, 0.3, 0.7])
UNIFORM = torch.tensor([0.0, 0, 0.6, 0.5, 0.4, 0.4, 0.2, 0, 0.5, 0.4, 0.3, 0.2])
# REL: sample 0: 1, 0, 3, -2, 0 -> min-max (x + 2) / 5; sample 7: .5, 0, 1, -2 -> (x + 2) / 3
UNIT_REL = torch.tensor([0, 0, 0.6, 0.4, 1.0, 0.0, 0.4, 0, 2.5 / 3, 2 / 3, 1.0, 0.0])


def signals(**changes):
    fields = dict(
        response=RESPONSE,
        sample=SAMPLE,
        nll=NLL,
        history_nll=HISTORY,
        mass=MASS,
        uniform_mass=UNIFORM,
        key=torch.arange(12),
        entropy=MASS + 1,
        logp_var=MASS + 0.5,
        renyi2=MASS,
        rank=NLL.round(),
        base_nll=HISTORY,
        reference_nll=MASS,
        shuffled_nll=NLL + UNIFORM,
        alone_nll=NLL + 0.3,
        contrast_nll=MASS,
        vocab_size=40,
    )
    return TokenSignals(**fields | changes)


def scored(name, given=None, **parameters):
    return methods.get(name, **parameters).score(given or signals())[RESPONSE]


def test_all_methods_are_there():
    assert methods.names() == sorted(
        "full random weighted sstoken rel history_excess attention rho1 token_cleaning token_cleaning_iterative "
        "forgetting eslm ada_eslm dft profit clean_posterior min_k_pp soft_weights shad_rft t_shirt "
        "critical_tokens f_alpha deft eaft infosft idft rank_tuner talr stm tail_sft".split()
    )


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.9])
def test_sstoken_blends_unit_rel_with_plain_attention(gamma):
    expected = gamma * UNIT_REL + (1 - gamma) * MASS
    torch.testing.assert_close(scored("sstoken", gamma=gamma), expected[RESPONSE])


def test_rel_and_history_excess_are_the_two_signs():
    torch.testing.assert_close(scored("rel"), UNIT_REL[RESPONSE])
    torch.testing.assert_close(scored("history_excess"), 1 - UNIT_REL[RESPONSE])
    torch.testing.assert_close(scored("sstoken", gamma=1, rel_sign=-1), 1 - UNIT_REL[RESPONSE])
    keep = methods.get("rel", rho=0.4)(signals())
    assert keep.nonzero()[:, 0].tolist() == [2, 4, 8, 10]  # the two largest of five, the two largest of four


def test_attention_is_the_mass():
    assert torch.equal(scored("attention"), MASS[RESPONSE])
    assert torch.equal(scored("sstoken", gamma=0), MASS[RESPONSE])
    torch.testing.assert_close(scored("attention", debias="uniform"), (MASS / UNIFORM)[RESPONSE])
    torch.testing.assert_close(
        scored("sstoken", debias="uniform"), (0.5 * UNIT_REL + 0.5 * (MASS / UNIFORM).nan_to_num(0))[RESPONSE]
    )


def test_debias_without_any_visible_prompt_is_zero():
    given = signals(uniform_mass=torch.zeros(12), mass=torch.zeros(12))
    assert (scored("attention", given, debias="uniform") == 0).all()


def test_rel_floor_keeps_small_differences_small():
    small = signals(history_nll=NLL + 0.01 * (HISTORY - NLL))
    torch.testing.assert_close(scored("rel", small), UNIT_REL[RESPONSE], rtol=1e-3, atol=1e-4)  # stretched
    floored = scored("sstoken", small, gamma=1.0, rel_floor=1.0)
    expected = 0.01 * torch.where(SAMPLE == 0, 5 * UNIT_REL, 3 * UNIT_REL)
    torch.testing.assert_close(floored, expected[RESPONSE], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scored("sstoken", gamma=1.0, rel_floor=1.0), UNIT_REL[RESPONSE])  # ranges 5 and 3


def test_rel_warmup_leaves_attention_alone():
    parameters = dict(gamma=0.5, rel_warmup=100)
    assert torch.equal(scored("sstoken", signals(samples_seen=99), **parameters), 0.5 * MASS[RESPONSE])
    torch.testing.assert_close(
        scored("sstoken", signals(samples_seen=100), **parameters), (0.5 * UNIT_REL + 0.5 * MASS)[RESPONSE]
    )


def test_history_equal_to_current_scores_zero_not_nan():
    assert (scored("rel", signals(history_nll=NLL)) == 0).all()
    keep = methods.get("rel", rho=0.5)(signals(history_nll=NLL))
    assert keep.nonzero()[:, 0].tolist() == [2, 3, 4, 8, 9]  # earlier tokens


SELECTING = ("full", "random", "sstoken", "rel", "history_excess", "attention", "rho1", "eslm", "min_k_pp", "t_shirt")


def test_one_response_token_is_kept():
    response = torch.zeros(12).bool()
    response[4] = True
    for name in SELECTING:
        assert methods.get(name)(signals(response=response)).nonzero()[:, 0].tolist() == [4]


def test_weights_are_float32_and_full_keeps_every_response():
    for name in SELECTING:
        weights = methods.get(name)(signals())
        assert weights.dtype == torch.float32 and set(weights.tolist()) <= {0.0, 1.0}
        assert not weights[~RESPONSE].any()
    assert torch.equal(methods.get("full")(signals()).bool(), RESPONSE)


@pytest.mark.parametrize("name", ["sstoken", "rel", "history_excess", "attention", "random"])
@pytest.mark.parametrize("rho", [0.1, 0.5, 0.6, 1.0])
def test_the_number_kept_is_known_before(name, rho):
    method = methods.get(name, rho=rho)
    keep = method(signals()).bool()
    assert int(keep[SAMPLE == 0].sum()) == math.ceil(rho * 5) and int(keep[SAMPLE == 7].sum()) == math.ceil(rho * 4)
    assert int(method.count(RESPONSE, SAMPLE)) == int(keep.sum())


def test_random_depends_on_token_seed_and_step_alone():
    ids = torch.randint(0, 90, (6, 50))
    response = torch.rand(6, 50) < 0.8

    def kept(rows, seed=0, step=0):
        sample = torch.arange(len(rows))[:, None].expand(len(rows), 50) * 50
        given = TokenSignals(response[rows], sample, key=token_keys(ids[rows]), step=step)
        return methods.get("random", rho=0.5, seed=seed)(given)

    everything = list(range(6))
    assert torch.equal(kept(everything), kept(everything))
    assert torch.equal(kept(everything[::-1]).flip(0), kept(everything))
    assert torch.equal(kept([2]), kept(everything)[2:3])
    for other in (kept(everything, step=1), kept(everything, seed=1)):
        overlap = (other * kept(everything)).sum() / kept(everything).sum()
        assert 0.35 < overlap < 0.65  # half of them by chance
    often = torch.stack([kept(everything, step=s) for s in range(200)]).mean(0)
    assert (often[~response] == 0).all()
    assert ((often[response] - 0.5).abs() < 0.17).all()  # five standard deviations of 200 draws


def test_needs_are_what_is_read():
    assert methods.get("full").needs == frozenset()
    assert methods.get("random").needs == {"key"}
    assert methods.get("rel").needs == methods.get("history_excess").needs == {"nll", "history_nll"}
    assert methods.get("attention").needs == methods.get("sstoken", gamma=0).needs == {"mass"}
    assert methods.get("sstoken").needs == {"nll", "history_nll", "mass"}
    assert methods.get("sstoken", gamma=1).needs == {"nll", "history_nll"}
    assert "uniform_mass" in methods.get("sstoken", debias="uniform").needs
    for name in methods.names():
        method = methods.get(name)
        names = [f.name for f in fields(TokenSignals) if f.name not in ("response", "sample", "step", "samples_seen")]
        bare = {n: None for n in names if n not in method.needs}
        assert torch.equal(method(signals(**bare)), method(signals()))
        for needed in method.needs:
            with pytest.raises(ValueError, match=f"method '{name}' needs signals.{needed}, which is None"):
                method(signals(**{needed: None}))


@pytest.mark.parametrize("name", ["nll", "history_nll", "mass"])
def test_a_missing_signal_is_named(name):
    with pytest.raises(ValueError, match=f"method 'sstoken' needs signals.{name}, which is None"):
        methods.get("sstoken")(signals(**{name: None}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_statistic_that_is_not_finite_is_named_with_its_place(value):
    for name in ("nll", "history_nll", "mass"):
        broken = {"nll": NLL, "history_nll": HISTORY, "mass": MASS}[name].clone()
        broken[0] = value  # off the response: nothing to complain of
        methods.get("sstoken")(signals(**{name: broken}))
        broken[9] = value
        with pytest.raises(ValueError, match=rf"{name}\[9\] is {value} on a response token"):
            methods.get("sstoken")(signals(**{name: broken}))


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("sstokn", {}, "unknown method 'sstokn'; did you mean 'sstoken'"),
        ("zzz", {}, "unknown method 'zzz'. Known: ada_eslm"),
        ("full", {"rho": 0.5}, "method 'full' has no parameter rho; it takes: none"),
        ("rel", {"gamma": 0.5}, "method 'rel' has no parameter gamma; it takes: rho"),
        ("sstoken", {"gamma": 1.1}, r"gamma must be in \[0, 1\]; got 1.1"),
        ("sstoken", {"gamma": -0.1}, "gamma must be in"),
        ("sstoken", {"rho": 0}, r"rho must be in \(0, 1\]"),
        ("random", {"rho": 2}, r"rho must be in \(0, 1\]"),
        ("sstoken", {"rel_sign": 0}, "rel_sign must be 1"),
        ("sstoken", {"rel_floor": -1}, "rel_floor must not be negative"),
        ("sstoken", {"rel_warmup": -1}, "rel_warmup must not be negative"),
        ("sstoken", {"gamma": 1, "rel_warmup": 5}, "rel_warmup leaves nothing to score by"),
        ("attention", {"debias": "sink"}, "debias must be None or 'uniform'; got 'sink'"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        methods.get(name, **parameters)


def test_bad_signals_are_named():
    with pytest.raises(TypeError, match="response must be torch.bool"):
        signals(response=RESPONSE.long())
    with pytest.raises(ValueError, match=r"mass must have shape \[12\]"):
        signals(mass=MASS[:5])
    with pytest.raises(TypeError, match="nll must be a torch.Tensor"):
        signals(nll=[1.0])


def test_a_method_of_ones_own_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(method, "_METHODS", dict(method._METHODS))

    @methods.register
    def hardest(rho=0.5):
        return SelectionMethod("hardest", {"nll"}, lambda s: s.nll, TopShare(rho))

    assert "hardest" in methods.names()
    assert methods.get("hardest", rho=0.25)(signals()).nonzero()[:, 0].tolist() == [3, 5, 8]


def test_the_docs_list_every_method():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    for row in methods.describe():
        rule = row["score and rule"].rstrip(".")
        assert f"| `{row['method']}` | {rule} | {row['scope']} | {row['needs']} |" in page
