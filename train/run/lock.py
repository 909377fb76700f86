"""One launch per run folder: a file that says who holds it, and that can tell whether they are still alive."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from anchorformer.errors import UserError
from train.faults.progress import LONGEST_SILENCE, Report, read_reports
from train.run.folder import RunFolder
from train.run.process import began, orphans

log = logging.getLogger(__name__)

FILE = "LOCK"
PATIENCE = 300.0
"""Seconds that ranks of an earlier launch get to end: they were told to when that was killed, and save first."""
PERIOD = 1.0
"""Seconds between two looks at them."""
KILLED_WITHIN = 30.0
"""Seconds in which a process that has been killed is gone, unless it hangs in the kernel, in a disk or a device."""
SILENT = 3 * LONGEST_SILENCE
"""Seconds without a report after which a rank on another machine is taken for gone."""
WRITTEN_WITHIN = 60
"""Seconds after which a lock that is still empty belongs to a process that ended between making and filling it."""


@dataclass(frozen=True)
class Holder:
    """Who started ranks on a run folder.

    Attributes:
        ticks: when the process began, by its machine's clock; a process number is given again, this pair is not.
        job, attempt: of Slurm, which never lets two attempts at one job run at once.
        since: for the reader.
    """

    host: str
    pid: int
    ticks: str
    job: str | None
    attempt: str
    since: str

    @classmethod
    def myself(cls) -> Holder:
        return cls(
            socket.gethostname(), os.getpid(), began(os.getpid()), os.environ.get("SLURM_JOB_ID"),
            os.environ.get("SLURM_RESTART_COUNT", "0"), datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip

    def is_gone(self, me: Holder) -> bool:
        """Whether it is certain that this holder has ended; of another machine it is not."""
        if self.job is not None and self.job == me.job and self.attempt != me.attempt:
            return True
        return self.host == me.host and began(self.pid) != self.ticks

    def is_same(self, other: Holder) -> bool:
        return (self.host, self.pid, self.ticks) == (other.host, other.pid, other.ticks)


@contextmanager
def acquired(folder: Path) -> Iterator[None]:
    """Takes the lock of an existing run folder, and gives it back only if the block fails.

    Otherwise it goes with the process, also into the program that the process becomes by exec.

    Raises:
        UserError: another launch holds it, or one on another machine that may still be alive; or its ranks do not end.
    """
    acquire(folder)
    try:
        yield
    except BaseException:
        release(folder)
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds an existing run folder inside the block.

    Raises:
        UserError: see `acquired`.
    """
    with acquired(folder):
        yield
    release(folder)


def acquire(folder: Path) -> None:
    """Takes the lock, or keeps it where this process has it already; then waits for ranks that outlive their launch.

    Raises:
        UserError: see `acquired`.
    """
    _take(folder)
    try:
        end_orphans(folder)
        _wait_for_ranks(folder)
    except BaseException:
        release(folder)
        raise


def _take(folder: Path) -> None:
    path, me = folder / FILE, Holder.myself()
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            holder = _read(path)
            if holder is not None and holder.is_same(me):
                return
            if not (_is_abandoned(path) if holder is None else holder.is_gone(me)):
                raise _taken(path, holder) from None
            _clear_away(path, holder)
            continue
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(asdict(me), file)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # On a full disk, half a lock would outlive its cause.
            path.unlink()
            raise
        return


def release(folder: Path) -> None:
    """Gives the lock back; does nothing where this process does not hold it."""
    path = folder / FILE
    holder = _read(path) if path.is_file() else None
    if holder is not None and holder.is_same(Holder.myself()):
        path.unlink(missing_ok=True)


