"""Fixtures of the fault suite: run folders as the training tests make them, and real ranks under the real agent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.conftest import make_run, pair, tiny_data  # noqa: F401 (fixtures)
from train.checkpoint import damage
from train.compose import ROOT
from train.distributed import alone
from train.run.folder import RunFolder
from train.start import Topology, command, environment

PLANTED = Path(__file__).with_name("planted.py")


@dataclass
class Launched:
    """A run under its agent, as `python -m train` would have started it, with a fault in one of its ranks."""

    folder: RunFolder
    process: subprocess.Popen[str]

    def ends_with(self, code: int, seconds: float = 240) -> str:
        """Everything that its processes have said, once it has ended with this exit code."""
        output, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == code, output
        return output

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        """Returns when the step's line has been written."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.folder.metrics.is_file() and len(self.folder.metrics.read_text().splitlines()) >= step:
                return
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(f"no step {step}:\n{self.process.communicate()[0]}")

    def rank_pid(self, rank: int) -> int:
        """The process of a rank that runs."""
        report = json.loads((self.folder.black_boxes / f"now_{rank}.json").read_text())
        return int(report["pid"])

    def processes(self) -> list[int]:
        """Every process that has the run's folder on its command line."""
        name = str(self.folder.path).encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue  # gone since it was listed
            if name in words:
                found.append(int(path.parent.name))
        return found


Launch = Callable[..., Launched]


def steps_saved(folder: RunFolder) -> list[int]:
    """Steps of the checkpoints that are there, each of them complete."""
    found = sorted(folder.state.glob("step-*"))
    assert [damage(path, alone()) for path in found] == [None] * len(found)
    return [int(path.name.removeprefix("step-")) for path in found]


@pytest.fixture
def ended() -> Iterator[Callable[[Launched], Launched]]:
    """Takes what a test has launched, and proves at its end that no process of it is left."""
    all_launched: list[Launched] = []

    def add(launched: Launched) -> Launched:
        all_launched.append(launched)
        return launched

    yield add
    for launched in all_launched:
        if launched.process.poll() is None:
            launched.process.kill()
            launched.process.wait()
    left: set[int] = set()
    deadline = time.monotonic() + 10
    while (left := {pid for launched in all_launched for pid in launched.processes()}) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "a rank or one of its helpers has outlived its agent"


@pytest.fixture
def launch(ended: Callable[[Launched], Launched]) -> Launch:
    """`launch(folder, fault, rank, step)` starts a run's ranks on this machine, under the real agent.

    `program` takes the place of a rank and of its fault.
    """

    def start(
        folder: RunFolder, fault: str = "none", rank: int = 1, step: int = 0, program: Sequence[str] | None = None
    ) -> Launched:
        config = folder.read_config()
        argv = command(folder.path, config, Topology())
        where = argv.index("train.rank")
        argv[where - 1 : where + 1] = program or [str(PLANTED), fault, str(rank), str(step)]
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment(config, os.environ), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        return ended(Launched(folder, process))

    return start
