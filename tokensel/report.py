"""What people look at: a page of samples with each token's score and fate, a plot of REL, a table for the terminal."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

TOKEN_FIELDS = ("tokens", "response", "kept", "score", "nll", "history_nll", "rel", "mass", "rank", "noise")


def format_table(rows: list[dict], left: Sequence[str] = ()) -> str:
    """Rows of the same keys as aligned text: the first column and those in `left` to the left, numbers to the right.

    Raises:
        ValueError: no rows, or rows with different keys.
    """
    columns = _columns(rows)
    cells = [columns, *[[str(row[c]) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == columns[0] or column in left else cell.rjust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _columns(rows: list[dict]) -> list[str]:
    if not rows:
        raise ValueError("table rows are empty; give at least one row")
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise ValueError(f"row {number} has the columns {list(row)} but row 0 has {columns}")
    return columns


def plot_rel(path: str | Path, runs: list[dict]) -> None:
    """PNG of REL over the optimizer steps: mean, and a band of one standard deviation, per run.

    Args:
        runs: dicts of "name" and "curves", the latter with "rel_mean" and "rel_std" as lists of [step, nats].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        points = run["curves"]["rel_mean"]
        if not points:
            continue
        steps, mean = zip(*points, strict=True)
        std = [value for _, value in run["curves"]["rel_std"]]
        (line,) = axes.plot(steps, mean, label=run["name"])
        low = [m - s for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("REL = history NLL - current NLL (nats)")
    axes.set_title("Improvement over the history: mean and one standard deviation over response tokens", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def write_selection_page(
    path: str | Path, runs: list[dict], *, title: str, table: list[dict] | None = None, notes: tuple | list = ()
) -> None:
    """One self-contained HTML file: which tokens were kept, and why. Works offline, in light and dark.

    Args:
        runs: dicts of "name", "samples" and "curves". A sample has a "title" and the lists of TOKEN_FIELDS, an entry
            a token; numbers may be None. A curve is a list of [x, value]: "rel_mean" with "rel_std" and
            "signal_agreement" by step, "kept_by_position" by tenth, "churn" by epoch; what is missing is not drawn.
        title: of the page.
        table: rows of the same keys, shown under the samples, with `notes` below.
    Raises:
        ValueError: no runs, a run without samples, or a sample whose lists are missing or differ in length.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    for run in runs:
        if not run["samples"]:
            raise ValueError(f"run {run['name']!r} has no samples")
        for sample in run["samples"]:
            for field in TOKEN_FIELDS:
                if field not in sample:
                    raise ValueError(f"sample {sample['title']!r} of run {run['name']!r} lacks {field!r}")
                if len(sample[field]) != len(sample["tokens"]):
                    raise ValueError(
                        f"{field!r} of sample {sample['title']!r} has {len(sample[field])} entries for "
                        f"{len(sample['tokens'])} tokens"
                    )
    # "<" as \u003c, so that no text can end the script element
    data = json.dumps(_without_nan(runs), separators=(",", ":")).replace("<", "\\u003c")
    shown = ""
    if table:
        columns = _columns(table)
        head = "".join(f"<th scope=col>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(r[c]))}</td>" for c in columns) + "</tr>" for r in table)
        shown = f"<h2>What came out</h2><div class=wide><table><tr>{head}</tr>{body}</table></div>"
    shown += "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)
    page = _PAGE.replace("{{title}}", html.escape(title)).replace("{{table}}", shown).replace("{{data}}", data)
    Path(path).write_text(page, encoding="utf-8")


def _without_nan(value: object) -> object:
    """JSON has no NaN or infinity; the page shows a dash for null."""
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return value


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark; --bg:#fbfbfa; --fg:#1d2330; --dim:#6b7280; --line:#dcdfe4; --card:#fff; --accent:#1f5fbf;
  --hue: 212; --low: 97%; --high: 68%; --noise:#c2410c; }
@media (prefers-color-scheme: dark) { :root { --bg:#14171c; --fg:#e6e8ec; --dim:#949cab; --line:#2e343e; --card:#1b1f26;
  --accent:#7fb0ff; --low: 14%; --high: 42%; --noise:#fb923c; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 8rem }
h1 { font-size: 1.7rem; margin: 0 0 .4rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p.lead { color: var(--dim); margin: 0 0 1.2rem; max-width: 48rem }
.bar { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0 }
button { font: inherit; font-size: .92rem; padding: .28rem .8rem; border: 1px solid var(--line); border-radius: 999px;
  background: var(--card); color: inherit; cursor: pointer }
button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); font-weight: 600 }
button:focus-visible, .t:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
#text { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.3rem; white-space: pre-wrap;
  font: 1rem/2.1 ui-monospace, monospace; max-height: 32rem; overflow: auto; overflow-wrap: anywhere }
.p { color: var(--dim) }
.t { border-radius: 4px; padding: .12rem 0; cursor: default }
.drop { opacity: .5; text-decoration: line-through }
.noise { text-decoration: underline wavy var(--noise) 1.5px; text-underline-offset: 5px }
.drop.noise { text-decoration: line-through underline wavy var(--noise) }
.legend { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: center; color: var(--dim); font-size: .88rem; margin: .7rem 0 }
.scale { display: inline-block; width: 7rem; height: .8rem; border-radius: 4px; margin: 0 .4rem; vertical-align: -.05rem;
  background: linear-gradient(90deg, hsl(var(--hue) 85% var(--low)), hsl(var(--hue) 85% var(--high))) }
#panel { position: fixed; left: 0; right: 0; bottom: 0; background: var(--card); border-top: 1px solid var(--line);
  padding: .7rem 1.25rem; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; justify-content: center; font-size: .92rem; min-height: 3rem }
#panel b { font-variant-numeric: tabular-nums } #panel span { color: var(--dim) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line) } th { color: var(--dim); font-weight: 500 }
th:first-child, td:first-child { text-align: left } .note { color: var(--dim); font-size: .92rem; margin: .4rem 0 }
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif }
</style></head><body><main>
<h1>{{title}}</h1>
<p class="lead">Each response token is coloured by its score: the darker (lighter, on a dark screen), the higher. Tokens that were
dropped are struck through; they cost no backward. A wavy line marks planted noise, which a good method drops. Point at a token, or
move to it with the Tab key, to see why; the arrow keys change the method (up, down) and the sample (left, right).</p>
<div class="bar" id="runs" role="group" aria-label="method"></div>
<div class="bar" id="samples" role="group" aria-label="sample"></div>
<div id="text" aria-live="off"></div>
<div class="legend"><span>score: low<i class="scale"></i>high</span><span class="drop">dropped</span>
<span class="noise">planted noise</span><span>grey: prompt, not learnt</span><span id="count"></span></div>
<section><h2 id="rel-title">Improvement over the history (REL) while training</h2>
<p class="note">REL = history NLL - current NLL, nats: mean over response tokens, with a band of one standard deviation.</p>
<div id="rel"></div></section>
<section><h2 id="position-title">Where in the response tokens are kept</h2>
<p class="note">Share kept in each tenth of the responses. A level line has no position bias.</p><div id="position"></div></section>
<section><h2 id="agreement-title">Do the two signals agree?</h2>
<p class="note">Correlation of REL and prompt mass over response tokens: near 0, they know different things.</p>
<div id="agreement"></div></section>
<section><h2 id="churn-title">How much the selection changes</h2>
<p class="note">Share of a sample's tokens whose fate changed since it was last recorded.</p><div id="churn"></div></section>
{{table}}
</main><div id="panel" role="status"></div>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const runs = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
let run = 0, sample = 0;
const show = (v, digits) => v === null ? "\\u2013" : typeof v === "number" ? v.toFixed(digits) : v;
function bar(id, names, now, pick) {
  $(id).replaceChildren(...names.map((name, i) => {
    const b = document.createElement("button");
    b.textContent = name; b.setAttribute("aria-pressed", i === now); b.onclick = () => { pick(i); draw(); };
    return b;
  }));
}
function explain(s, i) {
  const parts = !s.response[i] ? [["token", s.tokens[i].trim() || "space"], ["", "prompt: not learnt"]] :
    [["token", s.tokens[i].trim() || "space"], ["", s.kept[i] ? "kept" : "dropped"], ["rank", show(s.rank[i], 0)],
     ["score", show(s.score[i], 3)], ["NLL", show(s.nll[i], 3)], ["history NLL", show(s.history_nll[i], 3)],
     ["REL", show(s.rel[i], 3)], ["prompt mass", show(s.mass[i], 3)], ...(s.noise[i] ? [["", "planted noise"]] : [])];
  $("panel").replaceChildren(...parts.map(([k, v]) => {
    const e = document.createElement("div"), a = document.createElement("span"), b = document.createElement("b");
    a.textContent = k ? k + " " : ""; b.textContent = v; e.append(a, b); return e;
  }));
}
function draw() {
  const s = runs[run].samples[sample];
  bar("runs", runs.map(r => r.name), run, i => run = i);
  bar("samples", runs[run].samples.map(x => x.title), sample, i => sample = i);
  const scores = s.score.filter((v, i) => v !== null && s.response[i]), lo = Math.min(...scores), hi = Math.max(...scores);
  const box = document.createDocumentFragment();
  s.tokens.forEach((token, i) => {
    const e = document.createElement("span");
    e.textContent = token; e.dataset.i = i;
    if (!s.response[i]) e.className = "p"; else {
      const u = s.score[i] === null ? 0 : hi > lo ? (s.score[i] - lo) / (hi - lo) : 0.5;
      e.className = "t" + (s.kept[i] ? "" : " drop") + (s.noise[i] ? " noise" : ""); e.tabIndex = 0;
      e.style.background = `hsl(var(--hue) 85% calc(var(--low) + (var(--high) - var(--low)) * ${u.toFixed(3)}))`;
    }
    box.append(e);
  });
  $("text").replaceChildren(box);
  const kept = s.kept.filter(Boolean).length, noisy = s.noise.filter(Boolean).length;
  const noiseKept = s.noise.filter((n, i) => n && s.kept[i]).length;
  $("count").textContent = `kept ${kept} of ${scores.length}` + (noisy ? `; planted noise kept ${noiseKept} of ${noisy}` : "");
  $("panel").textContent = "Point at a token.";
  charts.forEach(curve);
}
for (const kind of ["mouseover", "focusin"])
  $("text").addEventListener(kind, e => { if (e.target.dataset.i !== undefined) explain(runs[run].samples[sample], +e.target.dataset.i); });
addEventListener("keydown", e => {
  const [d, n] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[e.key] || [0, 0];
  if (!d && !n || e.altKey || e.ctrlKey || e.metaKey) return;
  e.preventDefault();
  run = (run + n + runs.length) % runs.length;
  sample = (sample + d + runs[run].samples.length) % runs[run].samples.length;
  draw();
});
const colours = ["#2f7de1", "#e07b22", "#35a06b", "#a461c9", "#c94f6d", "#7a8594"];
// what is drawn: element, curve, curve of its spread or null, what x is
const charts = [["rel", "rel_mean", "rel_std", "optimizer step"], ["position", "kept_by_position", null, "tenth of the response"],
  ["agreement", "signal_agreement", null, "optimizer step"], ["churn", "churn", null, "epoch"]];
function curve([id, key, spread, axis]) {
  const W = 900, H = 220, L = 55, R = 170, T = 15, B = 35, of = r => r.curves[key] || [], half = (r, i) => spread ? r.curves[spread][i][1] : 0;
  const all = runs.flatMap(r => of(r).map(([x, y], i) => [x, y, half(r, i)]));
  $(id).parentElement.hidden = !all.length;
  if (!all.length) return;
  const x0 = Math.min(...all.map(p => p[0])), x1 = Math.max(...all.map(p => p[0]));
  const y0 = Math.min(0, ...all.map(p => p[1] - p[2])), y1 = Math.max(0, ...all.map(p => p[1] + p[2]));
  const X = x => L + (W - L - R) * (x - x0) / (x1 - x0 || 1), Y = y => T + (H - T - B) * (y1 - y) / (y1 - y0 || 1);
  let out = `<svg viewBox="0 0 ${W} ${H}" role="img" aria-labelledby="${id}-title">`;
  for (let i = 0; i <= 4; i++) { const y = y0 + (y1 - y0) * i / 4;
    out += `<line x1="${L}" x2="${W - R}" y1="${Y(y)}" y2="${Y(y)}" stroke="var(--line)"/><text x="${L - 8}" y="${Y(y) + 4}" text-anchor="end">${y.toFixed(2)}</text>`; }
  out += `<text x="${(L + W - R) / 2}" y="${H - 6}" text-anchor="middle">${axis}</text><text x="${L}" y="${H - 18}" text-anchor="middle">${x0}</text><text x="${W - R}" y="${H - 18}" text-anchor="middle">${x1}</text>`;
  runs.forEach((r, k) => {
    const mean = of(r); if (!mean.length) return;
    const c = colours[k % colours.length], on = k === run;
    if (on && spread) out += `<polygon fill="${c}" opacity=".14" points="${mean.map(([x, y], i) => X(x) + "," + Y(y + half(r, i))).join(" ")} ${mean.map(([x, y], i) => X(x) + "," + Y(y - half(r, i))).reverse().join(" ")}"/>`;
    out += mean.length > 1 ? `<polyline fill="none" stroke="${c}" stroke-width="${on ? 2.6 : 1.2}" points="${mean.map(([x, y]) => X(x) + "," + Y(y)).join(" ")}"/>`
      : `<circle cx="${X(mean[0][0])}" cy="${Y(mean[0][1])}" r="4" fill="${c}"/>`;
    out += `<rect x="${W - R + 12}" y="${T + 8 + k * 20}" width="12" height="4" fill="${c}"/><text data-k="${k}" x="${W - R + 30}" y="${T + 14 + k * 20}"></text>`;
  });
  $(id).innerHTML = out + "</svg>";
  $(id).querySelectorAll("[data-k]").forEach(e => e.textContent = runs[+e.dataset.k].name);
}
draw();
</script></body></html>
"""
