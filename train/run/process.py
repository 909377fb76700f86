"""Processes of this machine: whether one is still the one that it was, and that a child does not outlive its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

AGENT = "ANCHORFORMER_AGENT"
"""Variable in which torchrun's agent tells its ranks its process number."""
PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal that a process gets when its parent dies."""


ENDED = ("Z", "X")
"""States of a process that has ended and whose number nobody has asked for yet."""


def began(pid: int) -> str:
    """When a process of this machine began; empty where there is no such process.

    A process number is given again, the pair of number and begin is not.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").is_file():
        # The name in brackets may hold blanks; behind it the first field is the state, the 20th the begin.
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return "" if fields[0] in ENDED else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Has the kernel send this process a signal when `parent` dies, also where it has died already; Linux only.

    Args:
        parent: number of the process that has started this one, as that one has said it.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
