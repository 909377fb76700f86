"""Small files that others rely on: whole or absent, and a lock that is held only as long as its holder lives."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from anchorformer.errors import UserError
from train.run import lock
from train.run.folder import write_atomically


def holder(**changes: object) -> lock.Holder:
    return replace(lock.Holder.myself(), **changes)


@pytest.mark.parametrize(
    ("other", "is_taken_over"),
    [({}, True), ({"pid": os.getppid(), "ticks": lock.began(os.getppid())}, False), ({"pid": 2**22 - 1}, True),
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
