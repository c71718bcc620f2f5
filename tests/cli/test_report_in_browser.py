"""The page in a real browser: no error on its console, pointing and keys work, long samples scroll."""

from __future__ import annotations

import re

import pytest

from tokensel.report import write_selection_page
from tools.screenshot import chromium, find_chromium

try:
    pytest.importorskip("playwright", reason="the page of `tokensel report`: pip install playwright")
    find_chromium()
except FileNotFoundError as error:
    pytest.skip(f"the page of `tokensel report`: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser):
    with browser.new_page() as tab:
        yield tab


@pytest.fixture
def errors(page):
    """What goes wrong on the page: exceptions, and what its console is told."""
    messages = []
    page.on("pageerror", lambda error: messages.append(error.message))
    page.on("console", lambda message: messages.append(message.text))
    return messages


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


def show(page, path, *runs, table=None, width=1000, height=900, dark=False):
    write_selection_page(path / "page.html", list(runs), title="A page", table=table)
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.goto((path / "page.html").as_uri())


def press(page, key, times=1):
    for _ in range(times):
        page.keyboard.press(key)


def token(i):
    return f'#text [data-i="{i}"]'


def button(bar, i):
    return f"#{bar} button:nth-child({i})"


def panel(page):
    return re.sub(r"\s+", " ", page.evaluate("$('panel').innerText"))


def focused(page):
    """The text of what has the focus, and where it is."""
    return page.evaluate("(e => [e.parentElement.id, e.textContent])(document.activeElement)")


def pressed(page):
    return page.evaluate("[...document.querySelectorAll('[aria-pressed=true]')].map(e => e.textContent)")


def css(page, selector, name):
    return page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{name}")


def test_the_page_answers_the_pointer(page, errors, tmp_path):
    samples = sample("short", 60), sample("other", 50)
    show(page, tmp_path, run("sstoken", *samples), run("random", *samples), table=[{"method": "x", "NLL": 1.0}])
    assert (
        page.evaluate(
            "[...document.querySelectorAll('section')].filter(e => !e.hidden && e.querySelector('svg')).length"
        )
        == 4
    )
    page.hover(token(5))
    assert panel(page) == (
        'token " t5" kept rank 55 score 0.083 NLL 0.500 history NLL 1.000 REL 0.500 prompt mass 0.250'
    )
    page.hover(token(6))
    assert 'token " t6" dropped rank 54' in panel(page)
    assert (
        css(page, token(6) + " s", "textDecorationLine") == "line-through" != css(page, token(5), "textDecorationLine")
    )
    page.hover(token(0))
    assert panel(page) == 'token " t0" prompt: not learnt'
    assert css(page, token(4), "backgroundColor") != css(page, token(40), "backgroundColor")
    page.click(button("runs", 2))
    page.click(button("samples", 2))
    assert pressed(page) == ["random", "other"] and panel(page) == "Point at a token."
    assert errors == []


def test_every_key_moves_within_its_one_tab_stop(page, errors, tmp_path):
    samples = sample("short", 60), sample("long", 2000)
    show(page, tmp_path, run("sstoken", *samples), run("random", *samples))
    visited = []
    for _ in range(3):
        press(page, "Tab")
        visited.append(focused(page))
    assert visited == [["runs", "sstoken"], ["samples", "short"], ["text", " t4"]]
    press(page, "ArrowRight", times=2)
    assert focused(page) == ["text", " t6"] and 'token " t6" dropped' in panel(page)
    press(page, "End")
    assert focused(page) == ["text", " t59"]
    press(page, "ArrowRight")
    press(page, "ArrowLeft")
    assert focused(page) == ["text", " t58"] and 'token " t58"' in panel(page)
    press(page, "Home")
    assert focused(page) == ["text", " t4"]
    press(page, "ArrowRight")
    press(page, "Escape")
    assert focused(page) == ["samples", "short"]
    press(page, "Tab")
    assert focused(page) == ["text", " t5"]  # where one was
    press(page, "Escape")
    press(page, "ArrowRight")
    assert focused(page) == ["samples", "long"] and pressed(page) == ["sstoken", "long"]
    press(page, "Tab")
    assert focused(page) == ["text", " t4"]  # of another sample, the first
    press(page, "ArrowRight", times=2)
    press(page, "Shift+Tab", times=2)
    press(page, "End")
    assert focused(page) == ["runs", "random"] and pressed(page) == ["random", "long"]
    press(page, "ArrowRight")  # there is none behind it
    assert focused(page) == ["runs", "random"]
    press(page, "Tab", times=2)
    assert focused(page) == ["text", " t6"]  # the same token by another method
    press(page, "Tab")
    assert focused(page)[0] != "text" and errors == []


def test_a_pick_by_the_mouse_keeps_the_focus_and_other_keys_are_left_to_the_browser(page, errors, tmp_path):
    show(page, tmp_path, run("sstoken", sample("short", 60)), run("random", sample("short", 60)))
    page.evaluate("taken = 0; addEventListener('keydown', e => taken += e.defaultPrevented)")
    page.click(button("runs", 2))
    assert focused(page) == ["runs", "random"] and pressed(page) == ["random", "short"]
    page.evaluate(f"document.querySelector({token(9)!r}).focus()")
    for modifier in ("Alt", "Control", "Meta", "Shift"):
        press(page, f"{modifier}+End")
    press(page, "ArrowDown")
    assert focused(page) == ["text", " t9"] and page.evaluate("taken") == 0
    press(page, "End")
    assert focused(page) == ["text", " t59"] and page.evaluate("taken") == 1
    page.evaluate("document.activeElement.blur()")
    for key in ("ArrowRight", "ArrowDown", "Home"):
        press(page, key)
    assert page.evaluate("taken") == 1 and pressed(page) == ["random", "short"] and errors == []


def test_a_long_sample_scrolls_to_the_token_that_has_the_focus(page, tmp_path):
    show(page, tmp_path, run("sstoken", sample("long", 2000)), height=300)
    assert page.evaluate("$('text').children.length") == 2000
    assert page.evaluate("$('text').scrollHeight > $('text').clientHeight + 100")
    press(page, "Tab", times=3)
    press(page, "End")
    assert focused(page) == ["text", " t1999"]
    panel, box, rect = "$('panel')", "$('text')", "getBoundingClientRect()"
    top, bottom = page.evaluate(f"(r => [r.top, r.bottom])(document.activeElement.{rect})")
    assert page.evaluate(f"{box}.{rect}.top") <= top and bottom <= page.evaluate(f"{box}.{rect}.bottom") + 1
    assert bottom <= page.evaluate(f"{panel}.{rect}.top")
    press(page, "Home")
    page.evaluate(f"scrollBy(0, document.activeElement.{rect}.bottom - innerHeight + 9)")  # behind the panel
    press(page, "ArrowRight")
    assert page.evaluate(f"document.activeElement.{rect}.bottom <= {panel}.{rect}.top")
    assert page.evaluate("range(Array(200000).fill(0.5))") == [0.5, 0.5]  # too many to be arguments of Math.min


def test_runs_may_have_watched_different_rows(page, errors, tmp_path):
    show(page, tmp_path, run("many", sample("a", 60), sample("b", 60)), run("one", sample("c", 20)))
    page.click(button("samples", 2))
    page.click(button("runs", 2))
    assert pressed(page) == ["one", "c"] and page.evaluate("$('text').children.length") == 20
    assert focused(page) == ["runs", "one"] and errors == []


def test_weights_other_than_zero_and_one_are_told_and_negative_ones_marked(page, tmp_path):
    plain = sample("s", 12)
    weight = [None] * 4 + [1.0, 0.0, -0.5, 0.25, 1.0, 1.0, 1.0, float("nan")]
    unlearnt = sample("s", 12, weight=weight, kept=[w is not None and w != 0 for w in weight], score=[None] * 12)
    show(page, tmp_path, run("sstoken", plain))
    assert css(page, ".legend .unlearn", "display") == "none"
    show(page, tmp_path, run("sstoken", plain), run("forgetting", unlearnt))
    assert css(page, ".legend .unlearn", "display") != "none"
    page.click(button("runs", 2))
    said = []
    for i in (4, 5, 6, 7, 11):
        page.hover(token(i))
        said.append(panel(page).partition(" rank")[0])
    assert said == [
        'token " t4" kept',
        'token " t5" dropped',
        'token " t6" un-learnt weight -0.500',
        'token " t7" kept weight 0.250',
        'token " t11" kept',
    ]
    assert [css(page, token(i), "boxShadow") == "none" for i in (4, 5, 6, 7)] == [True, True, False, True]
    assert page.evaluate("$('count').textContent") == "kept 7 of 8 (1 un-learnt)"  # whether or not they have a score


def test_noise_and_a_wider_scope_are_spoken_of_where_there_are_some(page, tmp_path):
    clean, noisy = sample("s", 12), sample("s", 12, noise=[i in (5, 6) for i in range(12)])
    show(page, tmp_path, run("sstoken", clean), run("rho1", clean, scope="batch"))
    assert "noise" not in page.inner_text("body") and "ranks" not in page.inner_text("body")
    page.click(button("runs", 2))
    note = "This method ranks the tokens of a whole {}; here the watched rows were ranked together."
    assert note.format("optimizer step") in page.inner_text("body")
    show(page, tmp_path, run("x", clean, scope="micro_batch"), run("sstoken", noisy, scope="sample"))
    assert note.format("micro-batch") in page.inner_text("body")
    assert "planted noise, which" in page.inner_text("body")
    page.click(button("runs", 2))
    assert page.evaluate("$('count').textContent") == "kept 6 of 8; planted noise kept 1 of 2"
    assert "ranks" not in page.inner_text("body")


def test_tokens_without_width_can_be_pointed_at(page, tmp_path):
    odd = ["<s>", "a", "b", "c", "\n", "x\n\n", "", "", "\u200b", "\t", "</s>", "\n"]
    show(page, tmp_path, run("sstoken", sample("s", 12, tokens=odd)))
    said = []
    for i in range(4, 12):
        assert page.evaluate(f"document.querySelector({token(i)!r}).getClientRects()[0].width") >= 5, odd[i]
        page.hover(token(i))
        said.append(panel(page).partition(" rank")[0])
    assert said[:3] == [r'token "\n" kept', r'token "x\n\n" kept', 'token "" dropped']
    assert css(page, token(6) + " s", "borderTopWidth") == css(page, token(7), "borderTopWidth") == "1px"
    assert "21b5" in ascii(
        page.evaluate(f"getComputedStyle(document.querySelector({token(4)!r} + ' .break'), '::before').content")
    )
    assert page.evaluate("$('text').textContent") == "".join(odd)  # what one copies


def contrast(one, other):
    def luminance(colour):
        parts = [float(c) / 255 for c in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_legible_on_every_score(page, tmp_path, dark):
    show(page, tmp_path, run("sstoken", sample("s", 60)), dark=dark)
    of = "(e => (c => [c.color, c.backgroundColor, c.opacity])(getComputedStyle(e)))"
    card = css(page, "#text", "backgroundColor")
    for colour, ground, opacity in page.evaluate(f"[...document.querySelectorAll('#text span')].map({of})"):
        assert opacity == "1" and contrast(colour, card if ground == "rgba(0, 0, 0, 0)" else ground) >= 4.5
    for colour, _, opacity in page.evaluate(f"[...document.querySelectorAll('.legend *, .note, .lead')].map({of})"):
        assert opacity == "1" and contrast(colour, css(page, "body", "backgroundColor")) >= 4.5


def test_charts_have_round_ticks_the_band_of_one_run_and_short_names(page, errors, tmp_path):
    name = "a very long name of a run, rho 0.6 <b>"
    wide = {"rel_mean": [[1, 0.02], [2, 0.04]], "rel_std": [[1, 3.0], [2, 3.0]], "churn": [[1, None], [2, 0.0]]}
    show(page, tmp_path, run("sstoken", sample("s", 12)), run(name, sample("s", 12), curves=wide), width=400)
    ticks = "[...document.querySelectorAll('#rel text[text-anchor=end]')].map(e => e.textContent)"
    assert page.evaluate(ticks) == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert page.evaluate("document.querySelectorAll('#rel line[stroke=\"var(--dim)\"]').length") == 1  # zero
    assert page.evaluate("[...document.querySelectorAll('#rel tspan')].map(e => e.textContent)") == [
        "sstoken",
        name[:17] + "\u2026",
    ]
    assert page.evaluate("document.querySelectorAll('#rel title')[1].textContent") == name
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && $('rel').scrollWidth > $('rel').clientWidth"
    )
    assert page.evaluate("document.querySelector('#rel text').getBoundingClientRect().height") >= 10
    assert page.evaluate("['circle', 'polyline'].map(e => document.querySelectorAll('#churn ' + e).length)") == [2, 0]
    page.click(button("runs", 2))
    assert page.evaluate(ticks) == ["-4", "-2", "0", "2", "4"]
    assert errors == []


HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<img src=x onerror=alert(1)>",
    "]]><!--",
    "\"'` onfocus=alert(1) ",
    "javascript:alert(1)",
    "${alert(1)}",
    "{{data}}",
    "\u2028",
    "\x00\x1b[31m",
    "\ud800",
    "\u202eab",
]


