"""Two ranks under the real agent, one of them killed, stopped, asleep, slow or wrong: who is named, what goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.faults.conftest import Launch, steps_saved
from tests.faults.planted import run_whole
from tests.train.cases import FINETUNE
from tests.train.ranks import Ranks
from train.compose import ROOT
from train.run import lock
from train.run.folder import RunFolder

pytestmark = pytest.mark.faults

MakeRun = Callable[..., RunFolder]
PAIR: dict[str, Any] = {
    "engine": "deepspeed", "zero__stage": 2, "hardware__ranks": 2, "hardware__micro_batch": 1, "stage__max_steps": 12,
    "checkpoint__every": 4,
}  # fmt: skip


def is_busy() -> bool:
    """Whether this machine does so much else that seconds prove nothing."""
    return os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)


def record(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's metrics without what depends on the clock."""
    return [{**json.loads(line), "time": None} for line in folder.metrics.read_text().splitlines()]


def box(folder: RunFolder, rank: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder.black_boxes / f"rank_{rank}.json").read_text())
    return content


@pytest.mark.loopback
def test_killed_and_started_again(make_run: MakeRun, launch: Launch, pair: Ranks) -> None:
    whole = make_run("whole", FINETUNE, **PAIR)
    pair.run(run_whole, folder=str(whole.path))
    run = make_run("killed", FINETUNE, **PAIR, hardware__max_restarts=1, profile="step:6-8")
    output = launch(run, "killed", rank=1, step=7).ends_with(0)
    assert "first to fail: rank 1 was killed by SIGKILL" in output
    assert all(run.trace(6, 8, number).is_file() for number in range(2)), (
        "the steps that are taken again are traced again"
    )
    assert "all ranks are started again; 0 restart(s) left" in output
    assert "step-00000004 after step 4" in output
    assert run.done.exists()
    assert record(run) == record(whole)
    files = sorted(path.name for path in whole.model.glob("*.safetensors"))
    assert [(run.model / name).read_bytes() for name in files] == [(whole.model / name).read_bytes() for name in files]


@pytest.mark.loopback
def test_killed_without_restarts(make_run: MakeRun, launch: Launch) -> None:
    run = make_run("killed", FINETUNE, **PAIR)
    started = launch(run, "killed", rank=1, step=7)
    started.wait_for_step(6)
    began = time.monotonic()
    output = started.ends_with(128 + signal.SIGKILL)
    assert time.monotonic() - began < (60 if is_busy() else 10)
    assert "first to fail: rank 1 was killed by SIGKILL" in output
    assert "last seen as rank 1 " in output
    assert box(run, 0)["cause"] == "lost its peers"
    assert box(run, 0)["step"] == 7
    assert "Traceback" not in output, "the rank that lost its peer is no news"
    assert steps_saved(run) == [4]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.loopback), signal.SIGUSR1])
def test_told_to_stop(make_run: MakeRun, launch: Launch, pair: Ranks, number: signal.Signals) -> None:
    changes = {**PAIR, "stage__max_steps": 40, "checkpoint__every": 30}
    run = make_run("stopped", FINETUNE, **changes)
    started = launch(run)
    started.wait_for_step(5)
    began = time.monotonic()
    started.process.send_signal(number)
    output = started.ends_with(75)
    assert time.monotonic() - began < (60 if is_busy() else 5)
    assert "Traceback" not in output
    assert not run.done.exists()
    taken = [line["step"] for line in record(run)]
    assert steps_saved(run) == [taken[-1]], "nothing is lost: the last step taken is the one saved"
    assert run.interrupted.read_text() == f"stopped by {number.name} after step {taken[-1]}\n"
    if number is signal.SIGTERM:
        whole = make_run("whole", FINETUNE, **changes)
        pair.run(run_whole, folder=str(whole.path))
        again = launch(resumed(run)).ends_with(0)
        assert f"after step {taken[-1]}" in again
        assert record(run) == record(whole)


