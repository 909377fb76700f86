"""From the paths of the command line to what is compared: runs, two-stage folders and the trials of sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from evals.report.files import read_json, unreadable
from evals.report.reading import Stage, is_run, read_stage

STAGE_ORDER = ("align", "finetune")
SWEEP = "sweep.json"
POINT = {"grid", "point", "trial"}
"""What sweep.json says of a point."""
STANDING = {"running": "running or killed"}
"""What a trial that says so may be: a kill leaves no word."""
LOG_LINES = 8
"""Last lines of a failed trial's log that are shown."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that was trained: its stages, in the order they were trained.

    Attributes:
        label: names it among the others.
        sweep: name of the sweep that it is a trial of, or None.
        point: axis -> value, as its grids name them; empty for what is no trial.
        axes: axis -> value for all axes of the sweep: where no grid of the trial names one, what its config has.
        state: of the trial, or of its last stage.
        seconds: how long the trial took by the launcher's clock.
        log: why a trial failed: what the sweep says of it, and the last lines of its log.
    """

    label: str
    path: Path
    stages: tuple[Stage, ...]
    sweep: str | None = None
    point: Mapping[str, Any]
    axes: Mapping[str, Any]
    state: str
    seconds: float | None = None
    log: str = ""

    @property
    def last(self) -> Stage | None:
        """The stage whose model is the outcome."""
        return self.stages[-1] if self.stages else None


def gather(paths: Sequence[Path]) -> list[Entry]:
    """What lies at the paths, each stage read once however many trials share it.

    Raises:
        UserError: a path holds neither a run, nor the stages of one, nor a sweep; or a file cannot be read.
    """
    read = cache(read_stage)
    entries: list[Entry] = []
    for path in paths:
        if (path / SWEEP).is_file():
            entries += _trials(path, read)
        else:
            stages = tuple(read(folder.resolve()) for folder in _stage_folders(path))
            # The last name of an absolute path, so that `.` is called what it is.
            entries.append(Entry(
                label=path.resolve().name, path=path, stages=stages, point={}, axes={}, state=stages[-1].state,
            ))  # fmt: skip
    return _told_apart(entries)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys by their last part, or by as many parts as tell them apart; a class by what it is the class of."""
    names: dict[str, str] = {}
    for key in dict.fromkeys(keys):
        parts = key.removesuffix("._target_").split(".")
        taken = set(names.values())
        names[key] = next(
            (name for count in range(1, len(parts) + 1) if (name := ".".join(parts[-count:])) not in taken), key
        )
    return names


def _trials(folder: Path, read: Callable[[Path], Stage]) -> Iterable[Entry]:
    files = {path.parent.name: path for path in sorted(folder.glob("trials/*/trial.json"))}
    if not files:
        raise UserError(
            f"no trial of the sweep {folder} has begun", found="no trials/*/trial.json", expected="at least one",
            remedy="report on it once it runs",
        )  # fmt: skip
    trials = {name: read_json(path, ("point", "state")) for name, path in files.items()}
    # In the order of the sweep's points; a trial may be a point of several grids.
    listed = read_json(folder / SWEEP, ("points",))["points"]
    if not all(isinstance(point, dict) and point.keys() >= POINT for point in listed):
        raise unreadable(folder / SWEEP, f"a point without {', '.join(sorted(POINT))}")
    named = [point for point in listed if point["trial"] in trials]
    points: dict[str, dict[str, Any]] = {name: {} for name in [*(point["trial"] for point in named), *trials]}
    grids: dict[str, list[str]] = {name: [] for name in points}
    for point in named:
        points[point["trial"]] |= point["point"]
        grids[point["trial"]].append(str(point["grid"]))
    points = {name: {**trials[name]["point"], **point} for name, point in points.items()}
    names = short_names(axis for point in points.values() for axis in point)
    varying = [axis for axis in names if len({str(point.get(axis)) for point in points.values()}) > 1]
    several = len({grid for of_trial in grids.values() for grid in of_trial}) > 1
    for name, point in points.items():
        path, trial = files[name].parent, trials[name]
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
        )  # fmt: skip


def spoken(value: Any) -> Any:
    """A value as a reader says it: a dataclass of a plugin is called by its module, a list is text."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return text.rsplit(".", 2)[-2] if text.startswith("anchorformer.") and text.endswith("Config") else text


def _configured(config: Mapping[str, Any], axis: str) -> Any:
    """What the config has where an axis is a key of it, or the group of a part of the model."""
    key = axis.rpartition(":")[2]
    return config.get(key, config.get(f"model.{key}._target_"))


def _runs(sweep: Path, trial: Path, named: Mapping[str, str]) -> Iterable[Path]:
    """Run folders of a trial that exist: those that it names, and its own."""
    for stage in dict.fromkeys([*STAGE_ORDER, *named]):
        places = [Path(named[stage]), sweep / named[stage], trial / named[stage]] if named.get(stage) else []
        found = next((place.resolve() for place in [*places, trial / stage] if is_run(place)), None)
        if found:
            yield found


def _failure(folder: Path, trial: Mapping[str, Any]) -> str:
    log = folder / "log.txt"
    lines = log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.is_file() else []
    return "\n".join([str(trial["reason"])] * bool(trial.get("reason")) + lines)


def _stage_folders(folder: Path) -> list[Path]:
    below = sorted(path.parent for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
    below = sorted({*below, *(path.parent for path in folder.glob("*/metrics.jsonl"))})
    if is_run(folder):
        return [folder]
    runs = sorted({path.parents[1] for path in folder.glob("*/*/metrics.jsonl")})
    sweeps = sorted(path.parent for path in folder.glob(f"*/{SWEEP}"))
    if runs or sweeps:
        candidates = sorted({*below, *runs, *sweeps})
        raise UserError(
            f"{folder} holds runs, and is none itself",
            found=", ".join(path.name for path in candidates),
            expected="the folder of a run, of its stages, or of a sweep",
            remedy="pass " + ("one or more of " if len(candidates) > 1 else "") + ", ".join(map(str, candidates)),
        )
    if not below:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise UserError(
            f"nothing to report in {folder}",
            found=there,
            expected="metrics.jsonl of a run, in the folder or in its align/ and finetune/, or sweep.json of a sweep",
            remedy="train first, then pass the run's folder",
        )
    rank = {name: position for position, name in enumerate(STAGE_ORDER)}
    return sorted(below, key=lambda path: (rank.get(path.name, len(rank)), path.name))


def _told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """Labels that occur twice are preceded by the sweep, or replaced by the path."""
    labels = [entry.label for entry in entries]
    told = [
        entry if labels.count(entry.label) == 1
        else replace(entry, label=f"{entry.sweep}: {entry.label}" if entry.sweep else str(entry.path))
        for entry in entries
    ]  # fmt: skip
    labels = [entry.label for entry in told]
    return [
        entry if labels.count(entry.label) == 1 else replace(entry, label=f"{entry.label} ({entry.path.name})")
        for entry in told
    ]
