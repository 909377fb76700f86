"""One HTML page that needs nothing else: tables as HTML, figures and records as JSON, script and style inside."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from evals.report.entry import Entry
from evals.report.overlays import Answers, Gallery
from evals.report.plots import Plot
from evals.report.table import Table, written

HERE = Path(__file__).parent
FOLDED = 12
"""Rows from which on a table is opened by a click; that of the runs never is."""
HIDDEN = ("command", "started", "before")
"""Of the environment: what every start has of its own, and no difference between runs."""


def page(
    title: str,
    notes: Sequence[str],
    machines: Sequence[str],
    entries: Sequence[Entry],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    gallery: Gallery | None,
    answers: Sequence[Answers],
) -> str:
    """The whole page.

    Everything that runs wrote is escaped; the content policy lets nothing run but the three scripts of this page, by
    their hashes, and nothing be fetched from anywhere.

    Raises:
        UserError: Plotly is not installed.
    """
    scripts = [plotly(), (HERE / "page.js").read_text("utf-8")] if plots else [(HERE / "page.js").read_text("utf-8")]
    sections = list(_sections(entries, tables, plots, gallery, answers))
    policy = "; ".join([
        "default-src 'none'", "script-src " + " ".join(map(_digest, scripts)), "style-src 'unsafe-inline'",
        "img-src data: blob:", "base-uri 'none'", "form-action 'none'",
    ])  # fmt: skip
    data = {"plots": [_plain(plot) for plot in plots], "runs": list(_records(entries))}
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    links = "".join(f'<a href="#{name}" title="{escape(heading)}">{name}</a>' for name, heading, _ in sections)
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{(HERE / 'page.css').read_text('utf-8')}</style></head><body>",
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="quiet">AnchorFormer report, {made}, {_counted(entries)}</p></header>',
        f'<nav aria-label="Sections">{links}</nav><main>',
        _list(notes, "notes"),
        *(f'<section id="{name}"><h2>{escape(heading)}</h2>{body}</section>' for name, heading, body in sections),
        f"</main><footer>{''.join(f'<p>{escape(line)}</p>' for line in machines)}</footer>",
        f'<script type="application/json" id="data">{_json(data)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ])  # fmt: skip


def plotly() -> str:
    """The library that draws, as text.

    Raises:
        UserError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError(
            "report.html needs Plotly", found="no package plotly", expected="plotly>=6",
            remedy="pip install -e '.[report]', or pass --no-html for Markdown and CSV alone",
        ) from None  # fmt: skip
    return str(get_plotlyjs())


def _sections(
    entries: Sequence[Entry],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    gallery: Gallery | None,
    answers: Sequence[Answers],
) -> Iterable[tuple[str, str, str]]:
    """Name, heading and body, in the order in which a reader asks."""
    drawn = {plot.name: plot for plot in plots}
    listed = {table.name: table for table in tables}
    for name in ("asked", "runs"):
        if name in listed:
            yield name, listed[name].title, _table(listed[name])
    for name in ("pareto", "parallel", "spread", "conditions"):
        if name in drawn:
            body = _plot(drawn[name]) + (_table(listed["seeds"]) if name == "spread" and "seeds" in listed else "")
            yield name, drawn[name].title, body
    if "scores" in listed:
        yield "scores", listed["scores"].title, _table(listed["scores"])
    curves = [plot for plot in plots if plot.name.startswith("curves-")]
    if curves:
        body = "".join(f"<h3>{escape(plot.title)}</h3>{_plot(plot)}" for plot in curves)
        yield "training", "Training", body + _table(listed["training"])
    if gallery:
        yield "anchors", "Anchors of the same images", _gallery(gallery)
    if answers:
        yield "answers", "Answers to the same questions", "".join(map(_answers, answers))
    failures = [entry for entry in entries if entry.log]
    if failures:
        logs = "".join(f"<h3>{escape(entry.label)}</h3><pre>{escape(entry.log)}</pre>" for entry in failures)
        yield "failures", "What failed", logs
    yield "seconds", listed["seconds"].title, _table(listed["seconds"])
    if any(stage.config for entry in entries for stage in entry.stages):
        yield "configuration", "Configuration and environment", _chooser("shown") + '<div id="record"></div>'
    if sum(len(entry.stages) for entry in entries) > 1:
        body = _chooser("one") + _chooser("other") + '<div id="differences"></div>'
        yield "difference", "Difference between two runs", body


