"""Feeds runs to a tracker from their files, now or again: `sync FOLDER... [tracker=NAME] [tracker.KEY=VALUE]`."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import yaml

from anchorformer.errors import UserError
from data.overrides import CONF, check_option, options
from train.observe.feed import BusyError, feed
from train.observe.trackers.base import TrackerConfig, parse_tracker
from train.run.folder import RunFolder

USAGE = "python -m train sync checkpoints/my-run tracker=wandb tracker.mode=online"


def main(arguments: list[str]) -> int:
    """Shows what the tracker does not have yet of every run in the folders, and says how much that was.

    Without `tracker=` each run is fed to its own tracker. Safe to repeat, and beside a run that goes on.

    Raises:
        UserError: no folder, one without a run in it, no tracker, or one that cannot work.
        Exception: whatever the tracker raises; what was shown before stays shown.
    """
    folders = [Path(word) for word in arguments if "=" not in word]
    values = dict(word.split("=", 1) for word in arguments if "=" in word)
    wrong = [key for key in values if key != "tracker" and not key.startswith("tracker.")]
    if wrong or not folders:
        raise UserError(
            "sync takes folders of runs, and how they are tracked", found=" ".join(arguments) or "nothing",
            expected="FOLDER... [tracker=NAME] [tracker.KEY=VALUE]", remedy=f"e.g. {USAGE}",
        )  # fmt: skip
    named = [(run, tracker_of(run, values)) for folder in folders for run in runs_in(folder)]
    for tracker in {tracker for _, tracker in named}:
        tracker.check()
    for run, tracker in named:
        count = show(run, tracker)
        told = "is being fed already" if count is None else f"{count} step(s) shown"
        print(f"{os.path.relpath(run.path)}: {told}")
    return 0


def runs_in(folder: Path) -> list[RunFolder]:
    """The folder itself, or every run below it (but replays and rehearsals), the oldest first.

    Raises:
        UserError: there is none.
    """
    if (folder / "config.yaml").is_file():
        return [RunFolder(folder.resolve())]
    found = [path.parent for path in folder.rglob("metrics.jsonl") if (path.parent / "config.yaml").is_file()]
    runs = [path for path in found if not {"replay", "rehearsals"} & set(path.relative_to(folder).parts)]
    if not runs:
        raise UserError(
            f"there is no run in {folder}", found="no config.yaml beside a metrics.jsonl" if folder.is_dir() else
            "no such folder", expected="a run's folder, or one with runs in it", remedy=f"e.g. {USAGE}",
        )  # fmt: skip
    return [RunFolder(path.resolve()) for path in sorted(runs, key=lambda path: (path / "config.yaml").stat().st_mtime)]


def tracker_of(run: RunFolder, values: dict[str, str]) -> TrackerConfig:
    """The tracker that the command line names, under the names that the run was given, or the run's own.

    Raises:
        UserError: neither names one, or a value does not fit.
    """
    spec: dict[str, Any] = dict(run.read_config().tracker)
    if "tracker" in values:
        check_option("tracker", values["tracker"], options("tracker"), "name a file of conf/tracker")
        names = {key: spec[key] for key in ("project", "group", "name") if key in spec}
        spec = yaml.safe_load((CONF / "tracker" / f"{values['tracker']}.yaml").read_text()) | names
    spec |= {key.removeprefix("tracker."): yaml.safe_load(text) for key, text in values.items() if key != "tracker"}
    tracker = parse_tracker(spec)
    if not tracker.is_on:
        raise UserError(
            f"{run.path} has no tracker of its own", found="tracker=none", expected="the name of one",
            remedy=f"add tracker= with one of {', '.join(set(options('tracker')) - {'none'})}",
        )  # fmt: skip
    return tracker


def show(run: RunFolder, tracker: TrackerConfig) -> int | None:
    """Feeds one run with what there is; how many steps that were, or None where another process is at it."""
    is_over = threading.Event()
    is_over.set()
    try:
        return feed(run, tracker, is_over)
    except BusyError:
        return None
