"""`python -m evals.report PATH...`: what came of runs and sweeps: report.md, tables as CSV, and report.html."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from anchorformer.errors import UserError, run_guarded
from evals.report import figures, plots, tables
from evals.report.asked import asked
from evals.report.curves import curves
from evals.report.entry import Entry
from evals.report.files import read_json, replace, unreadable
from evals.report.gathering import gather
from evals.report.overlays import answers, gallery
from evals.report.page import page
from evals.report.parallel import parallel
from evals.report.seeds import Group, group
from evals.report.table import Table, comma_separated
from evals.report.tables import Timings

TIMINGS = "timings.json"
"""Seconds of the parts that are no stages, kept in the folder from the report that was told them."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.report", description=__doc__)
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="folder of a run, of a run's stages (checkpoints/<run>), or of a sweep",
    )
    parser.add_argument("--out", type=Path, help="where the report goes; by default the folder itself, if there is one")
    parser.add_argument("--no-html", action="store_true", help="leave report.html out, which needs Plotly")
    parser.add_argument(
        "--seconds",
        action="append",
        default=[],
        metavar="PART=FILE",
        help="also show how long a part took that is no stage: a JSON file with `seconds` (may be given again); "
        "later reports into the same folder remember it",
    )
    options = parser.parse_args()
    if options.out is None and len(options.paths) > 1:
        raise UserError(
            "a report on several folders lies in none of them", found=f"{len(options.paths)} paths, no --out",
            expected="--out FOLDER", remedy="e.g. --out checkpoints/comparison",
        )  # fmt: skip
    out = options.out or options.paths[0]
    entries = gather(options.paths)
    groups = group(entries)
    timings = read_timings(options.seconds) if options.seconds else kept_timings(out)
    title = out.resolve().name
    text = tables.page(title, entries, groups, timings)
    found = all_tables(entries, groups, timings)
    html = None if options.no_html else html_page(title, entries, groups, found)

    out.mkdir(parents=True, exist_ok=True)
    if options.seconds:
        replace(out / TIMINGS, json.dumps(timings, indent=2) + "\n")
    for table in found:
        if table.rows:
            replace(out / f"report-{table.name}.csv", comma_separated(table))
    replace(out / "report.md", text)
    if html is not None:
        replace(out / "report.html", html)
    print(text)
    print(f"written to {out / 'report.md'}" + ("" if html is None else f" and {out / 'report.html'}"))
    return 0


def all_tables(entries: Sequence[Entry], groups: Sequence[Group], timings: Timings) -> list[Table]:
    """Every table there is, also those that Markdown leaves out because they would repeat another."""
    tasks = [*figures.answered_tasks(entries), *figures.loss_tasks(entries)]
    return [
        tables.overview(entries), asked(groups), tables.training(entries), tables.held_out(entries),
        tables.repetitions(groups, tasks), tables.parts(timings, entries),
    ]  # fmt: skip


def html_page(title: str, entries: Sequence[Entry], groups: Sequence[Group], found: Sequence[Table]) -> str:
    """report.html.

    Raises:
        UserError: Plotly is not installed, or a file of predictions or media is damaged.
    """
    drawn = [
        plots.conditions(entries), plots.pareto(groups), parallel(entries), plots.seeds(groups), *curves(groups),
    ]  # fmt: skip
    return page(
        title, tables.notes(entries), tables.machines(entries), entries, [table for table in found if table.rows],
        [plot for plot in drawn if plot], gallery(groups), answers(groups),
    )  # fmt: skip


def kept_timings(folder: Path) -> Timings:
    """What an earlier report into the folder was told of parts that are no stages."""
    return read_json(folder / TIMINGS) if (folder / TIMINGS).is_file() else {}


def read_timings(parts: Sequence[str]) -> Timings:
    """PART=FILE ... as part -> what the JSON file says under `seconds`: a number, or numbers by name.

    Raises:
        UserError: not written like that, or a file that cannot be read or has no `seconds`.
    """
    timings = {}
    for text in parts:
        part, _, name = text.partition("=")
        if not part or not name:
            raise UserError(
                "--seconds names no file", found=text, expected="PART=FILE", remedy="e.g. --seconds install=times.json"
            )
        seconds = read_json(Path(name)).get("seconds")
        if seconds is None:
            raise unreadable(Path(name), "no `seconds` in it")
        timings[part] = seconds
    return timings


if __name__ == "__main__":
    run_guarded(main)
