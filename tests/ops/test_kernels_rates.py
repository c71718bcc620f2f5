"""The rule by which impl="auto" takes an implementation on a GPU."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from tokensel_kernels import rates
from tokensel_kernels.rates import choose, read_rates, write_rates

H200 = "NVIDIA H200"


@pytest.fixture
def tables(monkeypatch):
    """Puts tables of what was measured and estimated in the shipped ones' places."""

    def put(measured, estimated):
        monkeypatch.setattr(rates, "shipped", lambda: measured)
        monkeypatch.setattr(rates, "estimated", lambda: {"sm_90": estimated})

    return put


def test_what_was_measured_goes_before_what_is_estimated(tables):
    estimated = {"statistics": {"fused": 1.05, "chunked": 1.2}, "gradient": {"fused": 1.05, "chunked": 1.67}}
    tables({H200: {"statistics": {"fused": 1.2, "chunked": 1.12}}}, estimated)
    impl, reason = choose(H200, "sm_90", "statistics")
    assert impl == "chunked"
    assert reason == "measured on NVIDIA H200: fused 1.20 and chunked 1.12 times its matrix products"
    impl, reason = choose(H200, "sm_90", "gradient")
    assert impl == "fused" and reason == "estimated for sm_90: fused 1.05 and chunked 1.67 times its matrix products"


def test_figures_of_one_chip_say_nothing_of_another(tables):
    H100 = "NVIDIA H100 80GB HBM3"
    tables({H200: {"statistics": {"fused": 1.2, "chunked": 1.12}}}, {"statistics": {"fused": 1.05, "chunked": 1.2}})
    assert choose(H100, "sm_90", "statistics")[0] == "fused"
    assert choose(H100, "sm_90", "gradient") == ("fused", f"neither measured on {H100} nor estimated for sm_90")
    assert choose("B200", "sm_100", "statistics") == ("fused", "neither measured on B200 nor estimated for sm_100")


@pytest.mark.parametrize("known", [{}, {"fused": 1.3}, {"chunked": 1.0}])
def test_one_figure_is_nothing_to_compare_with(known, tables):
    tables({H200: {"gradient": known}}, {"gradient": {"chunked": 1.0}})
    assert choose(H200, "sm_90", "gradient")[0] == "fused"
    tables({H200: {"gradient": known}}, {"gradient": {"fused": 1.4, "chunked": 1.0}})
    assert choose(H200, "sm_90", "gradient")[0] == "chunked"


def test_equal_figures_take_the_one_without_logits(tables):
    tables({H200: {"gradient": {"chunked": 1.1, "fused": 1.1}}}, {})
    assert choose(H200, "sm_90", "gradient")[0] == "fused"


def test_auto_takes_each_work_by_its_own_figures(tables, monkeypatch):
    """On a GPU that is not there: what `resolve_impl` asks of the device is put in its place."""
    from tokensel.ops import checks
    from tokensel_kernels import tiles

    tables({}, {"statistics": {"fused": 1.05, "chunked": 1.2}, "gradient": {"fused": 1.9, "chunked": 1.2}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    monkeypatch.setattr(tiles, "chip_family", lambda device: ("sm_90", 132))
    checks._fastest.cache_clear()

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

    taken = [checks.resolve_impl("auto", OnGpu(), work=work) for work in (None, "statistics", "gradient")]
    assert taken == ["fused", "fused", "chunked"]
    OnGpu.dtype = torch.float64
    assert checks.resolve_impl("auto", OnGpu(), work="statistics") == "chunked"
    assert checks.resolve_impl("auto", torch.empty(2, 2), work="statistics") == "chunked"
    checks._fastest.cache_clear()


def test_the_shipped_estimates_take_fused_on_hopper():
    works = rates.estimated()["sm_90"]
    assert set(works) == set(rates.WORKS) and all(1 < works[w]["fused"] < works[w]["chunked"] for w in works)


def test_an_unknown_work_is_named():
    with pytest.raises(ValueError, match="work must be one of statistics, gradient; got 'stats'"):
        choose(H200, "sm_90", "stats")


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "the file must be an object; got"),
        ({H200: {"mass": {}}}, f"{H200} must be an object with statistics, gradient; got"),
        ({H200: {"gradient": {"reference": 1.0}}}, f"gradient of {H200} must be an object with fused, chunked"),
        *[({H200: {"gradient": {"fused": bad}}}, "must be positive") for bad in (0, -1.0, True, "1", None)],
    ],
)
def test_a_bad_table_is_named(content, message, tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"rates of .*rates.json: .*{message}"):
        read_rates(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.json cannot be read"):
        read_rates(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ValueError, match="text.json cannot be read"):
        read_rates(tmp_path / "text.json")


def test_a_table_is_read_as_it_was_written_over_another(tmp_path):
    old = {"B": {"gradient": {"fused": 1.1, "chunked": 1.8}}, "A": {"statistics": {"fused": 1.0, "chunked": 1.0}}}
    new = {"A": {"gradient": {"fused": 1.2, "chunked": 1.9}, "statistics": {"fused": 1.1, "chunked": 1.0}}}
    write_rates(tmp_path / "new.json", new)
    assert read_rates(tmp_path / "new.json") == new
    assert read_rates(tmp_path / "new.json", old) == old | new
    assert list(json.loads((tmp_path / "new.json").read_text())["A"]) == ["statistics", "gradient"]


def test_the_shipped_table_can_be_read_and_claims_nothing_of_chips_without_figures():
    assert all(impls for works in rates.shipped().values() for impls in works.values())