def resumed(run: RunFolder) -> RunFolder:
    """The run as `resume=auto` launches it again."""
    config = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump({**config, "resume": "auto"}))
    run.interrupted.unlink()
    return run


def test_one_rank_that_is_told_to_stop_stops_all(make_run: MakeRun, launch: Launch) -> None:
    """Restarts are for ranks that fail: these have left on purpose."""
    run = make_run("one", FINETUNE, **{**PAIR, "stage__max_steps": 40}, hardware__max_restarts=3)
    started = launch(run)
    started.wait_for_step(5)
    os.kill(started.rank_pid(1), signal.SIGTERM)
    output = started.ends_with(75)
    assert "started again" not in output
    assert run.interrupted.exists()


def test_a_killed_agent_takes_its_ranks_with_it(make_run: MakeRun, launch: Launch) -> None:
    run = make_run("orphans", FINETUNE, **{**PAIR, "stage__max_steps": 4000, "checkpoint__every": 2000})
    started = launch(run)
    started.wait_for_step(5)
    started.process.kill()
    with lock.held(run.path):
        assert run.interrupted.exists(), "the next launch has waited until they had saved"
    deadline = time.monotonic() + 30
    while started.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started.processes() == []
    assert steps_saved(run) == [len(record(run))]


@pytest.mark.loopback
def test_told_to_stop_while_it_starts(make_run: MakeRun, launch: Launch) -> None:
    """Before a rank notes signals it ends by them, as any process does; nothing is saved yet that could be lost."""
    run = make_run("early", FINETUNE, **{**PAIR, "stage__max_steps": 400})
    started = launch(run)
    deadline = time.monotonic() + 120
    while len(started.processes()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    started.process.send_signal(signal.SIGTERM)
    output = started.ends_with(128 + signal.SIGTERM)
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert not run.interrupted.exists()
    assert not run.state.exists()


def watchdog(step_seconds: float) -> dict[str, float]:
    return {"watchdog__step_seconds": step_seconds, "watchdog__startup_seconds": 90.0}


@pytest.mark.loopback
def test_a_stopped_rank_is_named(make_run: MakeRun, launch: Launch) -> None:
    allowed = 5.0
    run = make_run("stopped", FINETUNE, **PAIR, **watchdog(allowed))
    started = launch(run, "stopped", rank=1, step=7)
    started.wait_for_step(6)
    began = time.monotonic()
    while not (run.black_boxes / "rank_0.json").exists() and time.monotonic() - began < 60:
        time.sleep(0.1)
    assert time.monotonic() - began < (60 if is_busy() else allowed + 2)
    # torchrun waits 30 seconds for a stopped rank before it kills it.
    output = started.ends_with(4)
    assert "first to fail: rank 0: hung: stopped or dead: rank 1 " in output
    told = box(run, 0)
    assert (told["cause"], told["step"]) == ("hung", 7)
    assert any("all_reduce" in line for line in told["stacks"]), "the collective that rank 0 waits in"
    assert "in all_reduce" in run.log(0).read_text()
    assert steps_saved(run) == [4]


def test_a_sleeping_rank_is_named_and_recovered_from(make_run: MakeRun, launch: Launch) -> None:
    run = make_run("asleep", FINETUNE, **PAIR, **watchdog(5.0), hardware__max_restarts=1)
    output = launch(run, "asleep", rank=1, step=7).ends_with(0)
    boxes = [json.loads(path.read_text()) for path in sorted(run.black_boxes.glob("before_rank_*.json"))]
    hung = [content for content in boxes if content["cause"] == "hung"]
    assert hung
    assert all("behind: rank 1 " in content["message"] for content in hung), "both are in forward and backward"
    assert all("in asleep (faults/planted.py" in content["message"] for content in hung)
    assert all(content["step"] == 7 for content in boxes)
    assert "all ranks are started again" in output
    assert len(record(run)) == 12


def test_a_crash_is_traced_to_its_rank(make_run: MakeRun, launch: Launch) -> None:
    run = make_run("crashed", FINETUNE, **PAIR)
    output = launch(run, "crashed", rank=1, step=7).ends_with(1)
    [line] = [line for line in output.splitlines() if line.startswith("first to fail: ")]
    assert line.startswith("first to fail: rank 1 ")
    assert line.endswith("crashed: planted")
    told = box(run, 1)
    assert (told["cause"], told["phase"], told["step"]) == ("crashed", "forward and backward", 7)
    assert len(told["samples"]) == 2
    assert set(told["samples"]).isdisjoint(box(run, 0)["samples"]), "its own, not the whole step's"
    assert told["config"] == run.read_config().digest
    assert output.count("Traceback") == 1, "the one of the rank that failed"


def test_numbers_that_cannot_be_trained_on_halt_all_ranks(make_run: MakeRun, launch: Launch) -> None:
    # Profiled: a process that ends while torch's profiler runs would end by SIGSEGV, and be started again.
    run = make_run("nan", FINETUNE, **PAIR, hardware__max_restarts=3, profile="step:6-8")
    output = launch(run, "nan", rank=1, step=7).ends_with(3)
    assert "started again" not in output, "they would come to the same numbers"
    assert "step 7: loss is nan" in json.loads(run.halted.read_text())["message"]
    boxes = [box(run, rank) for rank in (0, 1)]
    assert [content["cause"] for content in boxes] == ["halted", "halted"]
    assert all(name in boxes[0]["message"] for content in boxes for name in content["samples"])
    assert len(boxes[0]["samples"]) == len(boxes[1]["samples"]) == 2
    assert steps_saved(run) == [4]


def test_a_step_of_two_ranks_is_replayed(make_run: MakeRun, pair: Ranks) -> None:
    run = make_run("recorded", FINETUNE, **{**PAIR, "stage__max_steps": 6})
    pair.run(run_whole, folder=str(run.path))
    written = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", "train", "replay", str(run.path), "step=6"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-00000004 after step 4" in done.stdout
    assert f"step 6 is reproduced to the bit: loss {record(run)[5]['loss']!r}" in done.stdout
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if run.path / "replay" not in path.parents} == written