def test_hostile_texts_are_shown_and_nothing_of_them_runs(page, errors, tmp_path):
    page.on("dialog", lambda dialog: errors.append(dialog.message) or dialog.dismiss())
    texts = ["<s>", "a", *HOSTILE, "c"]
    samples = [sample(text, len(texts), tokens=texts) for text in HOSTILE]
    show(page, tmp_path, *[run(text, *samples) for text in HOSTILE], table=[{text: text for text in HOSTILE}])
    assert page.locator("img").count() == 0 and page.locator("tspan").count() == 4 * len(HOSTILE)
    for i, text in enumerate(HOSTILE):
        page.locator("#runs button").nth(i).click()
        page.locator("#samples button").nth(i).click()
        page.locator(token(i + 2)).focus()
        assert page.locator(token(i + 2)).text_content() == page.locator("#runs button").nth(i).text_content() == text
        # neither a byte 0 nor half of a pair of surrogates can stand in HTML
        assert page.locator("td").nth(i).text_content() == text.replace("\x00", "").replace("\ud800", "\ufffd")
    assert errors == []


def test_what_turns_text_around_ends_with_its_token_and_is_told_by_its_code(page, tmp_path):
    texts = ["<s>", "ab\u202e", "cd", "ef", "gh\u2067ij", "kl", "mn"]
    show(page, tmp_path, run("x", sample("s", len(texts), tokens=texts)))
    left = [page.locator(token(i)).bounding_box()["x"] for i in range(1, len(texts))]
    assert left == sorted(left)
    page.locator(token(4)).focus()
    assert 'token "gh\\u{2067}ij" kept' in page.locator("#panel").inner_text().replace("\n", " ")