def end_orphans(folder: Path) -> None:
    """Returns when no rank whose launcher is gone runs on this machine; those that do not end by themselves are killed.

    They were told to when it went, and save first; one that hangs would keep its card's memory for ever.

    Raises:
        UserError: one that cannot be killed.
    """
    deadline, is_told, is_killed = time.monotonic() + PATIENCE, False, False
    while pids := orphans(folder):
        reports = {report.pid: str(report) for report in read_reports(RunFolder(folder).black_boxes)}
        who = "; ".join(reports.get(pid, f"process {pid}") for pid in pids)
        if time.monotonic() > deadline:
            if is_killed:
                raise _outlived(folder, who, "they hang in the kernel: see to the disk or device, or boot the machine")
            log.warning("ranks of an earlier launch did not end within %g seconds and are killed: %s", PATIENCE, who)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            deadline, is_killed = time.monotonic() + KILLED_WITHIN, True
        elif not is_told:
            log.warning("waiting for ranks of an earlier launch to end: %s", who)
            is_told = True
        time.sleep(PERIOD)


def _wait_for_ranks(folder: Path) -> None:
    """Returns when nobody writes into the folder any more; the lock is taken already.

    A launcher that was killed leaves ranks behind, which save before they end.
    """
    deadline = time.monotonic() + PATIENCE
    is_told = False
    while living := _living(folder):
        if time.monotonic() > deadline:
            raise _outlived(
                folder, "; ".join(map(str, living)),
                "end them (kill -9 and their pid, on their machine); then start again with resume=auto",
            )  # fmt: skip
        if not is_told:
            log.warning("waiting for ranks of an earlier launch to end: %s", "; ".join(map(str, living)))
            is_told = True
        time.sleep(PERIOD)


def _outlived(folder: Path, who: str, remedy: str) -> UserError:
    return UserError(
        f"ranks of an earlier launch still run on {folder}", found=who, expected="none: their launcher is gone",
        remedy=remedy,
    )  # fmt: skip


def _living(folder: Path) -> list[Report]:
    """Ranks that have reported and not ended; of other machines those that have reported lately."""
    reports = read_reports(RunFolder(folder).black_boxes)
    host, path = socket.gethostname(), folder / FILE
    near = [report for report in reports if report.host == host and report.pid != os.getpid()]
    far = [report for report in reports if report.host != host]
    if far:
        path.touch()  # dated by the clock of the disk, as the reports are
        far = [report for report in far if path.stat().st_mtime - report.written < SILENT]
    return [report for report in near if began(report.pid) == report.began] + far


def is_held(folder: Path) -> bool:
    """Whether a process that may be alive holds a folder; leaves the lock as it is."""
    path = folder / FILE
    if not path.exists():
        return False
    holder = _read(path)
    return not (_is_abandoned(path) if holder is None else holder.is_gone(Holder.myself()))


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # being written, or cut short


def _is_abandoned(path: Path) -> bool:
    """Whether nobody has written into the lock for so long that nobody will."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return False
    return facts.st_size == 0 and time.time() - facts.st_mtime > WRITTEN_WITHIN


def _clear_away(path: Path, gone: Holder | None) -> None:
    """Removes the lock of a holder that is gone, and no other that has taken its place meanwhile."""
    aside = path.with_name(f".{FILE}-{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # another launch has been quicker
    found = _read(aside)
    if found != gone or (found is None and not _is_abandoned(aside)):
        aside.rename(path)
        raise _taken(path, found)
    aside.unlink()
    if gone is None:
        log.warning("an empty lock of %s, over %d seconds old, has been removed", path.parent, WRITTEN_WITHIN)
        return
    log.warning("process %d on %s, which held %s since %s, is gone", gone.pid, gone.host, path.parent, gone.since)


def _taken(path: Path, holder: Holder | None) -> UserError:
    found = "an unreadable lock" if holder is None else f"process {holder.pid} on {holder.host}, since {holder.since}"
    return UserError(
        f"another launch holds the run folder {path.parent}", found=found, expected="one launch per run",
        remedy=f"wait for it or stop it; if that process is certainly gone, delete {path}",
    )  # fmt: skip