@pytest.mark.loopback
def test_a_slow_rank_is_named_and_waited_for(make_run: MakeRun, launch: Launch) -> None:
    run = make_run("slow", FINETUNE, **PAIR)
    output = launch(run, "slow", rank=1).ends_with(0)
    [line] = [line for line in output.splitlines() if "is slow" in line]
    assert "rank 1 is slow" in line
    assert "(max/mean " in line
    times = [json.loads(text)["time"] for text in run.metrics.read_text().splitlines()]
    assert all(time["slowest_rank"] == 1 for time in times[1:])
    assert all(time["own_seconds_max"] > 1.3 * time["own_seconds_mean"] for time in times[1:])


LOADING = """
import os, signal, subprocess, sys, time
from torch.utils.data import DataLoader
from data.loader import _take_signals_like_the_parent
from train import rank
from train.faults.interrupt import StopRequest

def batches():
    return iter(DataLoader(range(64), num_workers=2, worker_init_fn=_take_signals_like_the_parent))

def main(arguments):
    with StopRequest() as stop:
        first, kept = batches(), batches()
        next(first), next(kept)
        subprocess.run(["bash", "-c", f"kill -TERM -- -{os.getpgid(0)}"])
        print(stop.signal, len(list(first)), flush=True)
        raise RuntimeError("planted")

rank.main = main
rank.run([])
"""


@pytest.mark.loopback
def test_loader_processes_survive_the_signal_but_not_their_rank() -> None:
    """A signal to the group reaches them too; a rank needs its next batch to stop, and must not wait for them then."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING], cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert done.stdout == "SIGTERM 63\n", done.stderr
    assert done.returncode == 1
    assert "planted" in done.stderr.splitlines()[-1], done.stderr
