"""The page in a real browser: no error on its console, pointing and keys work, long samples scroll."""

from __future__ import annotations

import re

import pytest
from browser import ALT, CHROMIUM, CONTROL, META, SHIFT, Browser

from tokensel.report import write_selection_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


def sample(title, n, dropped=3, **changed):
    """Prompt tokens 0 to 3, then a response of which every `dropped`th token is dropped."""
    response = [i >= 4 for i in range(n)]
    kept = [r and i % dropped != 0 for i, r in enumerate(response)]
    return {
        "title": title,
        "tokens": [f" t{i}" for i in range(n)],
        "response": response,
        "kept": kept,
        "weight": [float(k) if r else None for k, r in zip(kept, response, strict=True)],
        "score": [i / n if r else None for i, r in enumerate(response)],
        "nll": [i / 10 if r else None for i, r in enumerate(response)],
        "history_nll": [i / 5 if r else None for i, r in enumerate(response)],
        "rel": [i / 10 if r else None for i, r in enumerate(response)],
        "mass": [0.25 if r else None for r in response],
        "rank": [n - i if r else None for i, r in enumerate(response)],
        "noise": [False] * n,
    } | changed


CURVES = {
    "rel_mean": [[1, 0.1], [2, 0.3]],
    "rel_std": [[1, 0.05], [2, 0.1]],
    "kept_by_position": [[i, 0.6] for i in range(1, 11)],
    "signal_agreement": [[1, -0.2], [2, 0.1]],
    "churn": [[2, 0.25]],
}


def run(name, *samples, curves=CURVES, **more):
    return {"name": name, "samples": list(samples), "curves": curves, **more}


def show(browser, path, *runs, table=None, **view):
    write_selection_page(path / "page.html", list(runs), title="A page", table=table)
    browser.open(path / "page.html", **view)


def token(i):
    return f'#text [data-i="{i}"]'


def button(bar, i):
    return f"#{bar} button:nth-child({i})"


def panel(browser):
    return re.sub(r"\s+", " ", browser.js("$('panel').innerText"))


def focused(browser):
    """The text of what has the focus, and where it is."""
    return browser.js("(e => [e.parentElement.id, e.textContent])(document.activeElement)")


def pressed(browser):
    return browser.js("[...document.querySelectorAll('[aria-pressed=true]')].map(e => e.textContent)")


def css(browser, selector, name):
    return browser.js(f"getComputedStyle(document.querySelector({selector!r})).{name}")


def test_the_page_answers_the_pointer(browser, tmp_path):
    samples = sample("short", 60), sample("other", 50)
    show(browser, tmp_path, run("sstoken", *samples), run("random", *samples), table=[{"method": "x", "NLL": 1.0}])
    assert (
        browser.js("[...document.querySelectorAll('section')].filter(e => !e.hidden && e.querySelector('svg')).length")
        == 4
    )
    browser.mouse(token(5))
    assert panel(browser) == (
        'token " t5" kept rank 55 score 0.083 NLL 0.500 history NLL 1.000 REL 0.500 prompt mass 0.250'
    )
    browser.mouse(token(6))
    assert 'token " t6" dropped rank 54' in panel(browser)
    assert (
        css(browser, token(6) + " s", "textDecorationLine")
        == "line-through"
        != css(browser, token(5), "textDecorationLine")
    )
    browser.mouse(token(0))
    assert panel(browser) == 'token " t0" prompt: not learnt'
    assert css(browser, token(4), "backgroundColor") != css(browser, token(40), "backgroundColor")
    browser.mouse(button("runs", 2), click=True)
    browser.mouse(button("samples", 2), click=True)
    assert pressed(browser) == ["random", "other"] and panel(browser) == "Point at a token."
    assert browser.errors() == []


def test_every_key_moves_within_its_one_tab_stop(browser, tmp_path):
    samples = sample("short", 60), sample("long", 2000)
    show(browser, tmp_path, run("sstoken", *samples), run("random", *samples))
    visited = []
    for _ in range(3):
        browser.key("Tab")
        visited.append(focused(browser))
    assert visited == [["runs", "sstoken"], ["samples", "short"], ["text", " t4"]]
    browser.key("ArrowRight", times=2)
    assert focused(browser) == ["text", " t6"] and 'token " t6" dropped' in panel(browser)
    browser.key("End")
    assert focused(browser) == ["text", " t59"]
    browser.key("ArrowRight")
    browser.key("ArrowLeft")
    assert focused(browser) == ["text", " t58"] and 'token " t58"' in panel(browser)
    browser.key("Home")
    assert focused(browser) == ["text", " t4"]
    browser.key("ArrowRight")
    browser.key("Escape")
    assert focused(browser) == ["samples", "short"]
    browser.key("Tab")
    assert focused(browser) == ["text", " t5"]  # where one was
    browser.key("Escape")
    browser.key("ArrowRight")
    assert focused(browser) == ["samples", "long"] and pressed(browser) == ["sstoken", "long"]
    browser.key("Tab")
    assert focused(browser) == ["text", " t4"]  # of another sample, the first
    browser.key("ArrowRight", times=2)
    browser.key("Tab", SHIFT, times=2)
    browser.key("End")
    assert focused(browser) == ["runs", "random"] and pressed(browser) == ["random", "long"]
    browser.key("ArrowRight")  # there is none behind it
    assert focused(browser) == ["runs", "random"]
    browser.key("Tab", times=2)
    assert focused(browser) == ["text", " t6"]  # the same token by another method
    browser.key("Tab")
    assert focused(browser)[0] != "text" and browser.errors() == []


