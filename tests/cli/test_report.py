from __future__ import annotations

import copy
import html
import json
import re
import struct
from html.parser import HTMLParser

import pytest

from tokensel.report import format_table, plot_rel, write_selection_page

FIELDS = ("tokens", "response", "kept", "weight", "score", "nll", "history_nll", "rel", "mass", "rank", "noise")


def make_sample(title, tokens=("<s>", "What", "?", " four", ".")):
    n = len(tokens)
    return {
        "title": title,
        "tokens": list(tokens),
        "response": [False] * (n - 2) + [True] * 2,
        "kept": [False] * (n - 1) + [True],
        "weight": [None] * (n - 2) + [0.0, 1.0],
        "score": [None] * (n - 2) + [0.25, 0.75],
        "nll": [None] * (n - 2) + [2.5, 0.1234567],
        "history_nll": [None] * (n - 2) + [2.0, 1.0],
        "rel": [None] * (n - 2) + [-0.5, float("nan")],
        "mass": [None] * n,
        "rank": [None] * (n - 2) + [2, 1],
        "noise": [False] * n,
    }


def make_run(name="sstoken", samples=2, points=4):
    return {
        "name": name,
        "samples": [make_sample(f"{name} row {i}") for i in range(samples)],
        "curves": {
            "rel_mean": [[5 * i, 0.1 * i - 0.2] for i in range(1, points + 1)],
            "rel_std": [[5 * i, 0.3] for i in range(1, points + 1)],
        },
    }


