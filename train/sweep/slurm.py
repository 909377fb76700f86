"""The Slurm executor: a job array of trials through submitit, behind the stages 1 that they start from; each once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from train.compose import ROOT
from train.run.folder import write_atomically
from train.sweep.config import SweepConfig
from train.sweep.trial import State, Trial, TrialFolder, execute

JOB = "JOB"
"""In a trial's folder: Slurm's id of the array task that executes it, or is to."""
SECONDS_TO_SAVE = 300
"""Before its time is over a trial is told to stop; it has to cover what is left of a step, and a save."""


def queued(paths: Iterable[Path]) -> dict[Path, str]:
    """The trials that were submitted and that Slurm has not done with, waiting or running, and their array tasks.

    Raises:
        UserError: Slurm does not answer.
    """
    jobs = {path: (path / JOB).read_text().strip() for path in paths if (path / JOB).is_file()}
    known = _tasks_in_queue() if jobs else set()
    return {path: job for path, job in jobs.items() if job in known}


def _tasks_in_queue() -> set[str]:
    # Of all jobs and not of these: squeue takes the number of one that it has forgotten for a mistake.
    command = ["squeue", "--noheader", "--me", "--array", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "")).strip() or str(error)
        raise UserError(
            "Slurm does not say which trials are still in its queue", found=said,
            expected=f"an answer of `{' '.join(command)}`",
            remedy="try again where squeue answers: what is in the queue must not be submitted twice",
        ) from None  # fmt: skip
    return set(done.stdout.split())


def submit(
    sweep: SweepConfig, folder: Path, trials: Mapping[Path, Trial], ranks: int, cards: int, cluster: str = "slurm"
) -> list[Any]:
    """Submits every trial that is due and not in the queue; one whose stage 1 has not come to its end fails.

    Args:
        ranks: of the widest run.
        cards: that it needs; 0 on CPU.
        cluster: submitit's name of one; `local` and `debug` execute here.

    Returns:
        submitit's jobs, those of stages 1 first.

    Raises:
        UserError: submitit is not installed, no Slurm is in reach, or it does not say what is in its queue.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "executor=slurm needs submitit", found="no module submitit", expected="the extra `slurm`",
            remedy="pip install -e '.[train,slurm]', or executor=local",
        ) from None  # fmt: skip
    # Array tasks import this repository, wherever their interpreter starts.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    waiting = queued(trials) if cluster == "slurm" else {}
    due = [path for path in trials if path not in waiting and _is_due(TrialFolder(path).state(), sweep)]
    first = [path for path in due if path.parent.name == "shared"]
    second = [path for path in due if path not in first]
    try:
        executor = submitit.AutoExecutor(folder=folder / "slurm" / "%j", cluster=cluster)
    except RuntimeError as error:
        raise UserError(
            "there is no Slurm here", found=error, expected="sbatch on PATH",
            remedy="submit from a login node, or executor=local",
        ) from None  # fmt: skip
    parameters = _parameters(sweep, ranks, cards) if cluster == "slurm" else {}
    jobs = _array(executor, first, sweep, parameters)
    # Whatever becomes of the others, each trial looks for itself at the one that it needs.
    needed = [job.job_id for job in jobs]
    needed += [job for path, job in waiting.items() if any(trials[behind].needs == str(path) for behind in second)]
    if parameters and needed:
        arrays = sorted({job.partition("_")[0] for job in needed})
        parameters["slurm_additional_parameters"] = {"dependency": "afterany:" + ":".join(arrays)}
    return [*jobs, *_array(executor, second, sweep, parameters)]


def _array(executor: Any, paths: Sequence[Path], sweep: SweepConfig, parameters: Mapping[str, Any]) -> list[Any]:
    if not paths:
        return []
    executor.update_parameters(name=sweep.name, **parameters)
    jobs: list[Any] = executor.map_array(execute, [str(path) for path in paths])
    for path, job in zip(paths, jobs, strict=True):
        write_atomically(path / JOB, f"{job.job_id}\n")
    return jobs


def _parameters(sweep: SweepConfig, ranks: int, cards: int) -> dict[str, Any]:
    slurm = sweep.slurm
    given = {
        "slurm_partition": slurm.partition, "slurm_account": slurm.account, "mem_gb": slurm.memory_gb,
        "slurm_array_parallelism": sweep.slots, "gpus_per_node": cards or None,
    }  # fmt: skip
    return {
        "nodes": 1, "tasks_per_node": 1, "cpus_per_task": slurm.cpus_per_rank * ranks,
        "timeout_min": round(60 * slurm.hours), "slurm_signal_delay_s": SECONDS_TO_SAVE,
        "slurm_additional_parameters": {},
        **{key: value for key, value in given.items() if value is not None},
    }  # fmt: skip


def _is_due(state: State, sweep: SweepConfig) -> bool:
    return state in (State.pending, State.interrupted) or (state is State.failed and sweep.retry_failed)
