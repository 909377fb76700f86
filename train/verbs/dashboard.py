"""Serves Trackio's dashboard on loopback over all runs below a folder, tracked or not: `dashboard [FOLDER...]`."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from pathlib import Path

from anchorformer.errors import UserError
from train.observe.feed import BusyError
from train.observe.trackers.trackio import TrackioConfig
from train.run.folder import RunFolder
from train.verbs.sync import find_runs, show, tracker_of

PERIOD = 10.0
"""Seconds between two looks for new runs and new steps."""
FAULTS = (UserError, OSError, ValueError, LookupError, TypeError)
"""What a run's files can raise: they do not fit, are gone, are no JSON, are records without their fields."""


def main(arguments: list[str]) -> int:
    """Serves the database, brings every run into it, and goes on doing both until it is interrupted.

    Raises:
        UserError: something that is no folder, or Trackio is not installed.
    """
    folders = [Path(word) for word in arguments] or [Path("checkpoints")]
    wrong = [str(folder) for folder in folders if not folder.is_dir()]
    if wrong:
        raise UserError(
            "dashboard takes folders of runs only", found=f"no folder {' '.join(wrong)}", expected="[FOLDER...]",
            remedy="e.g. python -m train dashboard checkpoints",
        )  # fmt: skip
    tracker = TrackioConfig()
    tracker.check()
    screen = Screen()
    try:
        print(f"dashboard: {tracker.serve()} (Ctrl-C ends it)", flush=True)
        while True:
            screen.update(folders)
            time.sleep(PERIOD)
    except KeyboardInterrupt:
        return 0


class Screen:
    """What is shown of the runs so far, and what has been said about them."""

    def __init__(self) -> None:
        self._sizes: dict[RunFolder, int] = {}
        self._told: dict[RunFolder, str] = {}
        self._is_waiting = False

    def update(self, folders: list[Path]) -> None:
        """Looks for runs, and for new steps of each."""
        runs = [run for folder in folders for run in find_runs(folder)]
        if not runs and not self._is_waiting:
            print(f"there is no run in {' '.join(map(str, folders))}: waiting for one", flush=True)
        self._is_waiting = not runs
        for run in runs:
            self._look(run)

    def _look(self, run: RunFolder) -> None:
        """Feeds a run whose record has changed; one that is damaged, when it changes the next time."""
        try:
            size = run.metrics.stat().st_size
        except FileNotFoundError:
            return  # before its first step, or deleted
        if self._sizes.get(run) == size:
            return
        try:
            count = show(run, tracker_of(run, {"tracker": "trackio"}))
        except BusyError as holder:
            self._tell(run, f"is left to {holder}, which is feeding it")
        except sqlite3.Error as error:  # another process may be at the database: once more at the next look
            self._tell(run, f"is left for later: {error}")
        except FAULTS as error:
            self._sizes[run] = size
            self._tell(run, f"is left out: {type(error).__name__}: {error}")
        else:
            self._sizes[run] = size
            self._told.pop(run, None)
            print(f"{os.path.relpath(run.path)}: {count} step(s) shown", flush=True)

    def _tell(self, run: RunFolder, words: str) -> None:
        if self._told.get(run) != words:
            self._told[run] = words
            print(f"{os.path.relpath(run.path)} {words}", file=sys.stderr, flush=True)
