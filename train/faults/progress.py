"""Where each rank is in its run: in memory for itself, in one small file for the others, and who is behind."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from traceback import walk_stack
from typing import Any

from anchorformer.schema import to_plain
from train.run.process import began


class Phase(str, Enum):
    """What a rank does, in the order in which it does it."""

    joining = "joining the other ranks"
    reading = "reading checkpoint and data"
    loading = "loading weights"
    starting = "starting the engine"
    data = "waiting for data"
    exchange = "exchanging facts"
    compute = "forward and backward"
    update = "updating"
    show = "validating"
    trace = "writing its trace"
    save = "saving"
    export = "exporting the model"


LONGEST_SILENCE = 30.0
"""Seconds between two reports of a rank that lives, and so the age of what others can read about it."""
IN_STEPS = (Phase.data, Phase.exchange, Phase.compute, Phase.update)
ORDER = {phase: number for number, phase in enumerate(Phase)}


@dataclass(frozen=True)
class Place:
    """One moment of a rank's run.

    Attributes:
        step: the optimizer step that is being taken, or was taken last; 0 before the first.
        samples: ids of this rank's samples in the step whose data it was given last.
        since: when the phase began, by this process's monotonic clock.
        is_warm: whether a whole step lies behind, and with it compilation and the first contact with the data.
    """

    phase: Phase = Phase.joining
    step: int = 0
    samples: tuple[str, ...] = ()
    since: float = field(default_factory=time.monotonic)
    is_warm: bool = False

    @property
    def seconds(self) -> float:
        """How long the phase has lasted."""
        return time.monotonic() - self.since


class Progress:
    """This rank's place; replaced as a whole at every change, so that another thread always reads one moment."""

    def __init__(self) -> None:
        self.place = Place()

    def enter(self, phase: Phase, step: int | None = None, samples: tuple[str, ...] | None = None) -> None:
        """Call when a phase begins; what is not given stays.

        Args:
            step: with `Phase.data`, the step that begins.
            samples: with the phase after `Phase.data`, what has come.
        """
        before = self.place
        self.place = Place(
            phase=phase,
            step=before.step if step is None else step,
            samples=before.samples if samples is None else samples,
            # Data are waited for again, although some have come: the first step is over.
            is_warm=before.is_warm or (phase is Phase.data and bool(before.samples)),
        )


@dataclass(frozen=True)
class Report:
    """A rank's place as the others read it.

    Attributes:
        seconds: how long the phase had lasted when this was written.
        doing: the function that the main thread is in.
        is_waiting: whether that is a collective, so that the rank waits for others.
        written: by the wall clock of the rank's host; once read, by that of the disk, which is one for all hosts.
        began: when the process began, as `train.run.process` says it.
    """

    rank: int
    host: str
    pid: int
    phase: Phase
    step: int
    samples: tuple[str, ...]
    seconds: float
    doing: str
    is_waiting: bool
    written: float
    began: str

    @classmethod
    def of(cls, rank: int, place: Place) -> Report:
        doing, is_waiting = _main_thread()
        return cls(
            rank, socket.gethostname(), os.getpid(), place.phase, place.step, place.samples,
            round(place.seconds, 1), doing, is_waiting, time.time(), began(os.getpid()),
        )  # fmt: skip

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Report:
        return cls(**{**values, "phase": Phase(values["phase"]), "samples": tuple(values["samples"])})

    def write(self, path: Path) -> None:
        """Replaces the file at once; not made durable, since it is about a process that would be gone as well."""
        # By thread: the watchdog's last report may meet the one before, on a disk that is slow.
        partial = path.with_name(f".tmp-{path.name}-{threading.get_ident()}")
        partial.write_text(json.dumps(to_plain(self)))
        partial.replace(path)

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step else ""
        samples = f", samples {', '.join(self.samples)}" if self.samples else ""
        where = f"{self.phase.value}{step}, {self.seconds:g} s, in {self.doing}{samples}"
        return f"rank {self.rank} ({self.host}, pid {self.pid}): {where}"


COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"


def _main_thread() -> tuple[str, bool]:
    """The main thread's innermost function, and whether it waits in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no thread", False
    path = Path(frame.f_code.co_filename)
    doing = f"{frame.f_code.co_name} ({path.parent.name}/{path.name}:{frame.f_lineno})"
    files = [inner.f_code.co_filename for inner, _ in walk_stack(frame)]
    return doing, any(COLLECTIVES in file for file in files)


def report_path(black_boxes: Path, rank: int) -> Path:
    """Where a rank's report lies."""
    return black_boxes / f"now_{rank}.json"


def read_reports(black_boxes: Path) -> list[Report]:
    """The reports of all ranks that have left one, by rank; one that cannot be read is none."""
    reports = []
    for path in black_boxes.glob("now_*.json"):
        try:
            reports.append(Report.parse({**json.loads(path.read_text()), "written": path.stat().st_mtime}))
        except (OSError, ValueError, TypeError):
            # Its rank has just ended, its disk is going, or it is of another version.
            continue
    return sorted(reports, key=lambda report: report.rank)


def who_is_behind(reports: Sequence[Report], size: int, silent_after: float) -> str:
    """Names the ranks that the others wait for: those never heard of, else the silent, else those in an earlier phase.

    Args:
        size: how many ranks there are.
        silent_after: seconds without a report after which a rank counts as silent.
    """
    missing = sorted(set(range(size)) - {report.rank for report in reports})
    if missing:
        return f"never heard of: rank {', '.join(map(str, missing))}"
    newest = max(report.written for report in reports)
    silent = [report for report in reports if newest - report.written > silent_after]
    if silent:
        ago = "; ".join(f"{report}, silent for {newest - report.written:.0f} s" for report in silent)
        return f"stopped or dead: {ago}"
    places = [(report.step, ORDER[report.phase], report.is_waiting) for report in reports]
    behind = [report for report, place in zip(reports, places, strict=True) if place == min(places) != max(places)]
    if behind:
        return f"behind: {'; '.join(map(str, behind))}"
    if all(report.is_waiting for report in reports):
        return f"no rank is behind, all wait in a collective: look at the network between them; {reports[0]}"
    return f"no rank is behind, all do the same: {reports[0]}"
