"""Notices that a rank stands still, says which rank holds the others up, and ends the process."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from train.config import WatchdogConfig
from train.faults.black_box import HUNG, BlackBox
from train.faults.interrupt import Interrupted
from train.faults.progress import (
    IN_STEPS,
    LONGEST_SILENCE,
    Place,
    Progress,
    Report,
    read_reports,
    report_path,
    who_is_behind,
)
from train.run.folder import RunFolder

log = logging.getLogger(__name__)

EXIT_CODE = 4
LONGEST_PERIOD = 2.0
"""Seconds between two looks at the clock."""
LAST_WORDS = 30.0
"""Seconds for the description of an end; whoever writes to a disk that is gone may never come back."""


class Watchdog:
    """Beside the trainer, one thread that compares the time in its phase with the budget, and one that tells its place.

    They are two because a shared disk may hang, and with it whoever writes; the one that compares writes nothing until
    the budget is spent. It needs the interpreter to be free, as it is while a rank waits in a collective, for data or
    for a device. For what holds the interpreter itself there is `faulthandler`'s own timer behind it, wound up at every
    look.

    Args:
        size: how many ranks there are.
        leave: called with the exit code when the budget is spent; the default ends the process without unwinding, which
            could wait for the very thing that hangs.
    """

    def __init__(
        self, config: WatchdogConfig, folder: RunFolder, rank: int, size: int, progress: Progress, box: BlackBox,
        leave: Callable[[int], object] = os._exit,
    ) -> None:  # fmt: skip
        self._config, self._folder, self._rank, self._size = config, folder, rank, size
        self._progress, self._box, self._leave = progress, box, leave
        shortest = min(config.step_seconds, config.startup_seconds)
        self._period, self._silence = min(LONGEST_PERIOD, shortest / 20), min(LONGEST_SILENCE, shortest / 20)
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("watchdog", self._watch), ("reports", self._tell))
        ]

    def __enter__(self) -> Watchdog:
        self._report_path.parent.mkdir(parents=True, exist_ok=True)
        self._folder.log(self._rank).parent.mkdir(parents=True, exist_ok=True)
        self._stacks = self._folder.log(self._rank).open("a")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=LONGEST_PERIOD)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if kind in (None, Interrupted):
            # What stays is of ranks that were killed or failed.
            self._report_path.unlink(missing_ok=True)

    @property
    def _report_path(self) -> Path:
        return report_path(self._folder.black_boxes, self._rank)

    def _watch(self) -> None:
        while True:
            faulthandler.dump_traceback_later(self._config.collective_seconds, exit=True, file=self._stacks)
            place = self._progress.place
            if place.seconds > budget(self._config, place):
                self._end(place)
                return
            if self._is_over.wait(self._period):
                return

    def _tell(self) -> None:
        while True:
            self._publish(self._progress.place)
            if self._is_over.wait(self._silence):
                return

    def _publish(self, place: Place) -> None:
        try:
            Report.of(self._rank, place).write(self._report_path)
        except OSError as error:
            log.warning("this rank's place could not be told to the others: %s", error)

    def _end(self, place: Place) -> None:
        last_resort = leave_later(EXIT_CODE, self._leave)
        try:
            self._publish(place)
            reports = [report for report in read_reports(self._folder.black_boxes) if report.rank < self._size]
            behind = who_is_behind(reports, self._size, silent_after=3 * self._silence + 1)
            allowed = budget(self._config, place)
            message = f"{behind} (no progress for {place.seconds:.1f} s, the watchdog allows {allowed:g} s here)"
            log.critical("%s; all ranks:\n%s", message, "\n".join(map(str, reports)))
            stacks = stacks_of_all_threads()
            self._stacks.write(stacks)
            self._box.write(HUNG, message, stacks)
            self._stacks.flush()
            logging.shutdown()
        finally:
            # Whatever goes wrong with the description, a run that hangs has to end.
            last_resort.cancel()
            self._leave(EXIT_CODE)


def leave_later(code: int, leave: Callable[[int], object] = os._exit) -> threading.Timer:
    """Ends the process after `LAST_WORDS`, from a thread that touches no disk, unless it is cancelled before."""
    timer = threading.Timer(LAST_WORDS, leave, [code])
    timer.daemon = True
    timer.start()
    return timer


def budget(config: WatchdogConfig, place: Place) -> float:
    """Seconds that a rank may stay where it is."""
    return config.step_seconds if place.is_warm and place.phase in IN_STEPS else config.startup_seconds


def stacks_of_all_threads() -> str:
    """Where every thread of this process is, as tracebacks, the main thread first; but for the one that asks."""
    frames = sys._current_frames()
    return "\n".join(
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
        if thread.ident in frames and thread is not threading.current_thread()
    )