def test_a_pick_by_the_mouse_keeps_the_focus_and_other_keys_are_left_to_the_browser(browser, tmp_path):
    show(browser, tmp_path, run("sstoken", sample("short", 60)), run("random", sample("short", 60)))
    browser.js("taken = 0; addEventListener('keydown', e => taken += e.defaultPrevented)")
    browser.mouse(button("runs", 2), click=True)
    assert focused(browser) == ["runs", "random"] and pressed(browser) == ["random", "short"]
    browser.js(f"document.querySelector({token(9)!r}).focus()")
    for modifier in (ALT, CONTROL, META, SHIFT):
        browser.key("End", modifier)
    browser.key("ArrowDown")
    assert focused(browser) == ["text", " t9"] and browser.js("taken") == 0
    browser.key("End")
    assert focused(browser) == ["text", " t59"] and browser.js("taken") == 1
    browser.js("document.activeElement.blur()")
    for key in ("ArrowRight", "ArrowDown", "Home"):
        browser.key(key)
    assert browser.js("taken") == 1 and pressed(browser) == ["random", "short"] and browser.errors() == []


def test_a_long_sample_scrolls_to_the_token_that_has_the_focus(browser, tmp_path):
    show(browser, tmp_path, run("sstoken", sample("long", 2000)), height=300)
    assert browser.js("$('text').children.length") == 2000
    assert browser.js("$('text').scrollHeight > $('text').clientHeight + 100")
    browser.key("Tab", times=3)
    browser.key("End")
    assert focused(browser) == ["text", " t1999"]
    panel, box, rect = "$('panel')", "$('text')", "getBoundingClientRect()"
    top, bottom = browser.js(f"(r => [r.top, r.bottom])(document.activeElement.{rect})")
    assert browser.js(f"{box}.{rect}.top") <= top and bottom <= browser.js(f"{box}.{rect}.bottom") + 1
    assert bottom <= browser.js(f"{panel}.{rect}.top")
    browser.key("Home")
    browser.js(f"scrollBy(0, document.activeElement.{rect}.bottom - innerHeight + 9)")  # behind the panel
    browser.key("ArrowRight")
    assert browser.js(f"document.activeElement.{rect}.bottom <= {panel}.{rect}.top")
    assert browser.js("range(Array(200000).fill(0.5))") == [0.5, 0.5]  # too many to be arguments of Math.min


def test_runs_may_have_watched_different_rows(browser, tmp_path):
    show(browser, tmp_path, run("many", sample("a", 60), sample("b", 60)), run("one", sample("c", 20)))
    browser.mouse(button("samples", 2), click=True)
    browser.mouse(button("runs", 2), click=True)
    assert pressed(browser) == ["one", "c"] and browser.js("$('text').children.length") == 20
    assert focused(browser) == ["runs", "one"] and browser.errors() == []


def test_weights_other_than_zero_and_one_are_told_and_negative_ones_marked(browser, tmp_path):
    plain = sample("s", 12)
    weight = [None] * 4 + [1.0, 0.0, -0.5, 0.25, 1.0, 1.0, 1.0, float("nan")]
    unlearnt = sample("s", 12, weight=weight, kept=[w is not None and w != 0 for w in weight], score=[None] * 12)
    show(browser, tmp_path, run("sstoken", plain))
    assert css(browser, ".legend .unlearn", "display") == "none"
    show(browser, tmp_path, run("sstoken", plain), run("forgetting", unlearnt))
    assert css(browser, ".legend .unlearn", "display") != "none"
    browser.mouse(button("runs", 2), click=True)
    said = []
    for i in (4, 5, 6, 7, 11):
        browser.mouse(token(i))
        said.append(panel(browser).partition(" rank")[0])
    assert said == [
        'token " t4" kept',
        'token " t5" dropped',
        'token " t6" un-learnt weight -0.500',
        'token " t7" kept weight 0.250',
        'token " t11" kept',
    ]
    assert [css(browser, token(i), "boxShadow") == "none" for i in (4, 5, 6, 7)] == [True, True, False, True]
    assert browser.js("$('count').textContent") == "kept 7 of 8 (1 un-learnt)"  # whether or not they have a score


