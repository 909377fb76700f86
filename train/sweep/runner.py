"""The local executor: trials in slots, each in a session of its own, none left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from train.compose import ROOT
from train.faults.interrupt import EXIT_CODE as INTERRUPTED
from train.run import lock
from train.sweep.slots import Slot
from train.sweep.trial import State, Trial, TrialFolder

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Runner:
    """Executes the trials that are not done, in their order, as slots come free.

    The first signal asks all trials to stop, which save and end as interrupted; the second kills them with everything
    that they have started.

    Attributes:
        trials: folder -> trial, as on disk; one that another needs comes before it.
        slots: shares of the machine, one trial in each.
        retry_failed: whether failed ones are started again.
        on_change: told of every trial that starts or ends, with its state.
    """

    trials: Mapping[Path, Trial]
    slots: Sequence[Slot]
    retry_failed: bool
    on_change: Callable[[Path, State], None]
    _processes: dict[Path, tuple[Slot, subprocess.Popen[bytes]]] = field(default_factory=dict)
    _states: dict[Path, State] = field(default_factory=dict)
    _told: set[Path] = field(default_factory=set)
    _signals: int = 0

    def run(self) -> dict[Path, State]:
        """Returns when every trial has ended or been told to stop; the states they are then in."""
        self._states = {path: TrialFolder(path).state() for path in self.trials}
        waiting = [path for path, state in self._states.items() if self._is_due(state)]
        self._states |= dict.fromkeys(waiting, State.pending)
        before = {number: signal.signal(number, self._stop) for number in STOPS}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # under nohup a closed terminal stops nothing
        try:
            while (waiting and not self._signals) or self._processes:
                if not self._signals:
                    waiting = self._start_what_can(waiting)
                self._collect()
                time.sleep(POLL_SECONDS)
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return {path: TrialFolder(path).state() for path in self.trials}

    def _is_due(self, state: State) -> bool:
        return state is not State.done and (state is not State.failed or self.retry_failed)

    def _start_what_can(self, waiting: list[Path]) -> list[Path]:
        """Starts trials while slots are free; returns those that have to wait longer."""
        left = []
        for path in waiting:
            needed = self.trials[path].needs
            needed_state = State.done if needed is None else self._states[Path(needed)]
            if needed_state is State.failed:
                reason = f"what it starts from has failed: {needed}"
                TrialFolder(path).note(state=State.failed, exit_code=1, reason=reason)
                self._set(path, State.failed)
            elif needed_state is State.interrupted:
                continue  # by somebody else; it stays for the next time
            elif needed_state is State.done and self._free() and not self._is_held(path):
                self._start(path, self._free()[0])
            else:
                left.append(path)
        return left

    def _is_held(self, path: Path) -> bool:
        """Whether another process executes a trial; said once, since one of another machine may be gone for good."""
        if not TrialFolder(path).is_held():
            return False
        if path not in self._told:
            self._told.add(path)
            log.warning(
                "waiting for the process that holds %s; if it is certainly gone, delete that file", path / lock.FILE
            )
        return True

    def _free(self) -> list[Slot]:
        taken = [slot for slot, _ in self._processes.values()]
        return [slot for slot in self.slots if all(slot is not other for other in taken)]

    def _start(self, path: Path, slot: Slot) -> None:
        argv = [sys.executable, "-m", "train.sweep.trial", str(path), str(os.getpid())]
        environment = slot.environment(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with TrialFolder(path).log.open("ab") as log:
            process = subprocess.Popen(
                argv, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, slot.cores)
        self._processes[path] = slot, process
        if self._signals:
            process.terminate()  # the signal came before there was anything to hand it on to
        self._set(path, State.running)

    def _collect(self) -> None:
        for path, (_, process) in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[path]
            folder = TrialFolder(path)
            state = folder.state()
            if state in (State.pending, State.interrupted) and not self._signals and code != INTERRUPTED:
                # It was killed, or never came to write anything: nobody asked it to stop.
                code = code if code >= 0 else 128 - code
                folder.note(state=State.failed, exit_code=code, reason=f"its process ended with {code}")
                state = State.failed
            self._set(path, state)

    def _set(self, path: Path, state: State) -> None:
        self._states[path] = state
        self.on_change(path, state)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            for _, process in self._processes.values():
                process.terminate()
        elif self._signals == 2:
            self._kill()

    def _kill(self) -> None:
        for _, process in self._processes.values():
            for pid in [process.pid, *descendants(process.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has ended since


def descendants(pid: int) -> list[int]:
    """All living processes below one, in whatever sessions (torchrun gives each rank its own); Linux only."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    below, found = [pid], []
    while below:
        found += (next_ones := children.get(below.pop(), []))
        below += next_ones
    return found
