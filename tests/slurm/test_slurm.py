"""launch/slurm.sbatch and a sweep, submitted as users submit them, to a Slurm cluster of two nodes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.slurm.cluster import DEVICES, Cluster, missing
from tests.train.tiny_world import write_world
from train.compose import ROOT
from train.run.folder import RunFolder
from train.sweep.trial import State, TrialFolder

pytestmark = pytest.mark.slurm

SECONDS = 600
"""Longest wait for anything; a start of two nodes takes most of it, where the machine does other things."""
SHORT = ["hardware.micro_batch=1", "stage.global_batch=4", "stage.epochs=null", "stage.max_steps=60"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        Path(name).chmod(0o755)  # munge runs as a user of its own
        made = Cluster(Path(name))
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture
def world(tmp_path: Path, tiny_backbones: Path) -> list[str]:
    return write_world(tmp_path, tiny_backbones)


def until(what: str, holds: Callable[[], bool], log: Path) -> None:
    """Returns when something holds."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        said = log.read_text()[-4000:] if log.is_file() else "nothing"
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}; the job says:\n{said}"
        time.sleep(0.2)


class Job:
    """A run submitted by launch/slurm.sbatch."""

    def __init__(self, cluster: Cluster, folder: RunFolder, words: Sequence[str]) -> None:
        self.cluster, self.folder = cluster, folder
        self.log = cluster.folder / "log" / f"{folder.path.name}.out"
        options = [f"--gpus-per-node={len(DEVICES)}", "--time=30", f"--output={self.log}", "--parsable"]
        self.id = cluster.run(
            "sbatch", *options, "launch/slurm.sbatch", *words, f"run={folder.path.name}", "hardware.nodes=2",
            "hardware.ranks=1", PYTHON=sys.executable,
        ).strip()  # fmt: skip

    def steps(self) -> list[int]:
        file = self.folder.metrics
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.is_file() else []

    def wait_for_steps(self, more: int) -> None:
        """Returns when so many steps more have been taken than now."""
        wanted = len(self.steps()) + more
        until(f"step {wanted}", lambda: len(self.steps()) >= wanted, self.log)

    def wait_for(self, **facts: str) -> None:
        """Returns when Slurm says these of the job."""
        until(str(facts), lambda: facts.items() <= self.cluster.facts(self.id).items(), self.log)


def test_a_job_that_is_signalled_and_preempted_goes_on_until_it_is_done(
    cluster: Cluster, world: list[str], tmp_path: Path
) -> None:
    words = [*world, *SHORT]
    job = Job(cluster, RunFolder(tmp_path / "checkpoints" / "wide"), words)
    job.wait_for_steps(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # as Slurm does before the time is over
    job.wait_for(Restarts="1")
    signalled = len(job.steps())
    assert job.folder.interrupted.read_text() == f"stopped by SIGUSR1 after step {signalled}\n"

    job.wait_for_steps(3)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1", "--parsable"]
    other = cluster.run("sbatch", *urgent).strip()
    job.wait_for(Restarts="2")
    preempted = len(job.steps())
    assert job.folder.interrupted.read_text() == f"stopped by SIGTERM after step {preempted}\n"
    until("the urgent job", lambda: cluster.facts(other)["JobState"] == "COMPLETED", job.log)

    job.wait_for(JobState="COMPLETED", ExitCode="0:0", Restarts="2")
    assert job.folder.done.exists()
    assert job.steps() == list(range(1, 61)), "no step is lost, and none is taken twice"
    said = job.log.read_text()
    for step in (signalled, preempted):
        assert f"resumed from {job.folder.state}/step-{step:08d} after step {step}" in said
    assert "node 0 of 2: 10.78.0.11 on eth0" in said
    assert "node 1 of 2: 10.78.0.12 on eth0" in said

    alone = RunFolder(tmp_path / "checkpoints" / "alone")
    subprocess.run(
        [sys.executable, "-m", "train", "run", *words, "run=alone", "hardware.ranks=2"], cwd=ROOT, check=True,
        capture_output=True,
    )  # fmt: skip
    losses = [
        [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()] for run in (job.folder, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_job_that_is_cancelled_saves_and_stays_away(cluster: Cluster, world: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "checkpoints" / "cancelled")
    job = Job(cluster, folder, [*world, *SHORT])
    job.wait_for_steps(3)
    cluster.run("scancel", job.id)
    job.wait_for(JobState="CANCELLED", Restarts="0")
    taken = job.steps()
    assert folder.interrupted.exists()
    assert "not queued again, ended with 75: the job was cancelled" in job.log.read_text()
    again = Job(cluster, folder, [*world, *SHORT])
    again.wait_for(JobState="COMPLETED", ExitCode="0:0")
    assert f"after step {taken[-1]}" in again.log.read_text()
    assert again.steps() == list(range(1, 61))


def test_a_mistake_is_not_tried_again(cluster: Cluster, world: list[str], tmp_path: Path) -> None:
    job = Job(cluster, RunFolder(tmp_path / "checkpoints" / "mistaken"), [*world, *SHORT, "stage.global_batch=3"])
    job.wait_for(JobState="FAILED", ExitCode="2:0", Restarts="0")
    assert "error: stage.global_batch cannot be dealt evenly" in job.log.read_text()


def test_a_sweep_is_a_job_array_and_is_submitted_once(cluster: Cluster, world: list[str], tmp_path: Path) -> None:
    words = [
        "sweep=miniworld_smoke", "name=tiny", "overrides=[]", "~evals", "~grids", "executor=slurm", "slurm.hours=1",
        "slurm.cpus_per_rank=1", *[word for word in world if not word.startswith("stage=")], "engine=plain",
        "hardware.ranks=1", "stage.epochs=null", "stage.global_batch=2", "stage.max_steps=2",
        "finetune:stage.trains.connector.lr=1e-4,2e-4",
    ]  # fmt: skip
    sweep = [sys.executable, "-m", "train", "sweep", *words]
    busy = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3600", "--parsable"]
    blocker = cluster.run("sbatch", *busy).strip()
    until("the blocker", lambda: cluster.facts(blocker)["JobState"] == "RUNNING", Path())

    said = cluster.run(*sweep)
    tasks = said.partition("submitted: ")[2].splitlines()[0].split(", ")
    assert len(tasks) == 3, "a stage 1 and two trials that start from it"
    again = cluster.run(*sweep)
    assert "submitted: nothing\n" in again
    assert f"in the queue already: {', '.join(tasks)}\n" in again
    assert "0 of these would run, 3 are in Slurm's queue" in cluster.run(*sweep, "dry_run=true")
    queue = cluster.run("squeue", "--noheader", "--array", "--format=%i").split()
    assert sorted(queue) == sorted([*tasks, blocker])

    cluster.run("scancel", blocker)
    folder = tmp_path / "checkpoints" / "tiny"
    trials = [TrialFolder(path.parent) for path in folder.glob("*/*/trial.json")]
    ended = (State.done, State.failed, State.interrupted)
    until("all trials", lambda: all(trial.state() in ended for trial in trials), Path())
    assert [trial.state() for trial in trials] == [State.done] * 3, [trial.last_lines() for trial in trials]
    assert "submitted: nothing\n" in cluster.run(*sweep)
