"""The page of `tokensel report`: samples with each token's score and fate; fills in `page.html`."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from tokensel.files import replacing
from tokensel.report.table import column_names

TOKEN_FIELDS = ("tokens", "response", "kept", "weight", "score", "nll", "history_nll", "rel", "mass", "rank", "noise")
_LONGEST = 1000  # characters of a text that are shown; a browser would choke on a token of ten million


def write_selection_page(
    path: str | Path, runs: list[dict], *, title: str, table: list[dict] | None = None, notes: Sequence[str] = ()
) -> None:
    """One self-contained HTML file: which tokens were kept, and why. Works offline, in light and dark.

    Texts may be anybody's: they are shown as text, and what is longer than 1,000 characters is cut. The page runs no
    script but its own and loads nothing. A link at `path` is replaced, not followed.

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
    _check_runs(runs)
    # "<" as \u003c, so that no text can end the script element
    data = json.dumps(_for_page(runs), separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "table": _html_table(table) + _html_notes(notes), "data": data}
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    parts["script_digest"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # in one pass, so that no text is taken for a place to fill
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)
    with replacing(path) as whole:
        whole.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")  # half of a pair of surrogates


def _check_runs(runs: list[dict]) -> None:
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


def _html_table(rows: list[dict] | None) -> str:
    if not rows:
        return ""
    columns = column_names(rows)
    head = "".join(f"<th scope=col>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(r[c]))}</td>" for c in columns) + "</tr>" for r in rows)
    return f"<h2>What came out</h2><div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _html_notes(notes: Sequence[str]) -> str:
    return "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)


def _for_page(value: object) -> object:
    """JSON has no NaN or infinity; the page shows a dash for null. Texts are cut."""
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, str) and len(value) > _LONGEST:
        return value[:_LONGEST] + "\u2026"
    if isinstance(value, dict):
        return {k: _for_page(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_page(v) for v in value]
    return value