def test_noise_and_a_wider_scope_are_spoken_of_where_there_are_some(browser, tmp_path):
    clean, noisy = sample("s", 12), sample("s", 12, noise=[i in (5, 6) for i in range(12)])
    show(browser, tmp_path, run("sstoken", clean), run("rho1", clean, scope="batch"))
    assert "noise" not in browser.js("document.body.innerText") and "ranks" not in browser.js("document.body.innerText")
    browser.mouse(button("runs", 2), click=True)
    note = "This method ranks the tokens of a whole {}; here the watched rows were ranked together."
    assert note.format("optimizer step") in browser.js("document.body.innerText")
    show(browser, tmp_path, run("x", clean, scope="micro_batch"), run("sstoken", noisy, scope="sample"))
    assert note.format("micro-batch") in browser.js("document.body.innerText")
    assert "planted noise, which" in browser.js("document.body.innerText")
    browser.mouse(button("runs", 2), click=True)
    assert browser.js("$('count').textContent") == "kept 6 of 8; planted noise kept 1 of 2"
    assert "ranks" not in browser.js("document.body.innerText")


def test_tokens_without_width_can_be_pointed_at(browser, tmp_path):
    odd = ["<s>", "a", "b", "c", "\n", "x\n\n", "", "", "\u200b", "\t", "</s>", "\n"]
    show(browser, tmp_path, run("sstoken", sample("s", 12, tokens=odd)))
    said = []
    for i in range(4, 12):
        assert browser.js(f"document.querySelector({token(i)!r}).getClientRects()[0].width") >= 5, odd[i]
        browser.mouse(token(i))
        said.append(panel(browser).partition(" rank")[0])
    assert said[:3] == [r'token "\n" kept', r'token "x\n\n" kept', 'token "" dropped']
    assert css(browser, token(6) + " s", "borderTopWidth") == css(browser, token(7), "borderTopWidth") == "1px"
    assert "21b5" in ascii(
        browser.js(f"getComputedStyle(document.querySelector({token(4)!r} + ' .break'), '::before').content")
    )
    assert browser.js("$('text').textContent") == "".join(odd)  # what one copies


def contrast(one, other):
    def luminance(colour):
        parts = [float(c) / 255 for c in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_legible_on_every_score(browser, tmp_path, dark):
    show(browser, tmp_path, run("sstoken", sample("s", 60)), dark=dark)
    of = "(e => (c => [c.color, c.backgroundColor, c.opacity])(getComputedStyle(e)))"
    card = css(browser, "#text", "backgroundColor")
    for colour, ground, opacity in browser.js(f"[...document.querySelectorAll('#text span')].map({of})"):
        assert opacity == "1" and contrast(colour, card if ground == "rgba(0, 0, 0, 0)" else ground) >= 4.5
    for colour, _, opacity in browser.js(f"[...document.querySelectorAll('.legend *, .note, .lead')].map({of})"):
        assert opacity == "1" and contrast(colour, css(browser, "body", "backgroundColor")) >= 4.5


def test_charts_have_round_ticks_the_band_of_one_run_and_short_names(browser, tmp_path):
    name = "a very long name of a run, rho 0.6 <b>"
    wide = {"rel_mean": [[1, 0.02], [2, 0.04]], "rel_std": [[1, 3.0], [2, 3.0]], "churn": [[1, None], [2, 0.0]]}
    show(browser, tmp_path, run("sstoken", sample("s", 12)), run(name, sample("s", 12), curves=wide), width=400)
    ticks = "[...document.querySelectorAll('#rel text[text-anchor=end]')].map(e => e.textContent)"
    assert browser.js(ticks) == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert browser.js("document.querySelectorAll('#rel line[stroke=\"var(--dim)\"]').length") == 1  # zero
    assert browser.js("[...document.querySelectorAll('#rel tspan')].map(e => e.textContent)") == [
        "sstoken",
        name[:17] + "\u2026",
    ]
    assert browser.js("document.querySelectorAll('#rel title')[1].textContent") == name
    assert browser.js(
        "document.documentElement.scrollWidth <= innerWidth && $('rel').scrollWidth > $('rel').clientWidth"
    )
    assert browser.js("document.querySelector('#rel text').getBoundingClientRect().height") >= 10
    assert browser.js("['circle', 'polyline'].map(e => document.querySelectorAll('#churn ' + e).length)") == [2, 0]
    browser.mouse(button("runs", 2), click=True)
    assert browser.js(ticks) == ["-4", "-2", "0", "2", "4"]
    assert browser.errors() == []


def test_a_broken_page_would_be_seen(browser, tmp_path):
    page = tmp_path / "broken.html"
    write_selection_page(page, [run("x", sample("s", 9), curves={})], title="t")
    text = page.read_text(encoding="utf-8")
    for right, wrong, said in (
        ("draw();\n</script>", "drow();\n</script>", "drow is not defined"),
        ("draw();\n</script>", "draw(); console.error('told');\n</script>", "told"),
        ("</main>", "<img src='missing.png'></main>", "ERR_FILE_NOT_FOUND"),
    ):
        assert text.count(right) == 1
        page.write_text(text.replace(right, wrong), encoding="utf-8")
        browser.open(page)
        assert any(said in error for error in browser.errors())
