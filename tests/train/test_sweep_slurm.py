"""Sweeps through submitit, on this machine: submitit's own local executor takes the place of a cluster."""

from __future__ import annotations

import shutil
from pathlib import Path
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
    first = slurm.submit(sweep(), tmp_path, trials(shared, broken), 1, "local")
    assert [job.result() for job in first] == [0, 3]
    second = slurm.submit(sweep(), tmp_path, everything, 1, "local")
    assert [job.result() for job in second] == [0, 1], "what has failed is not submitted again"
    assert states(*everything) == [State.done, State.failed, State.done, State.failed, State.done]
    assert ran.read_text().split() == ["start", "a"]
    record = TrialFolder(other).read()
    assert record is not None
    assert record.reason == f"what it starts from is not done: {broken}"
    assert slurm.submit(sweep(), tmp_path, trials(shared, done), 1, "local") == []


class Job:
    job_id = "77_0"


class Cluster:
    """Takes the place of submitit's executor and notes what it is given."""

    calls: list[Any]

    def __init__(self, folder: Path, cluster: str) -> None:
        Cluster.calls = []

    def update_parameters(self, **values: Any) -> None:
        self.calls.append(values)

    def map_array(self, function: Any, folders: list[str]) -> list[Job]:
        self.calls.append([Path(folder).name for folder in folders])
        return [Job() for _ in folders]


def test_trials_wait_for_the_array_of_their_stages_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submitit.AutoExecutor", Cluster)
    shared = add(tmp_path, "shared/start", say(tmp_path / "ran", "start"))
    trial = add(tmp_path, "trials/one", say(tmp_path / "ran", "one"), needs=shared)
    config = sweep(slots=3, slurm={"hours": 1.5, "partition": "gpu", "cpus_per_rank": 4})
    assert len(slurm.submit(config, tmp_path, trials(shared, trial), 8)) == 2
    asked, first, again, second = Cluster.calls
    assert (first, second) == (["start"], ["one"])
    assert asked["slurm_additional_parameters"] == {}
    assert again["slurm_additional_parameters"] == {"dependency": "afterany:77"}
    assert (asked["gpus_per_node"], asked["cpus_per_task"], asked["timeout_min"]) == (8, 32, 90)
    assert (asked["slurm_partition"], asked["slurm_array_parallelism"]) == ("gpu", 3)
    assert "slurm_account" not in asked


def test_without_a_cluster_it_says_so(tmp_path: Path) -> None:
    if shutil.which("sbatch"):
        pytest.skip("there is a Slurm here")
    with pytest.raises(UserError, match="there is no Slurm here"):
        slurm.submit(sweep(), tmp_path, {}, 1)
