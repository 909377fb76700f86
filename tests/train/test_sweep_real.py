"""A sweep of real runs from its command line: refused beside another, killed, taken up again, summed up."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.tiny_world import write_world
from train.compose import ROOT
from train.sweep.trial import State, TrialFolder


def launch(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train", "sweep", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep_of_two_stages_is_killed_and_taken_up_again(tmp_path: Path, tiny_backbones: Path) -> None:
    world = [word for word in write_world(tmp_path, tiny_backbones) if not word.startswith(("stage=", "selector.num"))]
    words = [
        "sweep=miniworld_smoke", "name=tiny", "overrides=[]", "~evals", "~grids", "slots=2",
        *world, "engine=plain", "hardware.ranks=1", "stage.epochs=null", "stage.global_batch=2", "stage.max_steps=2",
        "finetune:stage.trains.connector.lr=1e-4,2e-4,3e-4",
    ]  # fmt: skip
    folder = tmp_path / "checkpoints" / "tiny"
    first, second = launch(words), launch(words)
    deadline = time.monotonic() + 300
    while not list(folder.glob("trials/*/finetune/config.yaml")) and time.monotonic() < deadline:
        time.sleep(0.1)
    refused, winner = (first, second) if first.poll() is not None else (second, first)
    assert refused.wait(60) == 2, "one launch per sweep"
    assert "another launch holds" in refused.communicate()[0]
    winner.kill()
    winner.wait()
    trials = [TrialFolder(path.parent) for path in (folder / "trials").glob("*/trial.json")]
    while any(trial.is_held() for trial in trials) and deadline > time.monotonic():
        time.sleep(0.1)
    assert len(trials) == 3
    assert {trial.state() for trial in trials} <= {State.interrupted, State.pending, State.done}
    assert State.interrupted in {trial.state() for trial in trials}
    [shared] = (folder / "shared").glob("*/trial.json")
    before = shared.read_bytes()

    again = launch(words)
    told = again.communicate(timeout=300)[0]
    assert again.returncode == 0, told
    assert json.loads(shared.read_bytes())["started"] == json.loads(before)["started"], "stage 1 is not run twice"
    assert {trial.state() for trial in trials} == {State.done}
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [float(row["finetune:stage.trains.connector.lr"]) for row in rows] == [1e-4, 2e-4, 3e-4]
    assert {row["state"] for row in rows} == {"done"}
    for trial in trials:
        record = trial.read()
        assert record is not None
        assert (Path(record.runs["finetune"]) / "DONE").exists()
        steps = [json.loads(line)["step"] for line in (Path(record.runs["finetune"]) / "metrics.jsonl").open()]
        assert steps == [1, 2], "an interrupted run goes on where it was"
    definition = json.loads((folder / "sweep.json").read_text())
    assert {point["trial"] for point in definition["points"]} == {trial.path.name for trial in trials}
