"""`python -m bench ablation SWEEP`: what a finished sweep came to over its seeds, as a result that can be committed."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from bench.table import Sheet, text

COLUMNS = ("grid", "what", "tokens", "seeds")
NOT_SCORES = ("grid", "trial", "state", "tokens", "seconds", "reason")
"""What a row of summary.json has beside its axes and the scores of tasks."""
LOSSES = ("miniworld_caption",)
"""Tasks whose score is a loss; they are shown, and no part of the mean."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench ablation", description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of the sweep, such as checkpoints/miniworld_ablation")
    parser.add_argument("--json", type=Path, help="where the rows are kept, such as bench/results/ablation.json")
    given = parser.parse_args(arguments)
    found = points(given.sweep)
    seconds = sum({row["trial"]: row["seconds"] for row in found}.values())
    sheet = Sheet("ablation", given.json, {"trained_at": commits(given.sweep), "seconds": seconds})
    for row in rows(found):
        sheet.add(row)
    print(text(sheet.rows, [*COLUMNS, *(name for name in sheet.rows[0] if name not in COLUMNS)]))


def points(sweep: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's summary.json.

    Raises:
        UserError: there is none, or not every trial is done: a table of what there happens to be compares nothing.
    """
    path = sweep / "summary.json"
    if not path.is_file():
        raise UserError(
            f"{sweep} is no sweep that has run", found=f"no {path}", expected="the folder of a finished sweep",
            remedy="python -m train sweep sweep=miniworld_ablation",
        )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(path.read_text())
    states = sorted({row["state"] for row in found} - {"done"})
    if states:
        raise UserError(
            f"the sweep {sweep} has not ended", found=f"trials that are {', '.join(states)}", expected="all done",
            remedy="call `python -m train sweep` again, which runs what is missing",
        )  # fmt: skip
    return found


def commits(sweep: Path) -> str:
    """The commits that its runs were trained at, as their environment.json has them."""
    files = sorted(sweep.glob("*/*/*/environment.json"))
    return ", ".join(sorted({str(json.loads(path.read_text())["commit"])[:12] for path in files}))


def rows(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each point, whatever its seed: mean and standard deviation, over seeds, of each task's score and of
    each trial's mean score."""
    names = list(dict.fromkeys(name for row in found for name in row))
    before = names.index("trial")
    axes, scores = names[1:before], [name for name in names[before:] if name not in NOT_SCORES]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        values = {axis: row.get(axis) for axis in axes if axis != "seed"}
        members = groups.setdefault(json.dumps([row["grid"], values]), [])
        if row["trial"] not in {member["trial"] for member in members}:  # a grid may say the same point twice
            members.append(row)
    for members in groups.values():
        first = members[0]
        row = {"grid": first["grid"], "what": label({axis: first.get(axis) for axis in axes if axis != "seed"}),
               "tokens": first["tokens"], "seeds": len(members)}  # fmt: skip
        of_means = [statistics.fmean(member[name] for name in scores if name not in LOSSES) for member in members]
        for name, found_values in {**{each: [m[each] for m in members] for each in scores}, "mean": of_means}.items():
            short = name.removeprefix("miniworld_")
            row[short] = statistics.fmean(found_values)
            row[f"{short}_sd"] = statistics.stdev(found_values) if len(found_values) > 1 else None
        yield row


def label(values: Mapping[str, Any]) -> str:
    """Names of the parts where the point chooses parts, their settings where it does not."""
    given = {axis: value for axis, value in values.items() if value is not None}
    parts = [str(value) for axis, value in given.items() if "." not in axis]
    return ", ".join(parts or [f"{axis.rpartition('.')[2]} {value}" for axis, value in given.items()])