def _chooser(name: str) -> str:
    label = {"shown": "run", "one": "first", "other": "second"}[name]
    return f'<label class="choice">{label} <select id="choose-{name}"></select></label>'


def _plot(plot: Plot) -> str:
    choices = "".join(
        f'<label class="choice">{escape(what)} <select data-plot="{escape(plot.name)}">'
        + "".join(f'<option value="{i}">{escape(option)}</option>' for i, option in enumerate(options))
        + "</select></label>"
        for what, options in plot.choices.items()
    )
    picture = f'<div class="plot" id="plot-{escape(plot.name)}" role="img" aria-label="{escape(plot.title)}"></div>'
    return f'<figure>{choices}{picture}<figcaption class="quiet">{escape(plot.note)}</figcaption></figure>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_side(bool(column.format))}><button type="button">{escape(column.name)}</button></th>'
        for column in table.columns
    )
    rows = "".join(
        "<tr>" + "".join(
            f"<td{_side(bool(column.format))} data-value={_quoted(value)}>{escape(written(value, column))}</td>"
            for value, column in zip(row, table.columns, strict=True)
        ) + "</tr>"
        for row in table.rows
    )  # fmt: skip
    note = f'<p class="quiet">{escape(table.note)}</p>' if table.note else ""
    body = (
        f'<div class="wide"><table class="sortable" id="table-{table.name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    if len(table.rows) > FOLDED and table.name != "runs":
        body = f"<details><summary>{len(table.rows)} rows</summary>{body}</details>"
    return body + note


def _gallery(gallery: Gallery) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in gallery.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(
            "<td></td>" if overlay is None else
            f'<td><img src="{overlay.image}" alt="anchors on {escape(name)}" loading="lazy">'
            + "".join(f"<p><b>{escape(key)}</b> {escape(text)}</p>" for key, text in overlay.caption.items()) + "</td>"
            for overlay in cells
        ) + "</tr>"
        for name, cells in gallery.rows.items()
    )  # fmt: skip
    table = f'<table class="gallery"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return _list(gallery.notes, "notes") + f'<div class="wide">{table}</div>'


def _answers(answers: Answers) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in answers.columns)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(references)}</td>" + "".join(
            "<td></td>" if answer is None else f'<td class="{_verdict(answer[1])}">{escape(answer[0])}</td>'
            for answer in given
        ) + "</tr>"
        for name, references, given in answers.rows
    )  # fmt: skip
    return (
        f"<h3>{escape(answers.task)}</h3><div class='wide'><table><thead><tr><th>question</th><th>reference</th>"
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _verdict(score: float | None) -> str:
    return "" if score is None else "right" if score >= 1 else "wrong" if score <= 0 else "partly"


def _records(entries: Sequence[Entry]) -> Iterable[dict[str, Any]]:
    """What the page compares: one record per stage, a shared one once."""
    seen = set()
    for entry in entries:
        for stage in entry.stages:
            if stage.path in seen:
                continue
            seen.add(stage.path)
            scores = {
                f"{task}, {condition.value} image": result["score"]
                for task, results in stage.results.items() for condition, result in results.items()
            }  # fmt: skip
            environment = {key: value for key, value in stage.environment.items() if not key.startswith(HIDDEN)}
            record = {"last step": row["step"], "its loss": row["loss"]} if (row := (stage.steps or [{}])[-1]) else {}
            yield {
                "label": f"{entry.label} / {stage.name}" if stage.name != entry.label else stage.name,
                "sections": {"outcome": record | scores, "configuration": stage.config, "environment": environment},
            }


def _plain(plot: Plot) -> dict[str, Any]:
    return {"name": plot.name, "variants": _unmarked(plot.variants)}


def _unmarked(value: Any) -> Any:
    """A figure in whose texts Plotly finds no markup: it knows some, links among it, in every text that it draws."""
    if isinstance(value, Mapping):
        return {key: item if key == "hovertemplate" else _unmarked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unmarked(item) for item in value]
    return value.replace("<", "&lt;") if isinstance(value, str) else value


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in; numbers that JSON has no word for are null, and short."""
    text = json.dumps(_short(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _digest(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _quoted(value: Any) -> str:
    return '"' + escape("" if value is None else str(value)) + '"'


def _side(right: bool) -> str:
    return ' class="number"' if right else ""


def _list(lines: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _counted(entries: Sequence[Entry]) -> str:
    return f"{len(entries)} run{'s' * (len(entries) > 1)}"
