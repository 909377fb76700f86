"""What launch/slurm.sbatch makes of an attempt's end; Slurm's commands and the run itself are small scripts here.

On a cluster of two nodes it runs in tests/slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from train.compose import ROOT

PYTHON = """#!/bin/sh
echo "$@" >> "$HERE/calls"
mkdir -p "$HERE/run/state"
rm -f "$HERE/run/INTERRUPTED"
echo "a line of the log"
echo "$PREPARED"
"""
SRUN = """#!/bin/bash
echo "srun $* at $HEAD_ADDR:$HEAD_PORT as $JOB_ID, NODE_RANK=$NODE_RANK" >> "$HERE/calls"
trap 'touch "$HERE/run/INTERRUPTED"; exit 75' USR1
trap 'exit 15' TERM
touch "$HERE/stepping"
eval "$STEP"
"""
SCONTROL = """#!/bin/sh
case $1 in
    show) [ "$2" = hostnames ] && printf 'node7\\nnode8\\n' || echo "JobId=41 PreemptTime=$PREEMPTED" ;;
    requeue) echo "requeue $2" >> "$HERE/calls"; kill $PPID ;;
esac
"""
WAIT = "while :; do sleep 0.05; done"


def attempt(
    here: Path, step: str = "true", prepared: str = "", preempted: str = "None", number: signal.Signals | None = None
) -> tuple[int, list[str], str]:
    """One attempt's exit code, the commands it has given, and what it says.

    Args:
        step: what the job's step does, as a line of bash.
        prepared: last line of the preparation.
        number: signal that the batch shell gets while the step runs.
    """
    tools = here / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "HERE": str(here),
        "PREPARED": prepared or f"prepared {here}/run abc", "STEP": step, "PREEMPTED": preempted, "NODE_RANK": "5",
        "SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    environment.pop("HEAD_ADDR", None)
    copy = here / "slurm_script"  # Slurm runs a copy, from its spool
    copy.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
    process = subprocess.Popen(
        ["bash", copy, "stage=align", "run=wide"], env=environment, text=True, cwd=here, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    if number is not None:
        deadline = time.monotonic() + 30
        while not (here / "stepping").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    return process.returncode, (here / "calls").read_text().splitlines(), said


def test_a_job_starts_one_task_on_each_node(tmp_path: Path) -> None:
    code, calls, said = attempt(tmp_path, step='mkdir "$HERE/run/state/step-00000009"; touch "$HERE/run/DONE"')
    assert code == 0, said
    assert calls == [
        "-m train prepare resume=auto stage=align run=wide",
        f"srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none launch/multinode.sh {tmp_path}/run abc "
        "at node7:20041 as 41.2, NODE_RANK=",
    ]


def test_what_is_done_is_not_started_again(tmp_path: Path) -> None:
    code, calls, _ = attempt(tmp_path, prepared="done checkpoints/wide")
    assert (code, len(calls)) == (0, 1)


@pytest.mark.parametrize(
    ("step", "preempted", "is_queued", "code"),
    [
        ('touch "$HERE/run/INTERRUPTED"; exit 75', "None", True, -signal.SIGTERM),
        ('mkdir "$HERE/run/state/step-00000007"; exit 137', "None", True, -signal.SIGTERM),
        ("exit 137", "None", False, 137),
        ("exit 138", "2026-11-29T21:07:28", True, -signal.SIGTERM),
        ("exit 2", "None", False, 2),
        ('touch "$HERE/run/HALTED.json" "$HERE/run/INTERRUPTED"; exit 3', "None", False, 3),
    ],
    ids=["interrupted", "killed, and further than before", "killed, and no further", "preempted while it loads",
         "a mistake", "halted"],
)  # fmt: skip
def test_a_job_is_queued_again_where_that_leads_on(
    tmp_path: Path, step: str, preempted: str, is_queued: bool, code: int
) -> None:
    found, calls, said = attempt(tmp_path, step=step, preempted=preempted)
    assert (found, "requeue 41" in calls) == (code, is_queued), said
    assert ("not queued again, ended with" in said) is not is_queued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_step_and_only_a_cancelled_job_stays_away(tmp_path: Path, number: signal.Signals) -> None:
    code, calls, said = attempt(tmp_path, step=WAIT, number=number)
    assert (tmp_path / "run" / "INTERRUPTED").exists(), "TERM itself would have been the end of srun"
    assert ("requeue 41" in calls) is (number is signal.SIGUSR1)
    assert code == (-signal.SIGTERM if number is signal.SIGUSR1 else 75)
    assert ("the job was cancelled" in said) is (number is signal.SIGTERM)
