"""Two nodes started by launch/multinode.sh: on one address, and on two, whose link can be cut."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import NETWORK, Launched, Nodes, ip, start_node, steps_saved
from tests.faults.planted import run_whole
from tests.train.cases import ALIGN, FINETUNE
from tests.train.conftest import launch_again
from tests.train.ranks import Ranks
from train.run.folder import RunFolder

pytestmark = pytest.mark.faults

MakeRun = Callable[..., RunFolder]
TWO_NODES: dict[str, Any] = {
    "engine": "deepspeed", "zero__stage": 2, "hardware__ranks": 1, "hardware__nodes": 2, "hardware__micro_batch": 1,
    "stage__max_steps": 40, "checkpoint__every": 4,
}  # fmt: skip
CLOSE = 1e-5
"""Relative: the sums over two nodes are rounded in another order than those on one."""


@pytest.fixture
def on_one_address(ended: Callable[[Launched], Launched]) -> Nodes:
    def start(run: RunFolder) -> list[Launched]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        here = {"HEAD_ADDR": "127.0.0.1", "HEAD_PORT": str(port), "NODE_ADDR": "127.0.0.1"}
        return [ended(start_node(run, node, **here)) for node in (0, 1)]

    return start


def losses(run: RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


def on_one_node(make_run: MakeRun, name: str, trains: dict[str, Any], **changes: Any) -> RunFolder:
    """The same run for two ranks of one node."""
    return make_run(name, trains, **{**changes, "hardware__nodes": 1, "hardware__ranks": 2, "zero__stage": 0})


@pytest.mark.parametrize("zero", [2, 3])
def test_two_nodes_train_both_stages(make_run: MakeRun, on_two_addresses: Nodes, pair: Ranks, zero: int) -> None:
    changes = {**TWO_NODES, "zero__stage": zero, "stage__max_steps": 5}
    before: list[RunFolder] = []
    for name, trains in (("align", ALIGN), ("finetune", FINETUNE)):
        run = make_run(f"wide {name}", trains, **changes)
        alone = on_one_node(make_run, f"alone {name}", trains, **changes)
        for folder, start in zip((run, alone), before, strict=bool(before)):
            (folder.path / "start.txt").write_text(f"{start.model}\n")
        for number, node in enumerate(on_two_addresses(run)):
            output = node.ends_with(0)
            assert f"node {number} of 2: {NETWORK}.1{number} on af{number}" in output
        pair.run(run_whole, folder=str(alone.path))
        assert run.done.exists()
        assert losses(run) == pytest.approx(losses(alone), rel=CLOSE)
        before = [run, alone]


@pytest.mark.loopback
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


def test_a_killed_rank_ends_both_nodes_and_the_same_command_goes_on(
    make_run: MakeRun, on_two_addresses: Nodes, pair: Ranks
) -> None:
    alone = on_one_node(make_run, "alone", FINETUNE, **TWO_NODES)
    pair.run(run_whole, folder=str(alone.path))
    run = make_run("killed", FINETUNE, **TWO_NODES)
    nodes = on_two_addresses(run)
    nodes[0].wait_for_step(6)
    os.kill(nodes[1].rank_pid(1), signal.SIGKILL)
    outputs = [node.process.communicate(timeout=120)[0] for node in nodes]
    codes = [node.process.returncode for node in nodes]
    its_node = codes.index(128 + signal.SIGKILL)  # which node rank 1 is on is decided when they meet
    assert codes[1 - its_node] not in (0, 75), outputs
    assert "first to fail: rank 1 was killed by SIGKILL" in outputs[its_node]
    assert nodes[0].processes() == []
    saved = steps_saved(run)[-1]
    launch_again(run, resume="auto")
    for node in on_two_addresses(run):
        output = node.ends_with(0)
        assert "Traceback" not in output
    assert f"step-{saved:08d} after step {saved}" in run.log(0).read_text()
    assert losses(run) == pytest.approx(losses(alone), rel=CLOSE)


def cut_off(namespace: str, run: RunFolder) -> float:
    """Takes the second node's link down; seconds until both ranks have left a black box, 60 at most."""
    ip("-n", namespace, "link", "set", "af1", "down")
    cut = time.monotonic()
    while len(list(run.black_boxes.glob("rank_*.json"))) < 2 and time.monotonic() - cut < 60:
        time.sleep(0.1)
    return time.monotonic() - cut


def test_a_cut_link_ends_both_nodes(make_run: MakeRun, on_two_addresses: Nodes, namespaces: list[str]) -> None:
    run = make_run("cut", FINETUNE, **TWO_NODES, watchdog__step_seconds=5.0, watchdog__startup_seconds=90.0)
    nodes = on_two_addresses(run)
    nodes[0].wait_for_step(6)
    cut = time.monotonic()
    noticed = cut_off(namespaces[1], run)
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


def test_a_cut_that_heals_costs_a_restart(
    make_run: MakeRun, on_two_addresses: Nodes, namespaces: list[str], pair: Ranks
) -> None:
    """With restarts left a node that is cut off waits for the others, and both go on when they are there again."""
    alone = on_one_node(make_run, "alone", FINETUNE, **TWO_NODES)
    pair.run(run_whole, folder=str(alone.path))
    run = make_run("healed", FINETUNE, **TWO_NODES, watchdog__step_seconds=5.0, watchdog__startup_seconds=90.0,
                   hardware__max_restarts=1)  # fmt: skip
    nodes = on_two_addresses(run)
    nodes[0].wait_for_step(6)
    cut_off(namespaces[1], run)
    ip("-n", namespaces[1], "link", "set", "af1", "up")
    outputs = [node.ends_with(0) for node in nodes]
    # On a node that hears of the other's restart before its own ranks have ended it costs none.
    assert any("all ranks are started again; 0 restart(s) left" in output for output in outputs)
    assert losses(run) == pytest.approx(losses(alone), rel=CLOSE)
