"""The page in a real browser: no error on its console, pointing and keys work, long samples scroll."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tokensel.report import write_selection_page

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


def sample(title, n, dropped=3):
    response = [i >= 4 for i in range(n)]
    return {
        "title": title,
        "tokens": [f" t{i}" for i in range(n)],
        "response": response,
        "kept": [r and i % dropped != 0 for i, r in enumerate(response)],
        "score": [i / n if r else None for i, r in enumerate(response)],
        "nll": [i / 10 if r else None for i, r in enumerate(response)],
        "history_nll": [i / 5 if r else None for i, r in enumerate(response)],
        "rel": [i / 10 if r else None for i, r in enumerate(response)],
        "mass": [0.25 if r else None for r in response],
        "rank": [n - i if r else None for i, r in enumerate(response)],
        "noise": [False] * n,
    }


CURVES = {
    "rel_mean": [[1, 0.1], [2, 0.3]],
    "rel_std": [[1, 0.05], [2, 0.1]],
    "kept_by_position": [[i, 0.6] for i in range(1, 11)],
    "signal_agreement": [[1, -0.2], [2, 0.1]],
    "churn": [[2, 0.25]],
}

PROBE = """<script>
const seen = {}, token = i => document.querySelector(`#text [data-i="${i}"]`);
const point = i => token(i).dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
const press = key => dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
point(5); seen.kept = document.getElementById("panel").innerText;
point(6); seen.dropped = document.getElementById("panel").innerText;
point(0); seen.prompt = document.getElementById("panel").innerText;
token(7).focus(); seen.focused = document.getElementById("panel").innerText;
seen.struck = getComputedStyle(token(6)).textDecorationLine;
seen.colours = [4, 40].map(i => getComputedStyle(token(i)).backgroundColor);
seen.charts = [...document.querySelectorAll("section")].filter(e => !e.hidden && e.querySelector("svg")).length;
press("ArrowRight"); const box = document.getElementById("text");
seen.long = box.children.length; seen.scrolls = box.scrollHeight > box.clientHeight + 100;
box.scrollTop = 1e9; seen.end = box.scrollTop > 0;
const last = token(1999).getBoundingClientRect(), frame = box.getBoundingClientRect();
seen.lastVisible = last.bottom <= frame.bottom + 1 && last.top >= frame.top;
press("ArrowDown"); seen.pressed = [...document.querySelectorAll("[aria-pressed=true]")].map(e => e.textContent);
const out = Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)});
document.body.replaceChildren(out);
</script>"""


def browse(tmp_path, page, *flags):
    """(the DOM when the page has run, what its console said)."""
    base = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [CHROMIUM, *base.split(), "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_runs_without_an_error_and_answers_pointer_and_keys(tmp_path):
    page = tmp_path / "page.html"
    samples = [sample("short", 60), sample("long", 2000)]
    runs = [{"name": name, "samples": samples, "curves": CURVES} for name in ("sstoken", "random")]
    write_selection_page(page, runs, title="A page", table=[{"method": "sstoken", "NLL": 1.0}])
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom, console = browse(tmp_path, page, "--dump-dom")
    assert console == []
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1])
    assert re.sub(r"\s+", " ", seen["kept"]) == (
        "token t5 kept rank 55 score 0.083 NLL 0.500 history NLL 1.000 REL 0.500 prompt mass 0.250"
    )
    assert "dropped" in seen["dropped"] and seen["struck"] == "line-through"
    assert "prompt: not learnt" in seen["prompt"] and "token t7" in re.sub(r"\s+", " ", seen["focused"])
    assert seen["colours"][0] != seen["colours"][1] and seen["charts"] == 4
    assert seen["long"] == 2000 and seen["scrolls"] and seen["end"] and seen["lastVisible"]
    assert seen["pressed"] == ["random", "long"]


def test_a_broken_page_would_be_seen(tmp_path):
    page = tmp_path / "broken.html"
    write_selection_page(page, [{"name": "x", "samples": [sample("s", 9)], "curves": {}}], title="t")
    page.write_text(
        page.read_text(encoding="utf-8").replace("draw();\n</script>", "drow();\n</script>"), encoding="utf-8"
    )
    assert any("drow is not defined" in line for line in browse(tmp_path, page, "--dump-dom")[1])
