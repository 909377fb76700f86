"""The process that feeds a tracker while its run trains: nothing that happens in it reaches the run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from train.observe.feed import BusyError, feed
from train.observe.trackers.base import parse_tracker
from train.run.environment import Discreet
from train.run.folder import RunFolder
from train.run.identity import ROOT

log = logging.getLogger("train.observe.background")

GRACE = 60.0
"""Seconds that feeding may take once the run is over; what is not shown by then is left to `python -m train sync`."""
NICE = 10
"""How far the process, and what a tracker starts in it, stands behind the training with which it shares its cores."""


class Background:
    """The feeding process of a run, as the run's rank 0 sees it: started, glanced at, left alone.

    It reads files and nothing else, so a run never waits for it. It learns that the run is over from its standard
    input, which ends with the rank, however that ends.
    """

    def __init__(self, folder: RunFolder) -> None:
        path = folder.path / "logs" / "tracker.log"
        path.parent.mkdir(exist_ok=True)
        self._folder, self._is_reported = folder, False
        with path.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "train.observe.background", str(folder.path)],
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_paths()]), "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip

    def trouble(self) -> str | None:
        """What has become of the process, once; None while it lives."""
        if self._is_reported or self._process.poll() is None:
            return None
        self._is_reported = True
        return (
            f"the tracker has ended with code {self._process.returncode}, and the run goes on without it: see "
            f"{self._folder.path / 'logs' / 'tracker.log'}; python -m train sync {self._folder.path} shows the rest"
        )

    def leave(self) -> None:
        """Tells the process that nothing more comes, and waits for nothing."""
        assert self._process.stdin is not None
        self._process.stdin.close()


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]


def main(arguments: list[str]) -> None:
    """Feeds the run's tracker until standard input ends, and `GRACE` longer at most."""
    os.nice(NICE)
    handler = logging.StreamHandler()
    handler.setFormatter(Discreet("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    folder = RunFolder(Path(arguments[0]))
    is_over = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=[is_over], daemon=True).start()
    tracker = parse_tracker(folder.read_config().tracker)
    while True:
        try:
            log.info("%d step(s) shown", feed(folder, tracker, is_over))
        except BusyError:
            # The process of the attempt before this one has not come to its end yet.
            time.sleep(1)
        else:
            return


def _wait_for_the_end(is_over: threading.Event) -> None:
    sys.stdin.buffer.read()
    is_over.set()
    # A tracker that hangs keeps neither this process nor, on a cluster, the job.
    timer = threading.Timer(GRACE, _give_up)
    timer.daemon = True
    timer.start()


def _give_up() -> None:
    log.error("given up %g s after the end of the run; python -m train sync shows the rest", GRACE)
    logging.shutdown()
    # With what the tracker has started in this session. wandb-core has one of its own; it is told our number, and ends
    # by itself when that is gone, in the middle of an upload too.
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