def test_the_page_runs_no_script_but_its_own(page, errors, tmp_path):
    """Behind the escaping: what would get through it does not run, and asks nobody."""
    show(page, tmp_path, run("x", sample("s", 12)))
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    added = "<img src=missing.png onerror='told=1'><script>told=1</script>"
    (tmp_path / "page.html").write_text(source.replace("</main>", added + "</main>"), encoding="utf-8")
    page.reload()
    assert page.evaluate("[typeof told, $('text').children.length]") == ["undefined", 12]
    assert len(errors) == 3 and all("Content Security Policy" in error for error in errors)


def test_a_broken_page_would_be_seen(page, errors, tmp_path):
    file = tmp_path / "broken.html"
    write_selection_page(file, [run("x", sample("s", 9), curves={})], title="t")
    text = re.sub("<meta http-equiv=.*", "", file.read_text(encoding="utf-8"))  # which would refuse what is changed
    for right, wrong, said in (
        ("draw();\n</script>", "drow();\n</script>", "drow is not defined"),
        ("draw();\n</script>", "draw(); console.error('told');\n</script>", "told"),
        ("</main>", "<img src='missing.png'></main>", "ERR_FILE_NOT_FOUND"),
    ):
        assert text.count(right) == 1
        file.write_text(text.replace(right, wrong), encoding="utf-8")
        errors.clear()
        page.goto(file.as_uri())
        assert page.evaluate("0") == 0 and any(said in error for error in errors)
