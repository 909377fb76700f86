"""torchrun with an exit code and a line that say why it ended, and no restart of ranks that ended on purpose.

`python -m train.faults.agent` takes torchrun's own arguments, the last one a run folder. torchrun itself ends with 1
whatever its ranks ended with, so that a user's mistake (2), a halted run (3), a hang (4), an interruption (75) and a
crash could not be told apart.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import parse_args, run

from anchorformer.errors import UserError
from train.faults import interrupt
from train.faults.black_box import first_to_fail
from train.faults.watchdog import leave_later
from train.run import lock
from train.run.folder import RunFolder
from train.run.process import AGENT

ELASTIC = "torch.distributed.elastic"
ON_PURPOSE = (UserError.exit_code, 3, interrupt.EXIT_CODE)
"""How ranks end that have decided to: refused, halted, interrupted."""
AFTER_FAILURE = 30
"""Seconds that ranks get to end by themselves when another has failed: there is no step left that they could finish."""


def main(arguments: list[str]) -> int:
    """Runs this node's ranks to their end.

    Returns:
        0; what HALTED.json says, or 75 behind INTERRUPTED, where the ranks left one; else that of a rank that has ended
        on purpose; else that of the rank that failed first, or 128 + the signal that ended it or this process.
    """
    folder = RunFolder(Path(arguments[-1]))
    _hush(folder)
    codes: dict[int, int] = {}
    os.environ[AGENT] = str(os.getpid())
    launcher.LocalElasticAgent = partial(Agent, folder, codes)  # type: ignore[misc,assignment]
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return _explain(folder, {rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        code = _last_word(folder, codes)
        if code is not None:
            return code
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval.value
    except RendezvousError as error:
        code = _last_word(folder, codes)
        if code is not None:
            return code
        print(f"the nodes of this run have not come together: {_in_words(error)}", file=sys.stderr)
        return 1
    return 0


class Agent(LocalElasticAgent):
    """torchrun's agent, whose ranks may end on purpose, and which ends when nothing is left to be an agent of."""

    GRACE = 20
    """Seconds without a living rank after which an agent that has not noticed is taken for stuck."""
    REJOINING = 660
    """The same for one that waits for the other nodes to start ranks again: torchrun gives up after 600, unless the
    store does not answer."""

    def __init__(self, folder: RunFolder, codes: dict[int, int], *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._folder, self._codes = folder, codes
        threading.Thread(target=self._leave_if_stuck, name="stuck agent", daemon=True).start()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if _last_word(self._folder, codes) is not None:
                # They would only come to the same end again.
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                _explain(self._folder, codes)
                print(f"all ranks are started again; {self._remaining_restarts - 1} restart(s) left", file=sys.stderr)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # torchrun reads the variable from 2.12 on, and then after a failure as well.
        if isinstance(sys.exception(), SignalException):
            timeout = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", timeout))
            # A second signal (Slurm sends several, by several ways) would end this one's waiting and leave the ranks.
            for number in interrupt.heeded():
                signal.signal(number, signal.SIG_IGN)
        else:
            timeout = AFTER_FAILURE
        if self._pcontext:
            self._pcontext.close(death_sig, timeout)
            self._codes.update(self._exit_codes())
        super()._shutdown(death_sig)

    def _leave_if_stuck(self) -> None:
        """A node that is cut off waits for a store that it cannot reach any more, with its ranks long gone.

        This is a thread of its own, which asks nobody but the kernel: torchrun's does not come back from its question.
        """
        seconds, patience = 0, self._patience()
        while seconds < patience:
            time.sleep(1.0)
            codes, before, patience = self._exit_codes(), patience, self._patience()
            is_empty = len(codes) == len(self._worker_group.workers)
            seconds = seconds + 1 if is_empty and patience == before else 0
        print("this node's ranks have ended and its agent cannot reach the others: it leaves", file=sys.stderr)
        code = _exit_code(codes)
        leave_later(code)
        try:
            code = _explain(self._folder, codes)
        finally:
            # Whatever goes wrong with the explanation: the disk may be as far away as the others.
            os._exit(code)

    def _patience(self) -> int:
        state = self._worker_group.state
        is_to_notice = state is WorkerState.HEALTHY or (state is WorkerState.FAILED and not self._remaining_restarts)
        return self.GRACE if is_to_notice else self.REJOINING

    def _exit_codes(self) -> dict[int, int]:
        """Of those of this node's ranks that have ended."""
        handlers = self._pcontext.subprocess_handlers if isinstance(self._pcontext, SubprocessContext) else {}
        ranks = [worker.global_rank for worker in self._worker_group.workers]
        ended = {ranks[local]: handler.proc.poll() for local, handler in handlers.items()}
        return {rank: code for rank, code in ended.items() if code is not None}


def _last_word(folder: RunFolder, exit_codes: Mapping[int, int]) -> int | None:
    """The exit code that the ranks themselves have decided on; None where they have not.

    Args:
        exit_codes: of this node's ranks; where they end on purpose, what they leave may not be visible here yet.
    """
    if folder.halted.is_file():
        # One that lost its peers meanwhile may have ended first, with another code.
        return int(json.loads(folder.halted.read_text())["exit_code"])
    if folder.interrupted.is_file():
        return interrupt.EXIT_CODE
    return next((code for code in exit_codes.values() if code in ON_PURPOSE), None)


def _explain(folder: RunFolder, exit_codes: dict[int, int]) -> int:
    """Says who failed first, where the ranks have not said so themselves, and returns this node's exit code."""
    code = _last_word(folder, exit_codes)
    if code is not None:
        return code
    rank, line = first_to_fail(folder, exit_codes)
    print(f"first to fail: {line}\nmore in {folder.black_boxes} and {folder.log(rank).parent}", file=sys.stderr)
    return _exit_code({rank: exit_codes.get(rank, 0), **exit_codes})


def _exit_code(exit_codes: Mapping[int, int]) -> int:
    """The first that tells of a failure, as a shell reports it."""
    code = next((code for code in exit_codes.values() if code), 1)
    return code if code > 0 else 128 - code


def _in_words(error: RendezvousError) -> str:
    words = {
        RendezvousTimeoutError: "not all of them have come in time, or one has left",
        RendezvousClosedError: "one of them has ended it",
    }
    return words.get(type(error), f"{error.__cause__ or error}")


def _hush(folder: RunFolder) -> None:
    """Keeps torchrun's own account of the ranks' end to itself where they have left theirs."""

    def is_news(_: logging.LogRecord) -> bool:
        return _last_word(folder, {}) is None

    # A filter counts for its own logger only, not for those below it.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(ELASTIC)]:
        logging.getLogger(name).addFilter(is_news)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        # Taken by the launcher, whose process this one was before.
        lock.release(Path(sys.argv[-1]))
