"""What a sweep came to, from its files alone: one row per point, on the terminal and as summary.csv and .json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anchorformer.schema import to_plain
from train.run.folder import write_atomically
from train.sweep.config import SweepConfig
from train.sweep.points import Plan
from train.sweep.trial import State, TrialFolder

SWEEP = "sweep.json"
CONDITION = "right"
"""Of an evaluation: the images that belong to the questions."""


def write_definition(sweep: SweepConfig, plan: Plan, command: Sequence[str]) -> None:
    """Writes `sweep.json`: the definition, every point with its trial, and the last command with its time."""
    named = plan.of_points
    facts = {
        "name": sweep.name,
        "definition": to_plain(sweep),
        "axes": axes(plan),
        "points": [
            {
                "grid": point.grid,
                "point": point.values,
                "trial": point.trial,
                "folder": str(path.relative_to(plan.folder)),
            }
            for point in plan.points
            for path in named
            if path.name == point.trial
        ],
        "command": list(command),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.folder / SWEEP, json.dumps(facts, indent=2) + "\n")


def axes(plan: Plan) -> list[str]:
    """Keys of the points in the order in which the grids name them, the seed last."""
    names = dict.fromkeys(axis for point in plan.points for axis in point.values if axis != "seed")
    return [*names, "seed"]


def rows(plan: Plan) -> list[dict[str, Any]]:
    """One row for each point: grid, axes, trial, state, visual tokens per image, a score per task, seconds, reason.

    Scores are as the task's metric has them, right images; a caption task has a loss, where lower is better.
    """
    found = []
    for point in plan.points:
        path = plan.folder / "trials" / point.trial
        trial = TrialFolder(path).read()
        results = [] if trial is None else _results([Path(run) for run in trial.runs.values()])
        tokens = {result["visual_tokens_per_image"] for result in results}
        row = {"grid": point.grid, **{axis: point.values.get(axis) for axis in axes(plan)}, "trial": point.trial}
        row |= {"state": TrialFolder(path).state().value, "tokens": tokens.pop() if len(tokens) == 1 else None}
        row |= {result["task"]: result["score"] for result in results}
        row |= {"seconds": trial.seconds if trial else 0.0, "reason": (trial.reason if trial else None) or ""}
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text, columns that are the same everywhere left out."""
    columns = _columns(found)
    shown = [name for name in columns if name in ("trial", "state") or len({str(row.get(name)) for row in found}) > 1]
    cells = [[name.rpartition(".")[2] for name in shown], *([_cell(row.get(name)) for name in shown] for row in found)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(shown))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def write(plan: Plan, found: Sequence[dict[str, Any]]) -> None:
    """Writes `summary.csv` and `summary.json`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(found), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_atomically(plan.folder / "summary.csv", text.getvalue())
    write_atomically(plan.folder / "summary.json", json.dumps(list(found), indent=2) + "\n")


def failures(plan: Plan) -> list[str]:
    """Why trials failed: the reason, the end of the log and its path."""
    told = []
    for path in plan.trials:
        folder = TrialFolder(path)
        trial = folder.read()
        if trial is not None and trial.state is State.failed:
            lines = [f"{path.relative_to(plan.folder)} failed: {trial.reason}"]
            if not (trial.needs and TrialFolder(Path(trial.needs)).state() is State.failed):
                lines += [*(f"  | {line}" for line in folder.last_lines()), f"  whole log: {folder.log}"]
            told.append("\n".join(lines))
    return told


def _results(runs: Sequence[Path]) -> list[dict[str, Any]]:
    files = [path for run in runs for path in sorted((run / "evals").glob("*.json"))]
    read = [json.loads(path.read_bytes()) for path in files]
    return [result for result in read if result["condition"] == CONDITION]


def _columns(found: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for row in found for name in row)
    last = ("seconds", "reason")
    return [*(name for name in names if name not in last), *last]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
