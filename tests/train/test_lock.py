"""Small files that others rely on: whole or absent, and a lock that is held only as long as its holder lives."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from anchorformer.errors import UserError
from train.compose import ROOT
from train.faults.progress import Place, Report, report_path
from train.run import lock
from train.run.folder import write_atomically
from train.run.process import AGENT, AGENT_MODULE, began, orphans


def holder(**changes: object) -> lock.Holder:
    return replace(lock.Holder.myself(), **changes)


@pytest.mark.parametrize(
    ("other", "is_taken_over"),
    [({}, True), ({"pid": os.getppid(), "ticks": began(os.getppid())}, False), ({"pid": 2**22 - 1}, True),
     ({"ticks": "1"}, True), ({"host": "elsewhere"}, False), ({"host": "elsewhere", "job": "7"}, False),
     ({"host": "elsewhere", "job": "7", "attempt": "0"}, True)],
    ids=["myself", "alive", "gone", "number given again", "another machine", "the same Slurm job",
         "the same Slurm job, requeued"],
)  # fmt: skip
def test_one_launch_holds_a_run(
    tmp_path: Path, other: dict[str, object], is_taken_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / lock.FILE).write_text(json.dumps(asdict(holder(**{"job": None, **other}))))
    if is_taken_over:
        with lock.held(tmp_path):
            assert lock._read(tmp_path / lock.FILE).pid == os.getpid()
        assert not list(tmp_path.iterdir())
        return
    with pytest.raises(UserError, match="another launch holds") as caught:
        lock.acquire(tmp_path)
    assert str(other.get("host", "process")) in caught.value.found
    lock.release(tmp_path)
    assert (tmp_path / lock.FILE).is_file(), "only its holder gives it back"


def test_a_lock_that_cannot_be_read_is_respected(tmp_path: Path) -> None:
    (tmp_path / lock.FILE).touch()
    with pytest.raises(UserError, match="unreadable") as caught:
        lock.acquire(tmp_path)
    assert str(tmp_path / lock.FILE) in caught.value.remedy


def test_an_empty_lock_does_not_hold_for_ever(tmp_path: Path) -> None:
    """Left by a launch that was killed between making and filling it."""
    (tmp_path / lock.FILE).touch()
    os.utime(tmp_path / lock.FILE, (1, 1))
    with lock.held(tmp_path):
        assert lock._read(tmp_path / lock.FILE).pid == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_launch_clears_away_at_the_same_time_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = holder(pid=2**22 - 1)
    path = tmp_path / lock.FILE
    path.write_text(json.dumps(asdict(gone)))
    clear_away = lock._clear_away

    def second(place: Path, found: lock.Holder | None) -> None:
        path.unlink()  # by the first
        clear_away(place, found)

    monkeypatch.setattr(lock, "_clear_away", second)
    with lock.held(tmp_path):
        assert lock._read(path).pid == os.getpid()


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has reported as rank 1 of an earlier launch."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        report = replace(Report.of(1, Place()), pid=process.pid, began=began(process.pid))
        (tmp_path / "black_box").mkdir()
        report.write(report_path(tmp_path / "black_box", 1))
        yield process
        process.kill()


def test_a_launch_waits_for_ranks_that_outlive_theirs(
    tmp_path: Path, rank: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    monkeypatch.setattr(lock, "PERIOD", 0.01)
    with pytest.raises(UserError, match="ranks of an earlier launch still run") as caught:
        lock.acquire(tmp_path)
    assert f"rank 1 ({socket.gethostname()}, pid {rank.pid})" in caught.value.found
    assert not (tmp_path / lock.FILE).exists(), "a launch that gives up leaves no lock"
    monkeypatch.setattr(lock, "PATIENCE", 60.0)
    monkeypatch.setattr(lock.time, "sleep", lambda _: rank.kill())  # not waited for: it is no more, and still listed
    with lock.held(tmp_path):
        assert began(rank.pid) == ""
    assert "waiting for ranks of an earlier launch to end: rank 1" in caplog.text


RANK = """\
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of other processes")
def test_ranks_without_an_agent_that_do_not_end_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    monkeypatch.setattr(lock, "PERIOD", 0.01)
    (tmp_path / "link").symlink_to(tmp_path)
    agent = subprocess.Popen([sys.executable, "-c", "input()", AGENT_MODULE, str(tmp_path)], stdin=subprocess.PIPE)
    children = [
        subprocess.Popen([sys.executable, "-c", RANK, folder], env={**os.environ, AGENT: str(pid)}, cwd=tmp_path,
                         stdout=subprocess.PIPE)
        for folder, pid in (("link", 2**22 - 1), (str(tmp_path / "other"), 2**22 - 1), (str(tmp_path), agent.pid))
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        orphan, of_another_run, of_a_living_agent = children
        assert orphans(tmp_path) == [orphan.pid]
        lock.end_orphans(tmp_path)
        assert orphan.wait(10) == -signal.SIGKILL
        assert of_another_run.poll() is None
        assert of_a_living_agent.poll() is None
        assert f"did not end within 0 seconds and are killed: process {orphan.pid}" in caplog.text
        agent.kill()
        agent.wait()
        assert orphans(tmp_path) == [of_a_living_agent.pid]
    finally:
        for process in (agent, *children):
            process.kill()
            process.communicate()


def test_ranks_of_another_machine_are_known_by_their_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By when they were written: their processes cannot be seen from here, and their clocks may be wrong."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    (tmp_path / "black_box").mkdir()
    path = report_path(tmp_path / "black_box", 0)
    replace(Report.of(0, Place()), host="elsewhere", written=0.0).write(path)
    with pytest.raises(UserError, match="still run"):
        lock.acquire(tmp_path)
    silent_since = path.stat().st_mtime - lock.SILENT
    os.utime(path, (silent_since, silent_since))
    with lock.held(tmp_path):
        pass


def test_what_this_process_has_left_itself_keeps_it_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "black_box").mkdir()
    Report.of(0, Place()).write(report_path(tmp_path / "black_box", 0))
    with lock.held(tmp_path):
        pass


ORPHAN = """\
import os, signal, subprocess, sys, time
child = "import os, signal, sys, time; from train.run.process import end_with_parent;"
child += "end_with_parent(signal.SIGTERM, int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child, str(os.getpid())])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_process_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert began(child) != ""
        parent.kill()
        deadline = time.monotonic() + 20
        while began(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert began(child) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_process_whose_parent_has_died_before_it_asked_ends_at_once() -> None:
    words = "import signal; from train.run.process import end_with_parent; end_with_parent(signal.SIGTERM, 1); print(1)"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        lock.acquire(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "DONE", "4 steps")
    assert not list(tmp_path.iterdir())
