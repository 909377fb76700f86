"""Fixtures of the fault suite: run folders as training tests make them, real ranks under the real agent, two nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
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
NETWORK = "10.77.0"
HEAD = "head"
"""Host name of node 0. On itself it is loopback, as Debian writes it into /etc/hosts."""


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
Nodes = Callable[[RunFolder], list[Launched]]


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


def start_node(run: RunFolder, node: int, inside: Sequence[str] = (), **variables: str) -> Launched:
    """A node's ranks, started as the user would: launch/multinode.sh RUN_FOLDER CONFIG_HASH."""
    variables |= {"NODE_RANK": str(node), "PYTHON": sys.executable}
    process = subprocess.Popen(
        [*inside, ROOT / "launch" / "multinode.sh", run.path, run.read_config().digest],
        env={**os.environ, **variables}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Launched(run, process)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, joined by one link; `af0` and `af1` are its ends."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("two nodes on one machine are network namespaces, which take root and the ip command")
    names = [f"af{os.getpid()}n{node}" for node in (0, 1)]
    try:
        for name, head in zip(names, ("127.0.1.1", f"{NETWORK}.10"), strict=True):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            (Path("/etc/netns") / name).mkdir(parents=True)  # what is in there, `ip netns exec` puts into /etc
            (Path("/etc/netns") / name / "hosts").write_text(f"127.0.0.1 localhost\n{head} {HEAD}\n")
        ip("link", "add", "af0", "netns", names[0], "type", "veth", "peer", "name", "af1", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{NETWORK}.1{node}/24", "dev", f"af{node}")
            ip("-n", name, "link", "set", f"af{node}", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.fixture
def on_two_addresses(namespaces: list[str], ended: Callable[[Launched], Launched]) -> Nodes:
    def start(run: RunFolder) -> list[Launched]:
        return [
            ended(start_node(run, node, ["ip", "netns", "exec", name], HEAD_ADDR=HEAD))
            for node, name in enumerate(namespaces)
        ]

    return start
