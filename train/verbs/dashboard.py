"""Serves Trackio's dashboard on loopback over all runs below a folder, tracked or not: `dashboard [FOLDER...]`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from anchorformer.errors import UserError
from train.observe.trackers.trackio import TrackioConfig
from train.run.folder import RunFolder
from train.verbs.sync import runs_in, show, tracker_of

PERIOD = 10.0
"""Seconds between two looks for new runs and new steps."""


def main(arguments: list[str]) -> int:
    """Brings every run into the database, serves it, and goes on doing both until it is interrupted.

    Raises:
        UserError: a folder without a run, or Trackio is not installed.
    """
    wrong = [word for word in arguments if "=" in word]
    if wrong:
        raise UserError(
            "dashboard takes folders of runs only", found=" ".join(wrong), expected="[FOLDER...]",
            remedy="e.g. python -m train dashboard checkpoints",
        )  # fmt: skip
    folders = [Path(word) for word in arguments] or [Path("checkpoints")]
    tracker = TrackioConfig()
    tracker.check()
    sizes: dict[RunFolder, int] = {}
    url = None
    try:
        while True:
            for run in [run for folder in folders for run in runs_in(folder)]:
                size = run.metrics.stat().st_size
                if sizes.get(run) == size:
                    continue
                try:
                    count = show(run, tracker_of(run, {"tracker": "trackio"}))
                except UserError as error:  # an old or damaged run keeps no other from being shown
                    sizes[run] = size
                    print(f"{os.path.relpath(run.path)} is left out: {error}", file=sys.stderr, flush=True)
                    continue
                if count is not None:
                    sizes[run] = size
                    print(f"{os.path.relpath(run.path)}: {count} step(s) shown", flush=True)
            if url is None:
                url = tracker.serve()
                print(f"dashboard: {url} (Ctrl-C ends it)", flush=True)
            time.sleep(PERIOD)
    except KeyboardInterrupt:
        return 0
