"""One trial on disk, and `python -m train.sweep.trial FOLDER PARENT`, the process that executes what is left of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pydantic

from anchorformer.errors import UserError, run_guarded
from anchorformer.schema import to_plain
from train.faults.interrupt import EXIT_CODE as INTERRUPTED
from train.faults.interrupt import SIGNALS
from train.run import lock
from train.run.folder import RunFolder, write_atomically
from train.run.identity import numbers_digest
from train.run.process import end_with_parent

FILE = "trial.json"
BEFORE_THE_LIMIT = signal.SIGUSR2
"""With which submitit has Slurm warn a trial; its own handler would leave the command to be killed."""
LAST_LINES = 12
"""Of the log of a trial that failed, as many are told."""


class State(str, Enum):
    """How far a trial is; what says `running` and is held by no process any more has been interrupted."""

    pending = "pending"
    running = "running"
    done = "done"
    failed = "failed"
    interrupted = "interrupted"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a trial.

    Attributes:
        name: what it does, the same at every start: a step that has ended well is not executed again.
        argv: the command; may have other threads or paths at another start.
        run: the run folder that it makes, where it does.
        numbers: `train.run.identity.numbers_digest` that this run has to have.
    """

    name: str
    argv: tuple[str, ...]
    run: str | None = None
    numbers: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a trial is, and what became of it; the contents of `trial.json`.

    Attributes:
        id: the head of `config_hash`.
        point: axis -> value, the seed among them.
        overrides: the words that its configs are composed of, beside names and paths.
        config_hash: hash of its resolved configs, without names, paths and threads.
        runs: stage -> run folder.
        needs: folder of the trial that has to be done before; a stage 1 that several share is a trial of its own.
        finished: names of the steps that have ended well.
        seconds: spent on its own steps, over all attempts.
        reason: why it failed, in one line.
    """

    id: str
    point: dict[str, Any]
    overrides: tuple[str, ...]
    config_hash: str
    runs: dict[str, str]
    steps: tuple[Step, ...]
    needs: str | None = None
    state: State = State.pending
    started: str | None = None
    ended: str | None = None
    exit_code: int | None = None
    seconds: float = 0.0
    finished: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def left(self) -> list[Step]:
        return [step for step in self.steps if step.name not in self.finished]


@dataclass(frozen=True)
class TrialFolder:
    """`trials/<id>/` of a sweep, or `shared/<hash>/` of a stage 1."""

    path: Path

    @property
    def log(self) -> Path:
        """What the trial's commands have printed, over all attempts."""
        return self.path / "log.txt"

    def read(self) -> Trial | None:
        """What is written there; None where there is nothing yet.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / FILE
        if not file.is_file():
            return None
        try:
            return pydantic.TypeAdapter(Trial).validate_json(file.read_bytes())
        except pydantic.ValidationError as error:
            raise UserError(
                f"{file} cannot be read", found=" ".join(str(error).split())[:200], expected="as the sweep left it",
                remedy=f"delete {self.path} to execute this trial again",
            ) from None  # fmt: skip

    def write(self, trial: Trial) -> Trial:
        """Replaces what is written there, and returns it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / FILE, json.dumps(to_plain(trial), indent=2) + "\n")
        return trial

    def note(self, **changes: Any) -> Trial:
        """Changes some of what is written there, which has to exist."""
        trial = self.read()
        assert trial is not None
        return self.write(dataclasses.replace(trial, **changes))

    def is_held(self) -> bool:
        """Whether a process that may be alive executes it."""
        return lock.is_held(self.path)

    def state(self) -> State:
        """The state as it is, whatever a process that was killed has left written."""
        trial = self.read()
        if trial is not None and trial.state is State.running and not self.is_held():
            trial = self.read()  # it may have come to its end since it was read
            return State.interrupted if trial is None or trial.state is State.running else trial.state
        return State.pending if trial is None else trial.state

    def last_lines(self) -> list[str]:
        """The end of the log."""
        return self.log.read_text(errors="replace").splitlines()[-LAST_LINES:] if self.log.is_file() else []


@dataclass
class Attempt:
    """One execution of what is left of a trial; a signal is handed on, once, to the command that runs."""

    folder: TrialFolder
    signal: str = ""
    _command: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def execute(self, environment: Mapping[str, str]) -> int:
        """Executes the steps that are left, one after the other, up to the first that fails.

        Args:
            environment: of the commands.

        Returns:
            0, 75 where a signal has stopped it, or the exit code of the step that failed.

        Raises:
            UserError: another process executes this trial.
        """
        with lock.held(self.folder.path):
            before = {number: signal.signal(number, self._hand_on) for number in (*SIGNALS, BEFORE_THE_LIMIT)}
            try:
                return self._execute(environment)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _execute(self, environment: Mapping[str, str]) -> int:
        trial = self.folder.note(state=State.running, started=_now(), ended=None, exit_code=None, reason=None)
        if trial.needs and TrialFolder(Path(trial.needs)).state() is not State.done:
            return self._end(State.failed, 1, f"what it starts from is not done: {trial.needs}")
        for step in trial.left:
            begin = time.monotonic()
            code = INTERRUPTED if self.signal else self._run(step.argv, environment)
            trial = self.folder.note(seconds=round(trial.seconds + time.monotonic() - begin, 3))
            if self.signal or code == INTERRUPTED:
                return self._end(State.interrupted, INTERRUPTED, None)
            if code:
                return self._end(State.failed, code, f"{step.name} ended with {code}")
            if step.numbers and numbers_digest(RunFolder(Path(step.run or "")).read_config()) != step.numbers:
                return self._end(State.failed, 1, f"{step.name} ran with another config: conf/ was edited meanwhile")
            trial = self.folder.note(finished=(*trial.finished, step.name))
        return self._end(State.done, 0, None)

    def _run(self, argv: tuple[str, ...], environment: Mapping[str, str]) -> int:
        with self.folder.log.open("ab") as log:
            log.write(f"+ {shlex.join(argv)}\n".encode())
            log.flush()
            self._command = subprocess.Popen(
                argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=partial(end_with_parent, signal.SIGTERM, os.getpid()),
            )  # fmt: skip
            if self.signal:
                self._command.terminate()  # it came before there was anything to hand it on to
            code = self._command.wait()
            self._command = None
        return code if code >= 0 else 128 - code

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        # The agent of a run takes a second signal for impatience and would leave its ranks behind.
        if not self.signal and self._command is not None:
            self._command.terminate()
        self.signal = self.signal or signal.Signals(number).name

    def _end(self, state: State, code: int, reason: str | None) -> int:
        self.folder.note(state=state, ended=_now(), exit_code=code, reason=reason)
        return code


def execute(folder: str) -> int:
    """Executes what is left of a trial in this process' environment (also what a Slurm array calls).

    Returns:
        see `Attempt.execute`.
    """
    return Attempt(TrialFolder(Path(folder))).execute(os.environ)


def main() -> int:
    folder, parent = sys.argv[1:]
    end_with_parent(signal.SIGTERM, int(parent))
    return execute(folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    run_guarded(main)
