"""Processes of this machine: whether one is still the one that it was, and that a child does not outlive its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

AGENT = "ANCHORFORMER_AGENT"
"""Variable in which torchrun's agent tells its ranks its process number."""
AGENT_MODULE = "train.faults.agent"
"""What a process is that stands there, and is no other that has been given its number since."""
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


def orphans(folder: Path) -> list[int]:
    """Processes of ranks of a run folder on this machine whose agent is gone, their loaders among them; Linux only.

    A rank is known by the agent in its environment, which its loader's processes have from it, and by the folder on its
    command line; those of other users cannot be seen.
    """
    found = []
    for place in sorted(Path("/proc").glob("[0-9]*"), key=lambda place: int(place.name)):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            agents = [int(entry.partition(b"=")[2]) for entry in variables if entry.startswith(f"{AGENT}=".encode())]
            is_of_run = bool(agents) and _names(place, folder)
        except (OSError, ValueError):
            continue  # gone since it was listed, or another user's
        if is_of_run and not _is_agent(agents[0], folder) and began(int(place.name)):
            found.append(int(place.name))
    return found


def _is_agent(pid: int, folder: Path) -> bool:
    place = Path(f"/proc/{pid}")
    try:
        is_one = AGENT_MODULE.encode() in (place / "cmdline").read_bytes().split(b"\0") and _names(place, folder)
    except OSError:
        return False
    return is_one and bool(began(pid))


def _names(process: Path, folder: Path) -> bool:
    """Whether a folder is on a process' command line, however it is written there."""
    words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    where = os.readlink(process / "cwd")
    return os.path.realpath(folder) in (os.path.realpath(os.path.join(where, word)) for word in words if word)


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
