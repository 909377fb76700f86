"""The Slurm executor: a job array of trials through submitit, behind an array of the stages 1 that they start from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from train.compose import ROOT
from train.sweep.config import SweepConfig
from train.sweep.trial import State, Trial, TrialFolder, execute


def submit(
    sweep: SweepConfig, folder: Path, trials: Mapping[Path, Trial], ranks: int, cluster: str = "slurm"
) -> list[Any]:
    """Submits every trial that is due; a trial whose stage 1 has not come to its end fails and says so.

    Args:
        ranks: of the widest run: cards of every array task.
        cluster: submitit's name of one; `local` and `debug` execute here.

    Returns:
        submitit's jobs, those of stages 1 first.

    Raises:
        UserError: submitit is not installed, or no Slurm is in reach.
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
    due = [path for path, trial in trials.items() if _is_due(TrialFolder(path).state(), sweep)]
    first = [path for path in due if path.parent.name == "shared"]
    second = [path for path in due if path not in first]
    try:
        executor = submitit.AutoExecutor(folder=folder / "slurm" / "%j", cluster=cluster)
    except RuntimeError as error:
        raise UserError(
            "there is no Slurm here", found=error, expected="sbatch on PATH",
            remedy="submit from a login node, or executor=local",
        ) from None  # fmt: skip
    jobs = _array(executor, first, sweep, ranks, {}, cluster)
    # Whatever becomes of the others, each trial looks for itself at the one that it needs.
    behind = (
        {"dependency": "afterany:" + ":".join(sorted({job.job_id.partition("_")[0] for job in jobs}))} if jobs else {}
    )
    return [*jobs, *_array(executor, second, sweep, ranks, behind, cluster)]


def _array(
    executor: Any, paths: Sequence[Path], sweep: SweepConfig, ranks: int, more: dict[str, str], cluster: str
) -> list[Any]:
    if not paths:
        return []
    executor.update_parameters(name=sweep.name, **(_parameters(sweep, ranks, more) if cluster == "slurm" else {}))
    jobs: list[Any] = executor.map_array(execute, [str(path) for path in paths])
    return jobs


def _parameters(sweep: SweepConfig, ranks: int, more: dict[str, str]) -> dict[str, Any]:
    slurm = sweep.slurm
    given = {
        "slurm_partition": slurm.partition, "slurm_account": slurm.account, "mem_gb": slurm.memory_gb,
        "slurm_array_parallelism": sweep.slots,
    }  # fmt: skip
    return {
        "nodes": 1, "tasks_per_node": 1, "gpus_per_node": ranks, "cpus_per_task": slurm.cpus_per_rank * ranks,
        "timeout_min": round(60 * slurm.hours), "slurm_additional_parameters": more,
        **{key: value for key, value in given.items() if value is not None},
    }  # fmt: skip


def _is_due(state: State, sweep: SweepConfig) -> bool:
    return state in (State.pending, State.interrupted) or (state is State.failed and sweep.retry_failed)
