"""`python -m bench report`: puts the committed results into docs/benchmarks.md and README.md, as tables and plots."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.plot import MISSED, OTHER, OURS, Bar, bars
from bench.table import ROOT, markdown, read, short_commit

RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "docs" / "plots"
PAGES = {ROOT / "docs" / "benchmarks.md": "plots", ROOT / "README.md": "docs/plots"}
"""The pages, and where each finds the plots."""

LONG = 20
"""Rows above which a table is folded away."""
SELECTED = {"anchors": 145, "batch": 32}
"""Which of the many selections is drawn."""

Plots = dict[str, str]
"""File name -> SVG."""
Sheet = Mapping[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Rewrites the pages between their markers, and the plots."""
    argparse.ArgumentParser(prog="python -m bench report", description=__doc__).parse_args(arguments)
    made = {page: render(page.read_text(), RESULTS, to_plots) for page, to_plots in PAGES.items()}
    PLOTS.mkdir(exist_ok=True)
    for path in PLOTS.glob("*.svg"):
        path.unlink()
    for page, (text, plots) in made.items():
        page.write_text(text)
        for name, svg in plots.items():
            (PLOTS / name).write_text(svg)
        print(f"{page.relative_to(ROOT)} and its {len(plots)} plots are up to date with {RESULTS.relative_to(ROOT)}")


def render(page: str, results: Path, to_plots: str = "plots") -> tuple[str, Plots]:
    """The page with each `<!-- begin NAME -->` ... `<!-- end NAME -->` filled from `NAME.json`, and its plots.

    Args:
        to_plots: the way from the page to the folder of the plots.
    """
    plots: Plots = {}

    def fill(marker: re.Match[str]) -> str:
        name = marker[1]
        content = _section(name, results / f"{name}.json", plots, to_plots)
        return f"<!-- begin {name} -->\n{content}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->", fill, page, flags=re.DOTALL), plots


def _section(name: str, path: Path, plots: Plots, to_plots: str) -> str:
    if not path.is_file():
        return "Not measured yet."
    sheet = read(path)
    parts = [_origin(sheet)]
    for title, svg in _PLOTS[name](sheet):
        file = f"{name}-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"
        plots[file] = svg
        parts.append(f"![{title}]({to_plots}/{file})")
    return "\n\n".join([*parts, *_TABLES[name](sheet)])


def _origin(sheet: Sheet) -> str:
    """Machine, versions, commit and command of a result, in one line."""
    installed = ", ".join(f"{name} {version}" for name, version in sheet["versions"].items() if version)
    card = f"{sheet['gpu']} ({sheet['gpu_memory_gb']} GB), " if sheet["gpu"] else ""
    machine = f"{card}{sheet['cpu']}, {sheet['cores']} cores, {sheet['threads']} thread(s) of torch"
    facts = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in sheet["facts"].items())
    made = f"`{sheet['command']}` at commit {short_commit(sheet['commit'] or 'unknown')}, {sheet['time']}"
    return f"{made}; {machine}; Python {sheet['python']}, {installed}; {facts}."


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{sum(value.values()):.0f} in all"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_plots(sheet: Sheet) -> Iterator[tuple[str, str]]:
    yield _ratios(sheet, "How many times better than published")


def _generate_plots(sheet: Sheet) -> Iterator[tuple[str, str]]:
    yield _ratios(sheet, "How many times better than an MLP over all patches")


def _ratios(sheet: Sheet, title: str) -> tuple[str, str]:
    rows = [row for row in sheet["rows"] if row["ratio"] is not None]
    content = [
        Bar(
            label=row["name"],
            value=row["ratio"],
            goal=row["goal_ratio"],
            colour=MISSED if row["met"] is False else OURS,
        )
        for row in rows
    ]
    return title, bars(f"{title} (ticks: goals)", "x", content, logarithmic=True)


def _cpu_tables(sheet: Sheet) -> Iterator[str]:
    columns = ("name", "unit", "old", "new", "ratio", "goal_ratio", "goal", "met", "equal")
    yield markdown(sheet["rows"], columns)
    notes = [f"- *{names}*: {note}." for note, names in _by_note(sheet["rows"])]
    yield "\n".join(notes)


