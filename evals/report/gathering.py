"""From the paths of the command line to what is compared: runs, two-stage folders and the trials of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from anchorformer.errors import UserError
from evals.report.entry import Entry
from evals.report.reading import STAGE_ORDER, is_run, read_stage
from evals.report.sweeps import SWEEP, trials


def gather(paths: Sequence[Path]) -> list[Entry]:
    """What lies at the paths, each stage read once however many trials share it.

    Raises:
        UserError: a path holds neither a run, nor the stages of one, nor a sweep; or a file cannot be read.
    """
    read = cache(read_stage)
    entries: list[Entry] = []
    for path in paths:
        if (path / SWEEP).is_file():
            entries += trials(path, read)
        else:
            stages = tuple(read(folder.resolve()) for folder in _stage_folders(path))
            # The last name of an absolute path, so that `.` is called what it is.
            entries.append(Entry(
                label=path.resolve().name, path=path, stages=stages, point={}, axes={}, state=stages[-1].state,
            ))  # fmt: skip
    return _told_apart(entries)


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