class Page(HTMLParser):
    """Tags, visible text, and what is inside script elements."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.text, self._script = [], [], "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = False

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def write(tmp_path, runs, **options):
    path = tmp_path / "page.html"
    write_selection_page(path, runs, **{"title": "A title"} | options)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


# The table


def test_a_table_is_aligned():
    rows = [{"method": "full", "NLL": 2.5, "kept": "100%"}, {"method": "history_excess", "NLL": 12.25, "kept": "6%"}]
    assert format_table(rows).splitlines() == [
        "method            NLL  kept",
        "---------------------------",
        "full              2.5  100%",
        "history_excess  12.25    6%",
    ]


def test_a_table_without_rows_or_with_other_columns_is_an_error():
    with pytest.raises(ValueError, match="rows are empty"):
        format_table([])
    with pytest.raises(ValueError, match=r"row 1 has the columns \['a', 'c'\] but row 0 has \['a', 'b'\]"):
        format_table([{"a": 1, "b": 2}, {"a": 1, "c": 2}])


# The plot


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_the_plot_is_a_png_of_its_curves(tmp_path):
    plot_rel(tmp_path / "one.png", [make_run("sstoken")])
    plot_rel(tmp_path / "two.png", [make_run("sstoken"), make_run("random", points=2)])
    assert png_size(tmp_path / "one.png") == png_size(tmp_path / "two.png") == (960, 540)
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_the_plot_draws_mean_and_one_standard_deviation(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, bands = [], []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((a, k)) or plot(self, *a, **k))
    monkeypatch.setattr(Axes, "fill_between", lambda self, *a, **k: bands.append(a) or fill(self, *a, **k))
    runs = [make_run("sstoken"), {"name": "no history", "samples": [], "curves": {"rel_mean": [], "rel_std": []}}]
    plot_rel(tmp_path / "x.png", runs)
    ((steps, mean), named), (band_steps, low, high) = drawn[0], bands[0]
    assert len(drawn) == len(bands) == 1 and named["label"] == "sstoken"
    assert list(steps) == list(band_steps) == [5, 10, 15, 20]
    assert list(mean) == pytest.approx([-0.1, 0.0, 0.1, 0.2])
    assert list(low) == pytest.approx([-0.4, -0.3, -0.2, -0.1])
    assert list(high) == pytest.approx([0.2, 0.3, 0.4, 0.5])


# The page


def test_the_page_embeds_every_run_sample_and_number(tmp_path):
    runs = [make_run("sstoken", samples=3), make_run("random", samples=2)]
    page, _ = write(tmp_path, runs)
    data = page.data
    assert [run["name"] for run in data] == ["sstoken", "random"]
    assert [[s["title"] for s in run["samples"]] for run in data] == [
        ["sstoken row 0", "sstoken row 1", "sstoken row 2"],
        ["random row 0", "random row 1"],
    ]
    sample, given = data[0]["samples"][0], runs[0]["samples"][0]
    for field in ("tokens", "response", "kept", "weight", "score", "rank", "noise", "history_nll", "mass"):
        assert sample[field] == given[field], field
    assert sample["nll"] == [None, None, None, 2.5, pytest.approx(0.1234567, abs=1e-5)]
    assert [x for x, _ in data[1]["curves"]["rel_mean"]] == [5, 10, 15, 20]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    run = make_run()
    run["samples"][0]["score"][-2:] = [float("inf"), float("-inf")]
    page, _ = write(tmp_path, [run])
    sample = page.data[0]["samples"][0]
    assert sample["rel"][-2:] == [-0.5, None] and sample["score"][-2:] == [None, None]
    assert "NaN" not in page.scripts[0] and "Infinity" not in page.scripts[0]


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    page, text = write(tmp_path, [make_run()], table=[{"method": "full", "NLL": 1.0}], notes=["one seed"])
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|import\(|//cdn", text)
    assert "{{" not in text.replace("${", "")


def test_the_page_keeps_its_input(tmp_path):
    runs = [make_run()]
    before = copy.deepcopy(runs)
    write(tmp_path, runs)
    assert repr(runs) == repr(before)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;<!--"


def test_hostile_text_in_tokens_stays_text(tmp_path):
    clean, _ = write(tmp_path, [make_run()])
    run = make_run(HOSTILE, samples=0)
    run["samples"] = [make_sample(HOSTILE, ("<s>", HOSTILE, "'\"\\", " \u2028", "<b>"))]
    page, text = write(tmp_path, [run])
    assert page.tags == clean.tags  # no element more
    assert page.data[0]["name"] == page.data[0]["samples"][0]["title"] == HOSTILE
    assert page.data[0]["samples"][0]["tokens"] == ["<s>", HOSTILE, "'\"\\", " \u2028", "<b>"]
    assert "<img" not in text and text.count("</script>") == 2 and "<!--" not in text


def test_hostile_text_in_title_table_and_notes_stays_text(tmp_path):
    plain = [{"method": "full", "NLL": 1.0}]
    clean, _ = write(tmp_path, [make_run()], table=plain, notes=["a"])
    hostile = [{HOSTILE: HOSTILE, "NLL": 1.0}]
    page, text = write(tmp_path, [make_run()], title=HOSTILE, table=hostile, notes=[HOSTILE])
    assert page.tags == clean.tags
    assert page.text.count(HOSTILE) == 5  # <title>, <h1>, head, cell, note
    assert html.escape(HOSTILE) in text and "<img" not in text


@pytest.mark.parametrize("name", ["title", "table", "data"])
def test_text_that_looks_like_a_place_to_fill_stays_text(tmp_path, name):
    place = "{{" + name + "}}"
    page, _ = write(tmp_path, [make_run(place)], title=place, table=[{place: place}], notes=[place])
    assert page.data[0]["name"] == place and page.text.count(place) == 5


def test_script_puts_tokens_on_the_page_as_text_only(tmp_path):
    _, text = write(tmp_path, [make_run()])
    # the one innerHTML is a chart, made of numbers and fixed words; names go in through textContent
    assert text.count("innerHTML") == 1 and "document.write" not in text and "eval(" not in text
    assert "$(id).innerHTML = out" in text


def test_the_table_and_the_notes_are_shown(tmp_path):
    page, _ = write(tmp_path, [make_run()], table=[{"method": "full", "NLL": 1.5}], notes=["one seed", "only a hint"])
    for text in ("What came out", "method", "NLL", "full", "1.5", "one seed", "only a hint", "A title"):
        assert text in page.text
    assert "What came out" not in write(tmp_path, [make_run()])[0].text


def test_no_runs_and_no_samples_are_errors(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        write(tmp_path, [])
    with pytest.raises(ValueError, match="run 'random' has no samples"):
        write(tmp_path, [make_run(), make_run("random", samples=0)])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_list_is_named(tmp_path, field):
    run = make_run()
    del run["samples"][1][field]
    with pytest.raises(ValueError, match=f"sample 'sstoken row 1' of run 'sstoken' lacks '{field}'"):
        write(tmp_path, [run])


@pytest.mark.parametrize("field", FIELDS[1:])
def test_a_list_of_another_length_is_named(tmp_path, field):
    run = make_run()
    run["samples"][1][field].append(None)
    with pytest.raises(ValueError, match=f"'{field}' of sample 'sstoken row 1' has 6 entries for 5 tokens"):
        write(tmp_path, [run])
    assert not (tmp_path / "page.html").exists()