def _by_note(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for note, group in groupby(rows, key=lambda row: row["note"]):
        if note:
            yield note, "; ".join(row["name"] for row in group)


def _ablation_plots(sheet: Sheet) -> Iterator[tuple[str, str]]:
    title = "Mean of three tasks, over seeds"
    content = [
        Bar(
            label=f"{row['grid']}: {row['what']}, {row['tokens']} tokens", value=row["mean"], spread=row["mean_sd"],
            colour=OURS if row["grid"] == "anchors" or "anchor" in row["what"] else OTHER,
        )
        for row in sheet["rows"]
    ]  # fmt: skip
    yield title, bars(f"{title} (lines: one standard deviation)", "", content)


def _ablation_tables(sheet: Sheet) -> Iterator[str]:
    def spread(value: float, deviation: float | None) -> str:
        return f"{value:.3f}" if deviation is None else f"{value:.3f} ± {deviation:.3f}"

    scores = [name for name in sheet["rows"][0] if f"{name}_sd" in sheet["rows"][0]]
    shown = [{**row, **{name: spread(row[name], row[f"{name}_sd"]) for name in scores}} for row in sheet["rows"]]
    yield markdown(shown, ("grid", "what", "tokens", "seeds", *scores))


def _ladder_plots(sheet: Sheet) -> Iterator[tuple[str, str]]:
    for (stage, lengths), rows in _grouped(_measured(sheet), ("stage", "lengths")):
        title = f"Stage {stage}, {lengths}: samples per second and card"
        yield title, bars(title, "/s", [Bar(label=row["rung"], value=row["samples_s"]) for row in rows])


def _step_plots(sheet: Sheet) -> Iterator[tuple[str, str]]:
    steps = [row for row in _measured(sheet) if row["what"] == "training step"]
    for column, what, unit in (("samples_s", "samples per second", "/s"), ("peak_gb", "peak memory", " GB")):
        for (stage,), rows in _grouped(steps, ("stage",)):
            content = [
                Bar(
                    label=f"{row['connector']}, {row['tiles']} tile(s), batch {row['batch']}, {row['variant']}",
                    value=row[column], colour=OURS if row["variant"] == "ours" else OTHER,
                )
                for row in rows
                if row[column] is not None
            ]  # fmt: skip
            if content:
                title = f"Stage {stage}: {what}"
                yield title, bars(title, unit, content)


def _micro_plots(sheet: Sheet) -> Iterator[tuple[str, str]]:
    towers = [row for row in _measured(sheet) if row["what"] == "vision tower"]
    for column, what, unit in (("ms_per_image", "time per image", " ms"), ("transient_gb", "memory in use", " GB")):
        content = [
            Bar(
                label=f"{row['side']} pixels, batch {row['batch']}, {row['variant']}", value=row[column],
                colour=OURS if row["variant"].startswith("ours") else OTHER,
            )
            for row in towers
            if row[column] is not None
        ]  # fmt: skip
        if content:
            title = f"Vision tower: {what}"
            yield title, bars(title, unit, content)
    chosen = [row for row in _measured(sheet) if row["what"] == "selection" and row["batch"] == SELECTED["batch"]]
    content = [
        Bar(
            label=f"{row['variant']}, {'agreeing' if row['heads_agree'] else 'independent'} heads", value=row["ms"],
            colour=OURS if row["variant"] == "triton" else OTHER,
        )
        for row in chosen
        if row["anchors"] == SELECTED["anchors"]
    ]  # fmt: skip
    if content:
        title = f"Selection of {SELECTED['anchors']} anchors in each of {SELECTED['batch']} images"
        yield title, bars(title, " ms", content)


def _gpu_tables(sheet: Sheet) -> Iterator[str]:
    """One table per kind of row, without columns that say nothing; what was left out is named."""
    for (what,), rows in _grouped(_measured(sheet), ("what",)):
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = [name for name in names if name != "what" and any(row.get(name) is not None for row in rows)]
        table = markdown(rows, columns)
        if len(rows) > LONG:
            table = f"<details><summary>{len(rows)} rows</summary>\n\n{table}\n\n</details>"
        yield f"**{what}**\n\n{table}"
    left_out = [row for row in sheet["rows"] if row.get("left_out")]
    if left_out:
        lines = "\n".join(f"- {_labels(row)}: {row['left_out']}" for row in left_out)
        yield f"<details><summary>{len(left_out)} rows left out</summary>\n\n{lines}\n\n</details>"


def _measured(sheet: Sheet) -> list[dict[str, Any]]:
    return [row for row in sheet["rows"] if not row.get("left_out")]


def _labels(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if value is not None and name != "left_out")


def _grouped(
    rows: Sequence[dict[str, Any]], names: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Rows by the values of these columns, in the order in which they first appear."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    yield from found.items()


_PLOTS: dict[str, Callable[[Sheet], Iterator[tuple[str, str]]]] = {
    "ablation": _ablation_plots, "ablation-short": _ablation_plots, "cpu": _cpu_plots, "generate": _generate_plots,
    "gpu-micro": _micro_plots, "gpu-step": _step_plots, "gpu-ladder": _ladder_plots, "gpu-ladder-align": _ladder_plots,
}  # fmt: skip
_TABLES: dict[str, Callable[[Sheet], Iterator[str]]] = {
    "ablation": _ablation_tables, "ablation-short": _ablation_tables, "cpu": _cpu_tables, "generate": _cpu_tables,
    "gpu-micro": _gpu_tables, "gpu-step": _gpu_tables, "gpu-ladder": _gpu_tables, "gpu-ladder-align": _gpu_tables,
}  # fmt: skip
