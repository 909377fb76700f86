"""The other launcher (docs/cluster.md): DeepSpeed's own, on two nodes without ssh, trains what torchrun trains."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.cases import FINETUNE
from tests.train.ranks import Ranks
from train import rank
from train.compose import ROOT
from train.distributed import World
from train.run.folder import RunFolder
from train.start import environment

MakeRun = Callable[..., RunFolder]


def run_whole(world: World, folder: str) -> None:
    """A run on ranks that are there already; a job for `tests.train.ranks`."""
    run = RunFolder(Path(folder))
    rank.prepare_process(run.read_config())
    rank.run_rank(run.read_config(), run, world)


@pytest.mark.slow
def test_deepspeeds_launcher_without_ssh(make_run: MakeRun, pair: Ranks, tmp_path: Path) -> None:
    changes = {"engine": "deepspeed", "zero__stage": 2, "hardware__micro_batch": 1, "stage__max_steps": 4}
    run = make_run("other", FINETUNE, **changes, hardware__nodes=2, hardware__ranks=1)
    (tmp_path / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [Path(sys.executable).with_name("deepspeed"), f"--hostfile={tmp_path}/hostfile", "--no_ssh",
             f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}", "--no_local_rank", "--module",
             "train.rank", run.path],
            cwd=ROOT, env=environment(run.read_config(), os.environ), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    try:
        for node in nodes:
            said, _ = node.communicate(timeout=600)
            assert node.returncode == 0, said
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)  # its launcher would leave the ranks behind
    assert run.done.exists()
    alone = make_run("alone", FINETUNE, **changes, hardware__ranks=2)
    pair.run(run_whole, folder=str(alone.path))
    losses = [[json.loads(line)["loss"] for line in of.metrics.read_text().splitlines()] for of in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
