"""A rank that stands still is named by the others, and every failure leaves where it was and who failed first."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.memory import Memory
from train.config import WatchdogConfig
from train.faults.black_box import HUNG, BlackBox, cause_of, first_to_fail
from train.faults.guards import TrainingHalted
from train.faults.interrupt import Interrupted
from train.faults.progress import Phase, Place, Progress, Report, read_reports, report_path, who_is_behind
from train.faults.watchdog import EXIT_CODE, Watchdog, budget
from train.observe.pace import Lag, Stopwatch
from train.run.folder import RunFolder

CONFIG = WatchdogConfig(startup_seconds=100, step_seconds=0.2)


def report(rank: int, phase: Phase, step: int = 8, **changes: Any) -> Report:
    place = Place(phase, step, (f"s{rank}",))
    return replace(Report.of(rank, place), **{"is_waiting": False, "written": 1000.0, **changes})


def test_who_is_behind() -> None:
    waiting = report(0, Phase.exchange, is_waiting=True)
    late = report(1, Phase.data)

    def told(*reports: Report, size: int | None = None) -> str:
        return who_is_behind(reports, size or len(reports), silent_after=5)

    assert told(waiting, late).startswith("behind: rank 1 ")
    assert "waiting for data, step 8" in told(waiting, late)
    assert "samples s1" in told(waiting, late)
    assert told(waiting, report(1, Phase.update, step=7)).startswith("behind: rank 1 ")
    # In the same phase of the same step, the one that is not in a collective holds up the one that is.
    assert told(report(0, Phase.compute, is_waiting=True), report(1, Phase.compute)).startswith("behind: rank 1 ")
    assert "look at the network" in told(waiting, report(1, Phase.exchange, is_waiting=True))
    assert "all do the same" in told(report(0, Phase.compute), report(1, Phase.compute))
    # One that has stopped says nothing any more, wherever it was.
    assert told(waiting, report(1, Phase.update, written=990.0)).startswith("stopped or dead: rank 1 ")
    assert told(waiting, late, size=4) == "never heard of: rank 2, 3"


def test_reports_are_read_as_they_were_written(tmp_path: Path) -> None:
    for rank in (11, 2):
        report(rank, Phase.data).write(report_path(tmp_path, rank))
        os.utime(report_path(tmp_path, rank), (rank, rank))
    report_path(tmp_path, 3).touch()
    expected = [replace(report(rank, Phase.data), seconds=0.0, written=float(rank)) for rank in (2, 11)]
    assert read_reports(tmp_path) == expected, "by the disk's clock, not by that of each host"


def test_budgets() -> None:
    cold, warm = Place(Phase.compute), Place(Phase.compute, is_warm=True)
    assert (budget(CONFIG, cold), budget(CONFIG, warm)) == (100, 0.2)
    assert budget(CONFIG, replace(warm, phase=Phase.save)) == 100
    assert CONFIG.collective_seconds > max(CONFIG.startup_seconds, CONFIG.step_seconds), "the watchdog comes first"


def test_a_rank_that_stands_still_ends_and_says_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, progress = RunFolder(tmp_path), Progress()
    ended: list[int] = []
    left = threading.Event()

    def leave(code: int) -> None:
        ended.append(code)
        left.set()

    with caplog.at_level(logging.CRITICAL), BlackBox(folder, 0, progress) as box:
        for rank in (1, 2):
            report(rank, Phase.data, step=2, written=time.time() - 3600).write(report_path(folder.black_boxes, rank))
        with Watchdog(CONFIG, folder, 0, 2, progress, box, leave):
            for step in (1, 2):
                progress.enter(Phase.data, step)
                progress.enter(Phase.exchange, samples=(f"mine{step}",))
            assert left.wait(20), "the step's budget counts, not that of the start"
    assert ended == [EXIT_CODE]
    assert "behind: rank 1 " in caplog.text
    assert "rank 2 " not in caplog.text, "of a run that had more ranks"
    assert "left.wait(20)" in folder.log(0).read_text(), "where the main thread is"
    told = json.loads((folder.black_boxes / "rank_0.json").read_text())
    assert told["cause"] == HUNG
    assert (told["phase"], told["step"], told["samples"]) == ("exchanging facts", 2, ["mine2"])
    assert any("left.wait(20)" in line for line in told["stacks"])
    assert len(told["ranks"]) == 3


def test_a_rank_that_moves_is_left_alone(tmp_path: Path) -> None:
    folder, progress = RunFolder(tmp_path), Progress()
    with BlackBox(folder, 3, progress) as box, Watchdog(CONFIG, folder, 3, 4, progress, box, pytest.fail):
        path = report_path(folder.black_boxes, 3)
        for step in range(1, 40):
            progress.enter(Phase.data, step)
            progress.enter(Phase.exchange, samples=("a",))
            time.sleep(0.01)
        assert json.loads(path.read_text())["step"] > 0
    assert not list(folder.black_boxes.iterdir()), "an orderly end leaves nothing"


class BrokenFolder(RunFolder):
    @property
    def black_boxes(self) -> Path:
        return self.path / "a file" / "black_box"


def test_nothing_keeps_a_hanging_rank_alive(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    left = threading.Event()
    folder, progress = RunFolder(tmp_path), Progress()
    watchdog = Watchdog(CONFIG, folder, 0, 2, progress, BlackBox(folder, 0, progress), lambda _: left.set())
    with watchdog:
        watchdog._folder = BrokenFolder(tmp_path)
        for step in (1, 2):
            progress.enter(Phase.data, step, samples=("a",))
        assert left.wait(20)
        watchdog._folder = folder


@pytest.mark.parametrize("hanging", ["_publish", "_end"])
def test_a_disk_that_hangs_does_not_keep_a_hanging_rank_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    left, is_over = threading.Event(), threading.Event()
    folder, progress = RunFolder(tmp_path), Progress()
    monkeypatch.setattr("train.faults.watchdog.LAST_WORDS", 0.1)
    if hanging == "_publish":
        monkeypatch.setattr(Watchdog, "_publish", lambda *_: is_over.wait(30))
    else:
        monkeypatch.setattr("train.faults.watchdog.read_reports", lambda _: is_over.wait(30) and [])
    with Watchdog(CONFIG, folder, 0, 2, progress, BlackBox(folder, 0, progress), lambda _: left.set()):
        for step in (1, 2):
            progress.enter(Phase.data, step, samples=("a",))
        assert left.wait(10)
        is_over.set()


def test_a_device_that_is_gone_does_not_hide_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)

    def broken(*_: object) -> Any:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(Memory, "of", broken)
    leave_box(folder, 0, ZeroDivisionError("the cause"))
    told = json.loads((folder.black_boxes / "rank_0.json").read_text())
    assert (told["message"], told["memory"]) == ("the cause", {"unknown": "device-side assert"})
    monkeypatch.setattr("train.faults.black_box.read_reports", broken)
    leave_box(folder, 0, ZeroDivisionError("the cause"))


def test_what_ranks_left_before_is_set_aside_also_where_they_are_fewer_now(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    leave_box(folder, 5, ValueError("long ago"))
    report(5, Phase.data).write(report_path(folder.black_boxes, 5))
    folder.forget_last_end()
    assert sorted(path.name for path in folder.black_boxes.iterdir()) == ["before_now_5.json", "before_rank_5.json"]
    assert first_to_fail(folder, {0: 1}) == (0, "rank 0: ended with 1 before it could say why")
    assert read_reports(folder.black_boxes) == []


def test_an_exception_leaves_a_black_box(tmp_path: Path) -> None:
    folder, progress = RunFolder(tmp_path), Progress()
    folder.log(1).parent.mkdir()
    folder.log(1).write_text("".join(f"line {number}\n" for number in range(100)))
    progress.enter(Phase.data, 7)
    progress.enter(Phase.compute, samples=("a", "b"))
    for message in ("first", "second"):
        box = BlackBox(folder, 1, progress)
        box.config = "abc"
        with pytest.raises(RuntimeError), box:
            raise RuntimeError(message)
    told = json.loads((folder.black_boxes / "rank_1.json").read_text())
    assert (told["cause"], told["message"], told["config"]) == ("crashed", "second", "abc")
    assert (told["rank"], told["step"], told["phase"], told["samples"]) == (1, 7, "forward and backward", ["a", "b"])
    assert told["memory"]["peak_gib"] > 0
    assert told["log"][-1] == "line 99"
    assert "raise RuntimeError(message)" in "\n".join(told["stacks"])
    assert json.loads((folder.black_boxes / "before_rank_1.json").read_text())["message"] == "first"
    with pytest.raises(Interrupted), BlackBox(folder, 1, progress):
        raise Interrupted(3, "SIGTERM")
    assert not (folder.black_boxes / "rank_1.json").exists(), "to stop when asked is no failure"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TrainingHalted("loss is nan", found="", expected="", remedy=""), "halted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "lost its peers"),
        (ConnectionResetError(104, "Connection reset by peer"), "lost its peers"),
        (ZeroDivisionError(), "crashed"),
    ],
)
def test_causes(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause


def leave_box(folder: RunFolder, rank: int, error: Exception) -> None:
    progress = Progress()
    progress.enter(Phase.compute, 8, samples=(f"s{rank}",))
    with pytest.raises(type(error)), BlackBox(folder, rank, progress):
        raise error


def test_half_a_black_box_does_not_hide_who_failed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.black_boxes.mkdir()
    (folder.black_boxes / "rank_1.json").write_text('{"rank": 1, "cau')
    assert first_to_fail(folder, {0: -15, 1: 1})[0] == 1


def test_the_first_to_fail_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rank, line = first_to_fail(folder, {1: 1})
    assert (rank, line) == (1, "rank 1: ended with 1 before it could say why")
    assert first_to_fail(folder, {0: -15, 1: 1}) == (rank, line), "the agent has ended rank 0 because of rank 1"
    lost = RuntimeError("Connection closed by peer")
    leave_box(folder, 0, lost)
    report(1, Phase.compute).write(report_path(folder.black_boxes, 1))
    rank, line = first_to_fail(folder, {0: 1, 1: -9})
    assert rank == 1, "a killed rank leaves no box, and the others' are consequences"
    assert line.startswith("rank 1 was killed by SIGKILL")
    assert "forward and backward, step 8" in line
    leave_box(folder, 3, ValueError("the cause\nand more"))
    leave_box(folder, 2, ValueError("later"))
    rank, line = first_to_fail(folder, {0: 1, 1: -9})
    assert rank == 3
    assert line.endswith("samples s3: crashed: the cause")


HUNG_IN_C = """\
import faulthandler, pathlib, sys
with pathlib.Path(sys.argv[1]).open("a") as log:
    faulthandler.dump_traceback_later(0.2, exit=True, file=log)
    sum(range(10**12))  # one call that never lets go of the interpreter
