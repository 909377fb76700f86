"""Sweeps through submitit, on this machine: submitit's own local executor takes the place of a cluster."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchorformer.errors import UserError
from anchorformer.schema import parse
from tests.train.fake_trials import add, python, say
from train.sweep import slurm
from train.sweep.config import SweepConfig
from train.sweep.trial import State, Trial, TrialFolder

pytest.importorskip("submitit", reason="the extra `slurm` is not installed")


def sweep(**values: object) -> SweepConfig:
    return parse(SweepConfig, {"name": "test", "grids": {"a": [{}]}, **values}, "test")


def trials(*paths: Path) -> dict[Path, Trial]:
    read = {path: TrialFolder(path).read() for path in paths}
    return {path: trial for path, trial in read.items() if trial is not None}


def states(*paths: Path) -> list[State]:
    return [TrialFolder(path).state() for path in paths]


@pytest.mark.slow
def test_an_array_executes_what_is_due(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    shared = add(tmp_path, "shared/start", say(ran, "start"))
    broken = add(tmp_path, "shared/broken", python("planted", "import sys; sys.exit(3)"))
    behind, other = (
        add(tmp_path, f"trials/{name}", say(ran, name), needs=start) for name, start in (("a", shared), ("b", broken))
    )
    done = add(tmp_path, "trials/done", say(ran, "never"))
    TrialFolder(done).note(state=State.done)
    everything = trials(shared, broken, behind, other, done)
    # `local` knows no dependencies: the trials are submitted when what they start from has ended.
    first = slurm.submit(sweep(), tmp_path, trials(shared, broken), 1, 0, "local")
    assert [job.result() for job in first] == [0, 3]
    second = slurm.submit(sweep(), tmp_path, everything, 1, 0, "local")
    assert [job.result() for job in second] == [0, 1], "what has failed is not submitted again"
    assert states(*everything) == [State.done, State.failed, State.done, State.failed, State.done]
    assert ran.read_text().split() == ["start", "a"]
    record = TrialFolder(other).read()
    assert record is not None
    assert record.reason == f"what it starts from is not done: {broken}"
    assert slurm.submit(sweep(), tmp_path, trials(shared, done), 1, 0, "local") == []


class Cluster:
    """Takes the place of submitit's executor and of squeue: notes what it is given, and has it in its queue."""

    calls: list[Any]
    tasks: set[str]
    arrays = 76

    def __init__(self, folder: Path, cluster: str) -> None:
        Cluster.calls = []

    def update_parameters(self, **values: Any) -> None:
        self.calls.append(values)

    def map_array(self, function: Any, folders: list[str]) -> list[Any]:
        self.calls.append([Path(folder).name for folder in folders])
        Cluster.arrays += 1
        jobs = [SimpleNamespace(job_id=f"{Cluster.arrays}_{place}") for place, _ in enumerate(folders)]
        Cluster.tasks |= {job.job_id for job in jobs}
        return jobs


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> type[Cluster]:
    """One whose first array is 77."""
    Cluster.arrays, Cluster.tasks = 76, set()
    monkeypatch.setattr("submitit.AutoExecutor", Cluster)
    monkeypatch.setattr(slurm, "_tasks_in_queue", lambda: Cluster.tasks)
    return Cluster


def test_trials_wait_for_the_array_of_their_stages_1(tmp_path: Path, cluster: type[Cluster]) -> None:
    shared = add(tmp_path, "shared/start", say(tmp_path / "ran", "start"))
    trial = add(tmp_path, "trials/one", say(tmp_path / "ran", "one"), needs=shared)
    config = sweep(slots=3, slurm={"hours": 1.5, "partition": "gpu", "cpus_per_rank": 4})
    assert len(slurm.submit(config, tmp_path, trials(shared, trial), 8, 8)) == 2
    asked, first, again, second = cluster.calls
    assert (first, second) == (["start"], ["one"])
    assert asked["slurm_additional_parameters"] == {}
    assert again["slurm_additional_parameters"] == {"dependency": "afterany:77"}
    assert (asked["gpus_per_node"], asked["cpus_per_task"], asked["timeout_min"]) == (8, 32, 90)
    assert (asked["slurm_partition"], asked["slurm_array_parallelism"]) == ("gpu", 3)
    assert "slurm_account" not in asked


def test_what_is_in_the_queue_is_not_submitted_again(tmp_path: Path, cluster: type[Cluster]) -> None:
    shared = add(tmp_path, "shared/start", say(tmp_path / "ran", "start"))
    one, two = (add(tmp_path, f"trials/{name}", say(tmp_path / "ran", name), needs=shared) for name in ("one", "two"))
    assert len(slurm.submit(sweep(), tmp_path, trials(shared, one), 1, 0)) == 2
    assert slurm.queued([shared, one, two]) == {shared: "77_0", one: "78_0"}
    assert slurm.submit(sweep(), tmp_path, trials(shared, one), 1, 0) == []

    [job] = slurm.submit(sweep(), tmp_path, trials(shared, one, two), 1, 0)
    asked, submitted = cluster.calls
    assert (submitted, job.job_id) == (["two"], "79_0")
    assert asked["slurm_additional_parameters"] == {"dependency": "afterany:77"}, "behind what it needs, in the queue"
    assert "gpus_per_node" not in asked, "on CPU"

    cluster.tasks = {"79_0"}  # the others have left it without an end: the cluster has lost them
    assert [job.job_id for job in slurm.submit(sweep(), tmp_path, trials(shared, one, two), 1, 0)] == ["80_0", "81_0"]


def test_a_queue_that_does_not_answer_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = add(tmp_path, "trials/one", say(tmp_path / "ran", "one"))
    assert slurm.queued([trial]) == {}, "what was never submitted is not asked about"
    (trial / slurm.JOB).write_text("77_0\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    (tools / "squeue").chmod(0o755)
    for path in (str(tools), ""):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(UserError, match="which trials are still in its queue"):
            slurm.queued([trial])


def test_without_a_cluster_it_says_so(tmp_path: Path) -> None:
    if shutil.which("sbatch"):
        pytest.skip("there is a Slurm here")
    with pytest.raises(UserError, match="there is no Slurm here"):
        slurm.submit(sweep(), tmp_path, {}, 1, 0)
