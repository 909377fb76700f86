"""`python -m bench ablation SWEEP`: what a finished sweep came to over its seeds, as a result that can be committed."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from bench.table import Sheet, short_commit, text
from evals.report.entry import short_names
from evals.report.figures import lower_is_better
from evals.report.files import read_json
from train.sweep.summary import SWEEP, results, run_folders
from train.sweep.trial import State, Trial, TrialFolder

COLUMNS = ("grid", "what", "tokens", "seeds")
Scored = Mapping[str, Mapping[str, Any]]
"""Task -> its result."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench ablation", description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of the sweep, such as checkpoints/miniworld_ablation")
    parser.add_argument("--json", type=Path, help="where the rows are kept, such as bench/results/ablation.json")
    given = parser.parse_args(arguments)
    points = listed(given.sweep)
    trials = finished(given.sweep, points)
    scored = {name: results(given.sweep, trial) for name, trial in trials.items()}
    facts = {"trained_at": commits(given.sweep, trials.values()),
             "summed_trial_seconds": round(seconds(given.sweep, trials.values()))}  # fmt: skip
    sheet = Sheet("ablation", given.json, facts)
    for row in rows(points, scored):
        sheet.add(row)
    print(text(sheet.rows, [*COLUMNS, *(name for name in sheet.rows[0] if name not in COLUMNS)]))


def listed(sweep: Path) -> list[dict[str, Any]]:
    """The points of a sweep as its definition has them: grid, point, trial.

    Raises:
        UserError: it has no definition.
    """
    path = sweep / SWEEP
    if not path.is_file():
        raise UserError(
            f"{sweep} is no sweep that has run", found=f"no {path}", expected="the folder of a finished sweep",
            remedy="python -m train sweep sweep=miniworld_ablation",
        )  # fmt: skip
    points: list[dict[str, Any]] = read_json(path, ("points",))["points"]
    return points


def finished(sweep: Path, points: Sequence[Mapping[str, Any]]) -> dict[str, Trial]:
    """The trials of the points by their ids; what an earlier definition has left in the folder is none of them.

    Raises:
        UserError: one of them is not done: a table of what there happens to be compares nothing.
    """
    folders = {point["trial"]: TrialFolder(sweep / "trials" / point["trial"]) for point in points}
    states = [folder.state() for folder in folders.values()]
    if set(states) != {State.done}:
        raise UserError(
            f"the sweep {sweep} has not ended",
            found=", ".join(f"{states.count(state)} {state.value}" for state in State if state in states),
            expected="all trials done",
            remedy="call `python -m train sweep` again, with retry_failed=true where trials failed",
        )  # fmt: skip
    return {name: trial for name, folder in folders.items() if (trial := folder.read())}


def commits(sweep: Path, trials: Collection[Trial]) -> str:
    """The commits that runs were trained at, as their environment.json has them."""
    environments = [
        read_json(run / "environment.json", ("commit", "uncommitted_changes"))
        for run in dict.fromkeys(run for trial in trials for run in run_folders(sweep, trial))
    ]
    found = {short_commit(f"{one['commit']}{'+' * bool(one['uncommitted_changes'])}") for one in environments}
    return ", ".join(sorted(found))


def seconds(sweep: Path, trials: Collection[Trial]) -> float:
    """Of all steps of the trials and of the stages 1 that they start from, one after the other: no wall time, which
    several slots share."""
    starts = {sweep.joinpath(*Path(trial.needs).parts[-2:]) for trial in trials if trial.needs}
    return sum(trial.seconds for trial in (*trials, *(TrialFolder(path).read() for path in starts)) if trial)


def rows(points: Sequence[Mapping[str, Any]], scored: Mapping[str, Scored]) -> Iterator[dict[str, Any]]:
    """One row for each point, whatever its seed: mean and standard deviation, over seeds, of each task's score and of
    each trial's mean score; a loss is shown, and no part of the mean.

    Args:
        scored: of the points' trials, by id.

    Raises:
        UserError: the trials are not evaluated in the same tasks.
    """
    tasks, answered = _tasks(scored)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        members = groups.setdefault(json.dumps([point["grid"], _unseeded(point)], sort_keys=True), [])
        if point["trial"] not in {member["trial"] for member in members}:  # a grid may say the same point twice
            members.append(point)
    for members in groups.values():
        first, found = members[0], [scored[member["trial"]] for member in members]
        tokens = {result["visual_tokens_per_image"] for of_trial in found for result in of_trial.values()}
        what = label(_unseeded(first), [_unseeded(one) for one in points if one["grid"] == first["grid"]])
        row = {"grid": first["grid"], "what": what, "tokens": tokens.pop() if len(tokens) == 1 else None,
               "seeds": len(members)}  # fmt: skip
        of_seeds = {task: [of_trial[task]["score"] for of_trial in found] for task in tasks}
        of_seeds["mean"] = [statistics.fmean(of_trial[task]["score"] for task in answered) for of_trial in found]
        for name, values in of_seeds.items():
            short = name.removeprefix("miniworld_")
            row[short] = statistics.fmean(values)
            row[f"{short}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        yield row


def _tasks(scored: Mapping[str, Scored]) -> tuple[list[str], list[str]]:
    """All tasks, and those of them that are scored by answers."""
    tasks = list(dict.fromkeys(task for found in scored.values() for task in found))
    for trial, found in scored.items():
        for task in tasks:
            if task not in found or found[task]["score"] is None:
                raise UserError(
                    f"trial {trial} has no score in {task}", found=", ".join(found) or "no evaluation",
                    expected="every trial evaluated in the same tasks",
                    remedy="call `python -m train sweep` again, or evaluate all trials alike",
                )  # fmt: skip
    answered = [task for task in tasks if not any(lower_is_better(found[task]) for found in scored.values())]
    if not answered:
        raise UserError(
            "there is no score to compare by", found=", ".join(tasks) or "no evaluation",
            expected="a task that is scored by its answers", remedy="give the sweep evals of its last stage",
        )  # fmt: skip
    return tasks, answered


def label(point: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The point's parts, and those of its settings in which points with the same parts differ.

    Args:
        others: all points of the grid.
    """
    names = short_names(axis for one in others for axis in one)
    alike = [one for one in others if _parts(one) == _parts(point)]
    settings = [axis for axis in point if axis not in _parts(point)]
    varying = [axis for axis in settings if any(one.get(axis) != point[axis] for one in alike)]
    told = varying or ([] if _parts(point) else settings)
    return ", ".join([*map(str, _parts(point).values()), *(f"{names[axis]} {point[axis]}" for axis in told)])


def _parts(point: Mapping[str, Any]) -> dict[str, Any]:
    """Of the axes those that choose a part, such as `connector`; the others set something of one."""
    return {axis: value for axis, value in point.items() if "." not in axis}


def _unseeded(point: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: value for axis, value in point["point"].items() if axis != "seed"}
