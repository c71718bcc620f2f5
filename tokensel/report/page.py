"""What people look at: a page of samples with each token's score and fate, a plot of REL, a table for the terminal."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

TOKEN_FIELDS = ("tokens", "response", "kept", "weight", "score", "nll", "history_nll", "rel", "mass", "rank", "noise")


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
        runs: dicts of "name", "samples" and "curves", and "scope" where it is not "sample": "micro_batch" or "batch".
            A sample has a "title" and the lists of TOKEN_FIELDS, an entry a token; numbers may be None. "weight" is
            the loss weight, negative where a token is un-learnt; "kept" says that it is not zero. A curve is a list of
            [x, value]: "rel_mean" with "rel_std" and "signal_agreement" by step, "kept_by_position" by tenth, "churn"
            by epoch; what is missing is not drawn.
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
  --hue: 212; --low: 97%; --high: 68%; --noise:#c2410c; --unlearn:#9d174d }
@media (prefers-color-scheme: dark) { :root { --bg:#14171c; --fg:#e6e8ec; --dim:#949cab; --line:#2e343e; --card:#1b1f26;
  --accent:#7fb0ff; --low: 14%; --high: 42%; --noise:#fb923c; --unlearn:#f9a8d4 } }
* { box-sizing: border-box }
html { scroll-padding-bottom: 10rem } /* what has the focus is not behind the panel */
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 10rem }
h1 { font-size: 1.7rem; margin: 0 0 .4rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p.lead { color: var(--dim); margin: 0 0 1.2rem; max-width: 54rem }
.bar { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0 }
button { font: inherit; font-size: .92rem; padding: .28rem .8rem; border: 1px solid var(--line); border-radius: 999px;
  background: var(--card); color: inherit; cursor: pointer }
#samples button { font-size: .84rem }
button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); font-weight: 600 }
button:focus-visible, .t:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
#text { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.3rem; white-space: pre-wrap;
  font: 1rem/2.1 ui-monospace, monospace; max-height: 32rem; overflow: auto; overflow-wrap: anywhere; unicode-bidi: plaintext }
.p { color: var(--dim) }
.t { border-radius: 4px; padding: .2rem 0; background: var(--score); cursor: default; -webkit-box-decoration-break: clone; box-decoration-break: clone }
/* the score as a strip under the token: text on a strong colour would have to be as dark as what was kept */
.drop { background: linear-gradient(var(--score), var(--score)) bottom / 100% .2rem no-repeat; color: var(--dim) }
s { text-decoration: line-through 1.5px }
.noise { text-decoration: underline wavy var(--noise) 1.5px; text-underline-offset: 5px }
.unlearn { box-shadow: inset 0 0 0 1.5px var(--unlearn) }
.break::before { content: "\\21b5"; opacity: .65; font-size: .8em }
.empty { border: 1px solid var(--dim) } .empty::before { content: "\\a0" }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; align-items: center; color: var(--dim); font-size: .88rem; margin: .7rem 0 }
.scale { display: inline-block; width: 5rem; height: .8rem; border-radius: 4px; margin: 0 .4rem; vertical-align: -.05rem;
  background: linear-gradient(90deg, hsl(var(--hue) 85% var(--low)), hsl(var(--hue) 85% var(--high))) }
#count { color: var(--fg) } .legend .unlearn { padding: 0 .3rem }
#panel { position: fixed; left: 0; right: 0; bottom: 0; background: var(--card); border-top: 1px solid var(--line);
  padding: .7rem 1.25rem; display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; justify-content: center; font-size: .92rem; min-height: 3rem }
#panel b { font-variant-numeric: tabular-nums; white-space: pre-wrap; unicode-bidi: isolate; overflow-wrap: anywhere } #panel span { color: var(--dim) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line) } th { color: var(--dim); font-weight: 500 }
th:first-child, td:first-child { text-align: left } .note { color: var(--dim); font-size: .92rem; margin: .4rem 0 }
svg { width: 100%; min-width: 46rem; height: auto; display: block; background: var(--card); border: 1px solid var(--line); border-radius: 12px }
svg text { fill: var(--dim); font: 13px system-ui, sans-serif }
</style></head><body><main>
<h1>{{title}}</h1>
<p class="lead">Each response token is coloured by its score: the darker (lighter, on a dark screen), the higher. Tokens that were
dropped are struck through, with their score as a strip below; they cost no backward. <span class="if-noise">A wavy line marks planted noise, which a good method drops.</span>
Point at a token to see why.</p>
<div class="bar" id="runs" role="toolbar" aria-label="method"></div>
<div class="bar" id="samples" role="toolbar" aria-label="sample"></div>
<p class="note" id="scope"></p>
<div id="text" role="group" aria-label="tokens of the sample"></div>
<div class="legend"><b id="count"></b><span>score: low<i class="scale"></i>high</span><s>dropped</s>
<span class="noise if-noise">planted noise</span><span class="unlearn if-unlearn">un-learnt (negative weight)</span>
<span>no colour: prompt</span></div>
<p class="note">Keys: Tab to the methods, the samples, the text; left, right, Home and End within each; Escape leaves the text.</p>
<section><h2 id="rel-title">Improvement over the history (REL) while training</h2>
<p class="note">REL = history NLL - current NLL, nats: mean over response tokens, with a band of one standard deviation.</p>
<div id="rel" class="wide"></div></section>
<section><h2 id="position-title">Where in the response tokens are kept</h2>
<p class="note">Share kept in each tenth of the responses. In the record shown above, the run's last. A level line
has no position bias.</p><div id="position" class="wide"></div></section>
<section><h2 id="agreement-title">Do the two signals agree?</h2>
<p class="note">Correlation of REL and prompt mass over response tokens: near 0, they know different things.</p>
<div id="agreement" class="wide"></div></section>
<section><h2 id="churn-title">How much the selection changes</h2>
<p class="note">Share of a sample's tokens whose fate changed since it was last recorded.</p><div id="churn" class="wide"></div></section>
{{table}}
</main><div id="panel" role="status"></div>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const runs = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
let run = 0, sample = 0, at = 0; // what is shown, and the one token that Tab leads to
const show = (v, digits) => v === null ? "\\u2013" : typeof v === "number" ? v.toFixed(digits) : v;
const range = (values, from = [Infinity, -Infinity]) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], from);
// the buttons stay the same elements, so that the one that was picked keeps the focus
function bar(id, names, now, pick) {
  while ($(id).children.length > names.length) $(id).lastChild.remove();
  names.forEach((name, i) => {
    const b = $(id).children[i] || $(id).appendChild(document.createElement("button"));
    b.textContent = name; b.setAttribute("aria-pressed", i === now); b.tabIndex = i === now ? 0 : -1;
    b.onclick = () => { pick(i); draw(); };
  });
}
function explain(s, i) {
  const token = ["token", JSON.stringify(s.tokens[i])], w = s.weight[i];
  const parts = !s.response[i] ? [token, ["", "prompt: not learnt"]] :
    [token, ["", w < 0 ? "un-learnt" : s.kept[i] ? "kept" : "dropped"], ...(w === null || w === 0 || w === 1 ? [] : [["weight", show(w, 3)]]),
     ["rank", show(s.rank[i], 0)], ["score", show(s.score[i], 3)], ["NLL", show(s.nll[i], 3)], ["history NLL", show(s.history_nll[i], 3)],
     ["REL", show(s.rel[i], 3)], ["prompt mass", show(s.mass[i], 3)], ...(s.noise[i] ? [["", "planted noise"]] : [])];
  $("panel").replaceChildren(...parts.map(([k, v]) => {
    const e = document.createElement("div"), a = document.createElement("span"), b = document.createElement("b");
    a.textContent = k ? k + " " : ""; b.textContent = v; e.append(a, b); return e;
  }));
}
function draw() {
  const r = runs[run]; sample = Math.min(sample, r.samples.length - 1); // runs may have watched fewer rows than others
  const s = r.samples[sample];
  bar("runs", runs.map(x => x.name), run, i => run = i);
  bar("samples", r.samples.map(x => x.title), sample, i => { sample = i; at = 0; });
  const among = { micro_batch: "micro-batch", batch: "optimizer step" }[r.scope];
  $("scope").hidden = !among;
  $("scope").textContent = `This method ranks the tokens of a whole ${among}; here the watched rows were ranked together.`;
  const [lo, hi] = range(s.score.filter((v, i) => v !== null && s.response[i]));
  const box = document.createDocumentFragment();
  if (!s.response[at]) at = s.response.indexOf(true);
  s.tokens.forEach((token, i) => {
    const e = document.createElement("span");
    e.dataset.i = i; box.append(e);
    if (!s.response[i]) { e.className = "p"; e.textContent = token; return; }
    const u = s.score[i] === null ? 0 : hi > lo ? (s.score[i] - lo) / (hi - lo) : 0.5;
    e.className = "t" + (s.kept[i] ? "" : " drop") + (s.noise[i] ? " noise" : "") + (s.weight[i] < 0 ? " unlearn" : ""); e.tabIndex = i === at ? 0 : -1;
    e.style.setProperty("--score", `hsl(var(--hue) 85% calc(var(--low) + (var(--high) - var(--low)) * ${u.toFixed(3)}))`);
    // an element of its own: one element's lines through and under it would have one style and colour
    const inner = s.kept[i] ? e : e.appendChild(document.createElement("s"));
    inner.classList.toggle("empty", /^\\p{Cf}*$/u.test(token)); // a part of a character, or nothing that one sees
    token.split(/(?=\\n)/).forEach(part => {
      if (part[0] === "\\n") inner.appendChild(document.createElement("i")).className = "break";
      inner.append(part);
    });
  });
  $("text").replaceChildren(box);
  const count = test => s.response.filter((of, i) => of && test(i)).length, noisy = count(i => s.noise[i]), unlearnt = count(i => s.weight[i] < 0);
  $("count").textContent = `kept ${count(i => s.kept[i])} of ${count(() => true)}` + (unlearnt ? ` (${unlearnt} un-learnt)` : "") +
    (noisy ? `; planted noise kept ${count(i => s.noise[i] && s.kept[i])} of ${noisy}` : "");
  $("panel").textContent = "Point at a token.";
  charts.forEach(curve);
}
for (const [name, test] of [["noise", s => s.noise.some(Boolean)], ["unlearn", s => s.weight.some(w => w < 0)]])
  document.querySelectorAll(".if-" + name).forEach(e => e.hidden = !runs.some(r => r.samples.some(test)));
for (const kind of ["mouseover", "focusin"])
  $("text").addEventListener(kind, e => {
    const token = e.target.closest("[data-i]");
    if (!token) return;
    explain(runs[run].samples[sample], +token.dataset.i);
    if (kind === "mouseover") return;
    $("text").querySelector('[tabindex="0"]').tabIndex = -1; token.tabIndex = 0; at = +token.dataset.i;
  });
// the element that this key leads to from the one that has the focus, if any
function next(e, elements) {
  const now = elements.indexOf(document.activeElement), last = elements.length - 1;
  const to = { ArrowLeft: Math.max(now - 1, 0), ArrowRight: Math.min(now + 1, last), Home: 0, End: last }[e.key];
  if (to === undefined || e.shiftKey || e.altKey || e.ctrlKey || e.metaKey) return;
  e.preventDefault();
  return elements[to];
}
for (const id of ["runs", "samples"])
  $(id).addEventListener("keydown", e => { const to = next(e, [...$(id).children]); if (to) { to.focus(); to.click(); } });
$("text").addEventListener("keydown", e => {
  if (e.key === "Escape") $("samples").querySelector("[aria-pressed=true]").focus();
  else next(e, [...$("text").querySelectorAll(".t")])?.focus();
});
const colours = ["#2f7de1", "#e07b22", "#35a06b", "#a461c9", "#c94f6d", "#7a8594"];
// what is drawn: element, curve, curve of its spread or null, what x is
const charts = [["rel", "rel_mean", "rel_std", "optimizer step"], ["position", "kept_by_position", null, "tenth of the response"],
  ["agreement", "signal_agreement", null, "optimizer step"], ["churn", "churn", null, "epoch"]];
function curve([id, key, spread, axis]) {
  const W = 900, H = Math.max(220, 50 + 20 * runs.length), L = 55, R = 170, T = 15, B = 40;
  const lines = runs.map(r => (r.curves[key] || []).map(([x, y], i) => [x, y, ((r.curves[spread] || [])[i] || [])[1] || 0]).filter(p => p[1] !== null));
  const all = lines.flat();
  $(id).parentElement.hidden = !all.length;
  if (!all.length) return;
  const [x0, x1] = range(all.map(p => p[0]));
  // zero, every line, the band of the run that is shown; out to the next round number
  const [low, high] = range(lines[run].flatMap(([, y, d]) => [y - d, y + d]), range(all.map(p => p[1]), [0, 0]));
  const rough = (high - low || 1) / 5, ten = 10 ** Math.floor(Math.log10(rough)), step = ten * [1, 2, 5, 10].find(m => m * ten >= rough * 0.999);
  const k0 = Math.floor(low / step), k1 = Math.max(Math.ceil(high / step), k0 + 1), digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const X = x => L + (W - L - R) * (x - x0) / (x1 - x0 || 1), Y = y => T + (H - T - B) * (k1 - y / step) / (k1 - k0);
  let out = `<svg viewBox="0 0 ${W} ${H}" role="img" aria-labelledby="${id}-title">`;
  for (let k = k0; k <= k1; k++)
    out += `<line x1="${L}" x2="${W - R}" y1="${Y(k * step)}" y2="${Y(k * step)}" stroke="var(${k ? "--line" : "--dim"})"/><text x="${L - 8}" y="${Y(k * step) + 4}" text-anchor="end">${(k * step).toFixed(digits)}</text>`;
  out += `<text x="${(L + W - R) / 2}" y="${H - 8}" text-anchor="middle">${axis}</text>`;
  for (const x of new Set([x0, x1])) out += `<text x="${X(x)}" y="${H - 22}" text-anchor="middle">${+x.toFixed(2)}</text>`;
  lines.forEach((line, k) => {
    if (!line.length) return;
    const c = colours[k % colours.length], on = k === run, points = (list, sign) => list.map(([x, y, d]) => X(x) + "," + Y(y + sign * d)).join(" ");
    if (on && spread) out += `<polygon fill="${c}" opacity=".14" points="${points(line, 1)} ${points([...line].reverse(), -1)}"/>`;
    out += line.length > 1 ? `<polyline fill="none" stroke="${c}" stroke-width="${on ? 2.6 : 1.2}" points="${points(line, 0)}"/>`
      : `<circle cx="${X(line[0][0])}" cy="${Y(line[0][1])}" r="4" fill="${c}"/>`;
    out += `<rect x="${W - R + 12}" y="${T + 8 + k * 20}" width="12" height="4" fill="${c}"/><text x="${W - R + 30}" y="${T + 14 + k * 20}"><tspan data-k="${k}"></tspan><title data-k="${k}"></title></text>`;
  });
  $(id).innerHTML = out + "</svg>";
  $(id).querySelectorAll("[data-k]").forEach(e => {
    const name = runs[+e.dataset.k].name;
    e.textContent = e.tagName === "tspan" && name.length > 18 ? name.slice(0, 17) + "\\u2026" : name;
  });
}
draw();
</script></body></html>
"""
