"""The quality studies: every method runs in the small worlds, and the README shows what was committed."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import long_rows, quality, worlds
from tokensel import methods


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "STEPS", 4)
        patch.setattr(worlds, "ROWS", {"base": 64, "noisy": 96, "clean": 96, "held_out": 16})
        made = worlds.build_world(tmp_path_factory.mktemp("world") / "0", 0, kind="mixed", share=0.5, base_steps=4)
        worlds.record_everything(made)
        yield made


@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains_by_changing_one_word(world, name):
    found = worlds.fine_tune(world, name, {}, steps=4)
    assert math.isfinite(found["nll"]) and found["tokens_per_second"] > 0
    everything = {"full", "weighted", "dft", "soft_weights", "shad_rft", "critical_tokens"}
    if name in everything:
        assert found["kept_share"] == 1 == found["noise_kept"] and found["precision"] is None
    elif name != "profit":  # an untrained model gives every token less than tau
        assert 0 < found["kept_share"] < 1 and 0 <= found["noise_kept"] <= 1
        kept_noise = found["noise_kept"]
        assert found["precision"] == pytest.approx(found["precision"]) and (kept_noise < 1 or found["precision"] == 0)


def test_swapped_rows_are_noise_from_end_to_end(world):
    from tokensel.planted import make_rows, plant_noise

    rows = make_rows(40, seed=3)
    planted = plant_noise(rows, world.tokenizer, kind="swapped", share=0.5, seed=1)
    swapped = [r for r in planted if any(r["noise"])]
    assert 10 < len(swapped) < 30
    for row in swapped:
        response = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert all(row["noise"][i] for i in response[:-1]) and not row["noise"][response[-1]]
    clean = plant_noise(rows, world.tokenizer, kind="none", share=0, seed=1)
    texts = {tuple(r["labels"]) for r in clean}
    assert all(r["input_ids"] != c["input_ids"] for r, c in zip(planted, clean, strict=True) if any(r["noise"]))
    assert all(tuple(r["labels"]) in texts for r in planted if not any(r["noise"]))


def test_a_spread_is_the_mean_and_half_the_range():
    assert quality.spread([1.0, 2.0, 4.0]) == "2.333 ± 1.500"
    assert quality.spread([None]) == "-" == quality.percent([None])
    assert quality.percent([0.5, 0.6]) == "55 %"


def test_a_table_goes_between_its_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- table: text -->\nold\n<!-- end of table: text -->\nb\n", encoding="utf-8")
    quality.into_readme("text", "| new |", page)
    assert page.read_text() == "a\n<!-- table: text -->\n| new |\n<!-- end of table: text -->\nb\n"
    with pytest.raises(ValueError, match="lacks the markers <!-- table: planted -->"):
        quality.into_readme("planted", "", page)


@pytest.mark.parametrize("file", sorted(quality.RESULTS.glob("quality.*.json")), ids=lambda file: file.stem)
def test_the_readme_shows_the_committed_results(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    assert quality.STUDIES[found["study"]][1](found) in quality.README.read_text(encoding="utf-8")
    if found["study"] == "planted":
        assert {row["method"] for row in found["rows"].values()} == set(methods.names())
        assert all(len(row["runs"]) == found["seeds"] == 3 for row in found["rows"].values())


def test_real_text_needs_a_prompt_and_a_completion():
    assert quality.as_prompt_and_completion({"question": "q", "answer": "a"}) == {"prompt": "q\n", "completion": "a"}
    with pytest.raises(ValueError, match=r"found \['messages'\]"):
        quality.as_prompt_and_completion({"messages": []})


def test_the_readme_shows_how_memory_grows_with_the_row():
    found = json.loads((quality.RESULTS / "long_rows.json").read_text(encoding="utf-8"))
    assert long_rows.table(found) in quality.README.read_text(encoding="utf-8")
    peaks = found["peak_mib"]["tokensel"]
    assert peaks["32768"] < 2.3 * peaks["16384"]  # linear: twice, not four times


def test_the_published_way_holds_what_ours_does_not():
    ours, theirs = (long_rows.peak_of(way, 1024) for way in ("tokensel", "as published"))
    logits = 1024 * 32000 * 4 / 2**20
    assert ours < 1.5 * logits < 3 * logits < theirs
