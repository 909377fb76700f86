"""A signal stops all ranks before the same step, behind a checkpoint; the same command goes on exactly there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import distributed_c10d

from tests.train.cases import ALIGN, FINETUNE
from tests.train.ranks import Ranks
from train import distributed, rank, trainer
from train.checkpoint import damage
from train.compose import ROOT
from train.distributed import World, alone
from train.faults.interrupt import SIGNALS, Interrupted, StopRequest, heeded
from train.faults.progress import Phase, Progress
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]
SHARDED: dict[str, Any] = {
    "engine": "deepspeed", "zero__stage": 2, "hardware__ranks": 2, "hardware__micro_batch": 1, "stage__max_steps": 8,
    "checkpoint__every": 3,
}  # fmt: skip


def go(world: World, folder: str, signalled: int = -1, at_step: int = 0) -> str:
    """Runs a prepared folder; in the middle of a step one rank is signalled twice, as by torchrun and by Slurm."""
    run = RunFolder(Path(folder))
    config = run.read_config()
    rank.prepare_process(config)
    check = trainer.check_numbers

    def planted(step: int, *rest: Any) -> None:
        if step == at_step and world.rank == signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        check(step, *rest)

    trainer.check_numbers = planted  # type: ignore[assignment]
    try:
        with StopRequest() as stop:
            rank.run_rank(config, run, world, stop=stop)
    except Interrupted as interruption:
        return str(interruption)
    finally:
        trainer.check_numbers = check
    return "ran to its end"


def record(folder: RunFolder) -> list[dict[str, Any]]:
    return [{**json.loads(line), "time": None} for line in folder.metrics.read_text().splitlines()]


def test_a_signal_to_one_rank_stops_all_and_loses_nothing(pair: Ranks, make_run: MakeRun) -> None:
    whole = make_run("whole", FINETUNE, **SHARDED)
    broken = make_run("broken", FINETUNE, **SHARDED, resume="auto")
    assert pair.run(go, folder=str(whole.path)) == ["ran to its end"] * 2
    told = pair.run(go, folder=str(broken.path), signalled=1, at_step=5)
    assert told == ["stopped by SIGUSR1 after step 5"] * 2
    assert broken.interrupted.read_text() == "stopped by SIGUSR1 after step 5\n"
    assert not broken.done.exists()
    assert len(record(broken)) == 5
    newest = max(broken.state.glob("step-*"))
    assert newest.name == "step-00000005"
    assert damage(newest, alone()) is None
    pair.run(go, folder=str(broken.path))
    assert record(broken) == record(whole), "the step that was fetched and not taken comes again"
    assert broken.done.exists()


def test_a_checkpoint_that_is_there_is_not_written_again(make_run: MakeRun) -> None:
    run = make_run("saved", ALIGN, checkpoint__every=2)
    assert go(alone(), str(run.path), signalled=0, at_step=2) == "stopped by SIGUSR1 after step 2"
    assert [path.name for path in run.state.glob("step-*")] == ["step-00000002"]


def test_ranks_that_are_started_again_go_on_where_they_saved(make_run: MakeRun) -> None:
    """torchrun starts the same command again, in which resume=never still stands."""
    run = make_run("again", ALIGN, stage__max_steps=5, checkpoint__every=2)
    assert run.read_config().resume == "never"
    assert rank.resume_from(run.read_config(), run, alone()) == "never"
    go(alone(), str(run.path), signalled=0, at_step=3)
    assert rank.resume_from(run.read_config(), run, alone()) == "auto"
    go(alone(), str(run.path))
    assert [line["step"] for line in record(run)] == [1, 2, 3, 4, 5]
    # A new launch counts itself, and its word counts again, until it has saved: whatever the clocks of two hosts say.
    back = replace(run.read_config(), resume=str(run.state / "step-00000002"))
    assert rank.resume_from(back, run, alone()) == "auto"
    run.environment.write_text('{"before": [{}]}')
    for path in run.state.glob("step-*/*"):
        os.utime(path, (2e9, 2e9))
    assert rank.resume_from(back, run, alone()) == back.resume


def test_signals_are_noted_inside_the_block_only() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert stop.signal == ""
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert stop.signal == SIGNALS[0].name, "the first one counts"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == ""
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == "SIGTERM"
        assert signal.SIGHUP not in heeded()
        assert {signal.SIGTERM, signal.SIGINT} < set(heeded())
    finally:
        signal.signal(signal.SIGHUP, before)


def timeouts(world: World, folder: str) -> list[list[float]]:
    """Seconds that every process group waits at most, before and after they are bounded."""

    def now() -> list[float]:
        backends = [group._get_backend(world.device) for group in distributed_c10d._world.pg_map]
        return [backend.options._timeout.total_seconds() for backend in backends]

    config = RunFolder(Path(folder)).read_config()
    rank.prepare_process(config)
    rank.run_rank(config, RunFolder(Path(folder)), world)
    ran = now()
    distributed.bound_waits(timedelta(seconds=77))
    return [ran, now()]


def test_every_process_group_has_the_timeout(pair: Ranks, make_run: MakeRun) -> None:
    """Those that DeepSpeed makes for ZeRO too, which its own `timeout` does not reach."""
    run = make_run("groups", ALIGN, **{**SHARDED, "stage__max_steps": 1})
    config = yaml.safe_load(run.config.read_text())
    config["watchdog"] |= {"startup_seconds": 80, "step_seconds": 40}
    run.config.write_text(yaml.safe_dump(config))
    for ran, bounded in pair.run(timeouts, folder=str(run.path)):
        assert len(ran) > 2, "the world's group, the control group, and ZeRO's"
        assert set(ran) == {120.0}
        assert set(bounded) == {77.0}


def test_phases_tell_the_first_step_from_the_others() -> None:
    progress = Progress()
    progress.enter(Phase.data, step=4)
    assert not progress.place.is_warm
    progress.enter(Phase.exchange, samples=("a",))
    progress.enter(Phase.compute)
    assert (progress.place.step, progress.place.samples, progress.place.is_warm) == (4, ("a",), False)
    progress.enter(Phase.data, step=5)
    assert (progress.place.step, progress.place.samples, progress.place.is_warm) == (5, ("a",), True)
    progress.enter(Phase.save)
    assert progress.place.is_warm


SAVING = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
trap 'sleep 0.3; exit 75' HUP TERM USR1
touch "$CALLS.ready"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_a_script_is_one_to_its_run(tmp_path: Path, number: signal.Signals) -> None:
    """And what would come behind an interrupted stage is not started.

    A shell cannot trap what it was started to ignore, as a job in the background ignores INT and one under nohup HUP.
    """
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(SAVING)
    python.chmod(0o755)
    script = subprocess.Popen(
        [ROOT / "launch" / "two_stage.sh", "demo"], env={**os.environ, "PYTHON": str(python), "CALLS": str(calls)},
        stdout=subprocess.DEVNULL, preexec_fn=partial(signal.signal, number, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not calls.with_suffix(".ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    script.send_signal(number)
    assert script.wait(20) == 75
    [call] = calls.read_text().splitlines()
    assert "stage=align" in call