"""


def test_a_rank_that_holds_the_interpreter_is_told_from_its_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.black_boxes.mkdir()
    folder.log(1).parent.mkdir()
    folder.log(1).write_text("12:00:00 I train: step 7\n")
    assert subprocess.run([sys.executable, "-c", HUNG_IN_C, str(folder.log(1))]).returncode == 1
    leave_box(folder, 0, RuntimeError("Connection closed by peer"))
    assert first_to_fail(folder, {0: 1, 1: 1}) == (
        1, "rank 1: hung, and held the interpreter; its stacks are the end of its log",
    )  # fmt: skip
    with folder.log(1).open("a") as log:
        log.write("12:30:00 I train: started again\n")
    assert first_to_fail(folder, {0: 1, 1: 1})[1].startswith("rank 0 "), "of an earlier start"


def test_a_rank_that_is_always_slower_is_named() -> None:
    lag = Lag()
    told = [lag.observe((0.1, 0.6, 0.1), 1.0) for _ in range(2 * Lag.STEPS)]
    assert [number for number, line in enumerate(told, 1) if line] == [Lag.STEPS, 2 * Lag.STEPS]
    assert told[Lag.STEPS - 1] == (
        "rank 1 is slow: 0.6 s by itself, the others 0.1 s (max/mean 2.25), for 10 steps; every step waits 0.5 s for it"
    )
    # Whoever has the long samples is the slowest now and then; a lag that costs little is not worth a line.
    assert not any(lag.observe((0.6, 0.1) if step % 5 else (0.1, 0.6), 1.0) for step in range(50))
    assert not any(Lag().observe((0.06, 0.01), 1.0) for _ in range(50))
    assert not any(Lag().observe((0.6, 0.5), 1.0) for _ in range(50))
    assert not any(Lag().observe((0.6,), 1.0) for _ in range(50))


@pytest.mark.gpu
def test_the_forward_passes_are_measured_on_the_device_without_waiting() -> None:
    device = torch.device("cuda")
    model = torch.nn.Linear(8192, 8192, device=device)
    tokens = torch.zeros(8192, 8192, device=device)
    model(tokens)
    watch = Stopwatch(model, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        for _ in range(20):
            model(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert 0.5 * (time.perf_counter() - began) < watch.take() < time.perf_counter() - began


def test_the_forward_passes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def work(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model = torch.nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: work(2.0))
    watch = Stopwatch(model, torch.device("cpu"))
    assert watch.take() == 0
    for _ in range(3):
        model(torch.zeros(1, 2))
        work(5.0)
    assert watch.take() == 6
    assert watch.take() == 0
