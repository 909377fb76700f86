"""Feeds runs to a tracker from their files, now or again: `sync FOLDER... [tracker=NAME] [tracker.KEY=VALUE]`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from anchorformer.errors import UserError
from data.overrides import CONF, check_option, options
from train.observe.feed import BusyError, feed
from train.observe.trackers.base import TrackerConfig, parse_tracker
from train.run.folder import RunFolder

USAGE = "python -m train sync checkpoints/my-run tracker=wandb tracker.mode=online"
BUSY = os.EX_TEMPFAIL
"""Exit code, 75, where another process is feeding a run: nothing is wrong, and something may be left for later."""
NO_RUNS = {"replay", "rehearsals"}
"""Folders of a run whose own runs are nothing to show."""


def main(arguments: list[str]) -> int:
    """Shows what the tracker does not have yet of every run in the folders, and says how much that was.

    Without `tracker=` each run is fed to its own tracker. Safe to repeat, and beside a run that goes on. What is wrong
    with one run, or its tracker, is said and keeps no other from being fed.

    Returns:
        0 where every run is shown, 75 where some are being fed by another process, else 1; of one run, or where it is
        the same for all of them, what that one ends with.

    Raises:
        UserError: no folder, one without a run in it, no such tracker, or one that cannot work; of one run, all that is
            wrong with it.
        Exception: of one run, whatever the tracker raises; what was shown before stays shown.
    """
    folders = [Path(word) for word in arguments if "=" not in word]
    words = [word for word in arguments if "=" in word]
    values = dict(word.split("=", 1) for word in words)
    wrong = [key for key in values if key != "tracker" and not key.startswith("tracker.")]
    if wrong or not folders:
        raise UserError(
            "sync takes folders of runs, and how they are tracked", found=" ".join(arguments) or "nothing",
            expected="FOLDER... [tracker=NAME] [tracker.KEY=VALUE]", remedy=f"e.g. {USAGE}",
        )  # fmt: skip
    runs = [run for folder in folders for run in runs_in(folder)]
    if len(runs) == 1:
        return _sync(runs[0], values)
    if "tracker" in values:
        _merged({}, values).check()
    return _summary([_sync_apart(run, words) for run in runs])


def _sync(run: RunFolder, values: Mapping[str, str]) -> int:
    tracker = tracker_of(run, values)
    tracker.check()
    try:
        print(f"{os.path.relpath(run.path)}: {show(run, tracker)} step(s) shown")
    except BusyError as holder:
        print(f"{os.path.relpath(run.path)}: left to {holder}, which is feeding it", file=sys.stderr)
        return BUSY
    return 0


def _sync_apart(run: RunFolder, words: list[str]) -> int:
    """Feeds one of several runs in a process of its own: trackers keep folder, key and mode for a whole process."""
    code = subprocess.run([sys.executable, "-m", "train", "sync", str(run.path), *words], check=False).returncode
    if code not in (0, BUSY):
        print(f"{os.path.relpath(run.path)} is left out, see above (exit code {code})", file=sys.stderr, flush=True)
    return code if code >= 0 else 1  # ended by a signal


def _summary(codes: list[int]) -> int:
    """One exit code for several runs."""
    if len(set(codes)) == 1:
        return codes[0]
    return BUSY if set(codes) == {0, BUSY} else 1


def runs_in(folder: Path) -> list[RunFolder]:
    """The folder itself, or every run below it, the oldest first.

    Raises:
        UserError: there is none.
    """
    runs = find_runs(folder)
    if not runs:
        raise UserError(
            f"there is no run in {folder}", found="no config.yaml beside a metrics.jsonl" if folder.is_dir() else
            "no such folder", expected="a run's folder, or one with runs in it", remedy=f"e.g. {USAGE}",
        )  # fmt: skip
    return runs


def find_runs(folder: Path) -> list[RunFolder]:
    """The folder itself, or every run below it (but replays and rehearsals) that has taken a step, the oldest first."""
    if (folder / "config.yaml").is_file():
        return [RunFolder(folder.resolve())]
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in NO_RUNS]
        if {"config.yaml", "metrics.jsonl"} <= set(files):
            run = RunFolder(Path(path).resolve())
            try:
                found.append((run.config.stat().st_mtime, run.path, run))
            except FileNotFoundError:
                continue  # deleted since it was listed
    return [run for *_, run in sorted(found, key=lambda one: one[:2])]


def tracker_of(run: RunFolder, values: Mapping[str, str]) -> TrackerConfig:
    """The tracker that the command line names, under the names that the run was given, or the run's own.

    Raises:
        UserError: neither names one, or a value does not fit.
    """
    tracker = _merged(run.read_config().tracker, values)
    if not tracker.is_on:
        raise UserError(
            f"{run.path} has no tracker of its own", found="tracker=none", expected="the name of one",
            remedy=f"add tracker= with one of {', '.join(set(options('tracker')) - {'none'})}",
        )  # fmt: skip
    return tracker


def _merged(own: Mapping[str, Any], values: Mapping[str, str]) -> TrackerConfig:
    """The tracker that the command line names and sets, where the run has `own`."""
    spec = dict(own)
    if "tracker" in values:
        check_option("tracker", values["tracker"], options("tracker"), "name a file of conf/tracker")
        names = {key: spec[key] for key in ("project", "group", "name") if key in spec}
        spec = yaml.safe_load((CONF / "tracker" / f"{values['tracker']}.yaml").read_text()) | names
    spec |= {key.removeprefix("tracker."): yaml.safe_load(text) for key, text in values.items() if key != "tracker"}
    return parse_tracker(spec)


def show(run: RunFolder, tracker: TrackerConfig) -> int:
    """Feeds one run with what there is, and says how many steps that were.

    Raises:
        BusyError: another process is at it.
        Exception: whatever the tracker raises.
    """
    is_over = threading.Event()
    is_over.set()
    return feed(run, tracker, is_over)
