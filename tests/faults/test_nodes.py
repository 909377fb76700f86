"""Two nodes, each with an agent of its own: on one address, and as two network namespaces whose link can be cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.faults.conftest import Launched, steps_saved
from tests.faults.planted import run_whole
from tests.train.cases import FINETUNE
from tests.train.ranks import Ranks
from train.compose import ROOT
from train.run.folder import RunFolder

pytestmark = pytest.mark.faults

MakeRun = Callable[..., RunFolder]
Nodes = Callable[[RunFolder], list[Launched]]
TWO_NODES: dict[str, Any] = {
    "engine": "deepspeed", "zero__stage": 2, "hardware__ranks": 1, "hardware__nodes": 2, "hardware__micro_batch": 1,
    "stage__max_steps": 40, "checkpoint__every": 4,
}  # fmt: skip
NETWORK = "10.77.0"


def start_node(run: RunFolder, node: int, head: str, port: int, address: str, inside: Sequence[str] = ()) -> Launched:
    """A node's ranks, started as the user would: launch/multinode.sh RUN_FOLDER CONFIG_HASH."""
    variables = {
        "HEAD_ADDR": head, "HEAD_PORT": str(port), "NODE_RANK": str(node), "NODE_ADDR": address,
        "PYTHON": str(ROOT / ".venv" / "bin" / "python"), "GLOO_SOCKET_IFNAME": f"af{node}" if inside else "lo",
    }  # fmt: skip
    process = subprocess.Popen(
        [*inside, ROOT / "launch" / "multinode.sh", run.path, run.read_config().digest],
        env={**os.environ, **variables}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Launched(run, process)


@pytest.fixture
def on_one_address(ended: Callable[[Launched], Launched]) -> Nodes:
    def start(run: RunFolder) -> list[Launched]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [ended(start_node(run, node, "127.0.0.1", port, "127.0.0.1")) for node in (0, 1)]

    return start


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, joined by one link; `af0` and `af1` are its ends."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("two nodes on one machine are network namespaces, which take root and the ip command")
    names = [f"af{os.getpid()}n{node}" for node in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "af0", "netns", names[0], "type", "veth", "peer", "name", "af1", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{NETWORK}.1{node}/24", "dev", f"af{node}")
            ip("-n", name, "link", "set", f"af{node}", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.fixture
def on_two_addresses(namespaces: list[str], ended: Callable[[Launched], Launched]) -> Nodes:
    def start(run: RunFolder) -> list[Launched]:
        return [
            ended(start_node(run, node, f"{NETWORK}.10", 29400, f"{NETWORK}.1{node}", ["ip", "netns", "exec", name]))
            for node, name in enumerate(namespaces)
        ]

    return start


def losses(run: RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


@pytest.mark.parametrize("zero", [2, 3])
def test_two_nodes_train(make_run: MakeRun, on_two_addresses: Nodes, pair: Ranks, zero: int) -> None:
    changes = {**TWO_NODES, "zero__stage": zero, "stage__max_steps": 6}
    run = make_run("wide", FINETUNE, **changes)
    for node in on_two_addresses(run):
        node.ends_with(0)
    assert run.done.exists()
    alone = make_run("alone", FINETUNE, **{**changes, "hardware__nodes": 1, "hardware__ranks": 2, "zero__stage": 0})
    pair.run(run_whole, folder=str(alone.path))
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_one_agent_that_is_told_to_stop_stops_all(make_run: MakeRun, on_one_address: Nodes) -> None:
    run = make_run("one", FINETUNE, **TWO_NODES, hardware__max_restarts=2)
    nodes = on_one_address(run)
    nodes[0].wait_for_step(5)
    began = time.monotonic()
    nodes[1].process.send_signal(signal.SIGTERM)
    for node in nodes:
        assert "started again" not in node.ends_with(75)
    assert time.monotonic() - began < 60, "torchrun's exit barrier would take 300 seconds"
    assert run.interrupted.exists()
    assert steps_saved(run)[-1] == len(losses(run))


def test_a_cut_link_ends_both_nodes(make_run: MakeRun, on_two_addresses: Nodes, namespaces: list[str]) -> None:
    run = make_run("cut", FINETUNE, **{**TWO_NODES, "stage__max_steps": 10_000, "stage__epochs": None},
                   watchdog__step_seconds=5.0, watchdog__startup_seconds=90.0)  # fmt: skip
    nodes = on_two_addresses(run)
    nodes[0].wait_for_step(6)
    ip("-n", namespaces[1], "link", "set", "af1", "down")
    cut = time.monotonic()
    while len(list(run.black_boxes.glob("rank_*.json"))) < 2 and time.monotonic() - cut < 60:
        time.sleep(0.1)
    noticed = time.monotonic() - cut
    saved = steps_saved(run)
    outputs = [node.ends_with(4, seconds=120) for node in nodes]
    left = time.monotonic() - cut
    boxes = [json.loads(path.read_text()) for path in run.black_boxes.glob("rank_*.json")]
    assert [box["cause"] for box in boxes] == ["hung", "hung"]
    assert all("look at the network between them" in box["message"] for box in boxes)
    assert "its agent cannot reach the others: it leaves" in outputs[1], "by itself it would wait for ever"
    assert all(any("torch/distributed" in line for line in box["stacks"]) for box in boxes)
    assert noticed < 60
    assert left < 90, outputs
    assert steps_saved(run) == saved
