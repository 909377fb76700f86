"""Signals that ask a run to stop: noted when they come, heeded by all ranks together before their next step."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""The launcher's or Slurm's end, Slurm's warning, Ctrl-C, a closed terminal; Ctrl-\\ (SIGQUIT) still ends at once."""
EXIT_CODE = os.EX_TEMPFAIL
"""75, never 0: an agent whose ranks left with 0 would wait for those of the other nodes."""


def heeded() -> tuple[signal.Signals, ...]:
    """Those of `SIGNALS` that mean it: under nohup, which has SIGHUP ignored, a closed terminal stops nothing."""
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (is_deaf and number is signal.SIGHUP))


class Interrupted(Exception):
    """The run has left a step's border because a signal asked for it; what can be saved is saved.

    Attributes:
        step: the last step that was taken.
        signal: the signal's name.
    """

    def __init__(self, step: int, signal: str) -> None:
        super().__init__(f"stopped by {signal} after step {step}")
        self.step, self.signal = step, signal


class StopRequest:
    """Whether this process has been asked to stop, and by which signal.

    A handler does nothing but note: it may run in the middle of anything, and twice, because torchrun and Slurm both
    deliver. The loader's processes are forked with it and so survive a signal to the whole group: a rank needs one more
    batch to reach the next step's border.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        """Inside the block the signals are noted instead of ending this process; in its main thread only."""
        self._handlers = {number: signal.signal(number, self._note) for number in heeded()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
