"""Both stages of the mini world on two nodes, as a user would start them: prepared once, then launch/multinode.sh."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import NETWORK, Nodes
from tests.products import launch
from train.compose import ROOT
from train.run.folder import RunFolder

pytestmark = pytest.mark.slow

STEPS = 20
CLOSE = 1e-6
"""Relative, of any step's loss: with as many threads each, two ranks round alike wherever they are."""
RECIPE = ["experiment=smoke", f"stage.max_steps={STEPS}", "hardware.threads=1"]


def python(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def losses(run: RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


@pytest.mark.parametrize("zero", [2, 3])
def test_two_nodes_train_the_mini_world(tmp_path: Path, on_two_addresses: Nodes, zero: int) -> None:
    python("miniworld", "--budget", "smoke", "--out", ".cache/miniworld")
    recipe = [*RECIPE, f"zero=zero{zero}", f"output_root={tmp_path}"]
    launch("two_stage.sh", "alone", *recipe, "hardware.ranks=2")
    for stage, start in (("align", []), ("finetune", [f"init_from={tmp_path}/nodes/align"])):
        said = python("train", "prepare", f"stage={stage}", f"run=nodes/{stage}", *recipe, "hardware.nodes=2",
                      "hardware.ranks=1", *start)  # fmt: skip
        run = RunFolder(Path(said.split()[-2]))
        for number, node in enumerate(on_two_addresses(run)):
            assert f"node {number} of 2: {NETWORK}.1{number} on af{number}" in node.ends_with(0)
        assert run.done.exists()
        found = losses(run)
        assert len(found) == STEPS
        assert sum(found[-5:]) < sum(found[:5])
        assert found == pytest.approx(losses(RunFolder(tmp_path / "alone" / stage)), rel=CLOSE)
