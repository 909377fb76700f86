"""What a sweep came to, from its files alone: one row per point, on the terminal and as summary.csv and .json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anchorformer.schema import to_plain
from evals.config import Condition
from evals.report import reading
from train.run.folder import write_atomically
from train.sweep.config import SweepConfig
from train.sweep.points import Plan
from train.sweep.trial import State, Trial, TrialFolder

SWEEP = "sweep.json"
TABLE, ROWS = "summary.csv", "summary.json"


def write_definition(sweep: SweepConfig, plan: Plan, command: Sequence[str]) -> None:
    """Writes `sweep.json`: the definition, every point with its trial, and the last command with its time.

    A summary that is there is of what was defined before, and goes.
    """
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
    for name in (TABLE, ROWS):
        (plan.folder / name).unlink(missing_ok=True)
    write_atomically(plan.folder / SWEEP, json.dumps(facts, indent=2) + "\n")


def axes(plan: Plan) -> list[str]:
    """Keys of the points in the order in which the grids name them, the seed last."""
    names = dict.fromkeys(axis for point in plan.points for axis in point.values if axis != "seed")
    return [*names, "seed"]


def rows(plan: Plan) -> list[dict[str, Any]]:
    """One row for each point: grid, axes, trial, state, visual tokens per image, a score per task, seconds, reason.

    Scores are as the task's metric has them, right images; a caption task has a loss, where lower is better. An
    evaluation of a part of a task is called so.
    """
    found = []
    for point in plan.points:
        path = plan.folder / "trials" / point.trial
        trial = TrialFolder(path).read()
        scored = {} if trial is None else results(plan.folder, trial)
        tokens = {result["visual_tokens_per_image"] for result in scored.values()}
        row = {"grid": point.grid, **{axis: point.values.get(axis) for axis in axes(plan)}, "trial": point.trial}
        row |= {"state": TrialFolder(path).state().value, "tokens": tokens.pop() if len(tokens) == 1 else None}
        row |= {task: result["score"] for task, result in scored.items()}
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
    """Writes the summary, as a table and as rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(found), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_atomically(plan.folder / TABLE, text.getvalue())
    write_atomically(plan.folder / ROWS, json.dumps(list(found), indent=2) + "\n")


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


def run_folders(sweep: Path, trial: Trial) -> list[Path]:
    """Of a trial's stages, `{trials,shared}/ID/STAGE` of the sweep's folder wherever that lies by now."""
    return [sweep.joinpath(*Path(run).parts[-3:]) for run in trial.runs.values()]


def results(sweep: Path, trial: Trial) -> dict[str, Mapping[str, Any]]:
    """Task -> result with the images that belong to the questions, of all stages of a trial."""
    return {
        task: by_condition[Condition.right]
        for run in run_folders(sweep, trial)
        for task, by_condition in reading.results(run / "evals").items()
        if Condition.right in by_condition
    }


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
