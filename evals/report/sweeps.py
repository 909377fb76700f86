"""A sweep's folder as its trials: point, state, the runs that each has made or shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from evals.report.entry import Entry, short_names, spoken
from evals.report.files import read_json, unreadable
from evals.report.reading import STAGE_ORDER, Stage, is_run

SWEEP = "sweep.json"
POINT = {"grid", "point", "trial"}
"""What sweep.json says of a point."""
STANDING = {"running": "running or killed"}
"""What a trial that says so may be: a kill leaves no word."""
LOG_LINES = 8
"""Last lines of a failed trial's log that are shown."""


def trials(folder: Path, read: Callable[[Path], Stage]) -> Iterator[Entry]:
    """The trials of a sweep in the order of its points; those that an earlier definition has left are only counted.

    Args:
        read: from a run's folder to the stage.

    Raises:
        UserError: none of its trials is there yet, or a file of the sweep is damaged.
    """
    files = {path.parent.name: path for path in sorted(folder.glob("trials/*/trial.json"))}
    told = {name: read_json(path, ("point", "state")) for name, path in files.items()}
    points, grids = _points(folder, told)
    earlier = len(told) - len(points)
    if not points:
        raise UserError(
            f"no trial of the sweep {folder} has begun",
            found=f"trials of an earlier definition: {earlier}" if earlier else "no trials/*/trial.json",
            expected="at least one of its points", remedy="report on it once it runs",
        )  # fmt: skip
    names = short_names(axis for point in points.values() for axis in point)
    varying = [axis for axis in names if len({str(point.get(axis)) for point in points.values()}) > 1]
    left_out = f"{folder.resolve().name}: {earlier} trial(s) of an earlier definition of the sweep are left out"
    notes = (read_json(folder / SWEEP).get("definition", {}).get("note", ""), left_out if earlier else "")
    several = len({grid for of_trial in grids.values() for grid in of_trial}) > 1
    for name, point in points.items():
        path, trial = files[name].parent, told[name]
        stages = tuple(read(run) for run in _runs(folder, path, trial.get("runs") or {}))
        config = stages[-1].config if stages else {}
        axes = {"grid": " ".join(dict.fromkeys(grids[name]))} if several else {}
        yield Entry(
            label=", ".join(f"{names[axis]}={spoken(point[axis])}" for axis in varying if axis in point) or name,
            path=path, stages=stages, sweep=folder.resolve().name,
            point={names[axis]: spoken(value) for axis, value in point.items()},
            axes=axes | {names[axis]: spoken(point.get(axis, _configured(config, axis))) for axis in names},
            state=STANDING.get(trial["state"], str(trial["state"])), seconds=trial.get("seconds"),
            log=_failure(path, trial) if trial["state"] == "failed" else "",
            notes=tuple(filter(None, notes)),
        )  # fmt: skip


def _points(folder: Path, told: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Trial -> axis -> value, and trial -> the grids that it is a point of: it may be one of several."""
    listed = read_json(folder / SWEEP, ("points",))["points"]
    if not all(isinstance(point, dict) and point.keys() >= POINT for point in listed):
        raise unreadable(folder / SWEEP, f"a point without {', '.join(sorted(POINT))}")
    begun = [point for point in listed if point["trial"] in told]
    points = {point["trial"]: dict(told[point["trial"]]["point"]) for point in begun}
    grids: dict[str, list[str]] = {name: [] for name in points}
    for point in begun:
        points[point["trial"]] |= point["point"]
        grids[point["trial"]].append(str(point["grid"]))
    return points, grids


def _configured(config: Mapping[str, Any], axis: str) -> Any:
    """What the config has where an axis is a key of it, or the group of a part of the model."""
    key = axis.rpartition(":")[2]
    return config.get(key, config.get(f"model.{key}._target_"))


def _runs(sweep: Path, trial: Path, named: Mapping[str, str]) -> Iterator[Path]:
    """Run folders of a trial that exist: its own, or one that it shares; where it names them, after a move as well."""
    for stage in dict.fromkeys([*STAGE_ORDER, *named]):
        at = Path(named.get(stage, ""))
        places = (trial / stage, sweep / "shared" / at.parent.name / at.name, at)
        found = next((place.resolve() for place in places if place.name == stage and is_run(place)), None)
        if found:
            yield found


def _failure(folder: Path, trial: Mapping[str, Any]) -> str:
    log = folder / "log.txt"
    lines = log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.is_file() else []
    return "\n".join([str(trial["reason"])] * bool(trial.get("reason")) + lines)
