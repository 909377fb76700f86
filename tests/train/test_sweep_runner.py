"""The local executor of sweeps on fake commands: what is executed, in which slots, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anchorformer.errors import UserError
from tests.train.fake_trials import add, python, run, say
from tests.waiting import until
from train.compose import ROOT
from train.run import lock
from train.run.process import began
from train.sweep.trial import Attempt, State, TrialFolder

WAIT = "import time, pathlib, sys; pathlib.Path(sys.argv[1]).touch(); time.sleep(120)"
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(120)
"""
CARD = """
import os, sys, time
begin = time.time()
time.sleep(0.1)
open(sys.argv[1], "a").write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {begin} {time.time()}\\n")
"""


def sweep(folder: Path, slots: int = 1) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.train.fake_trials", str(folder), str(slots)], cwd=ROOT)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.faults
@pytest.mark.loopback
def test_a_sweep_killed_in_its_fifth_trial_goes_on_there(tmp_path: Path) -> None:
    ran, folder = tmp_path / "ran", tmp_path / "trials"
    for number in range(12):
        name = f"{number:02}"
        wait = [python("wait", WAIT, tmp_path / "fifth")] if number == 4 else []
        add(folder, name, say(ran, f"{name} first"), *wait, say(ran, f"{name} last"))
    process = sweep(folder)
    until((tmp_path / "fifth").exists)
    process.kill()
    process.wait()
    fifth = TrialFolder(folder / "04")
    until(lambda: not fifth.is_held())
    assert fifth.state() is State.interrupted, "the death of the sweep reached its trial"
    assert lines(ran) == [f"{n:02} {word}" for n in range(4) for word in ("first", "last")] + ["04 first"]
    fifth.note(steps=tuple(step for step in fifth.read().steps if step.name != "wait"))  # type: ignore[union-attr]
    ran.unlink()
    assert set(run(folder, 2).values()) == {State.done}
    assert sorted(lines(ran)) == ["04 last", *(f"{n:02} {word}" for n in range(5, 12) for word in ("first", "last"))]
    ran.unlink()
    assert set(run(folder, 2).values()) == {State.done}
    assert not ran.exists(), "nothing is executed twice"


def test_a_failure_leaves_the_others_done_and_is_retried_only_when_asked(tmp_path: Path) -> None:
    ran, folder = tmp_path / "ran", tmp_path / "trials"
    shared = add(folder, "0 shared", say(ran, "shared"))
    broken = add(folder, "1 broken", python("planted", "import sys; print('no memory'); sys.exit(3)"))
    for name in ("2 one", "3 other"):
        add(folder, name, say(ran, name), needs=shared)
    add(folder, "4 behind the broken", say(ran, "never"), needs=broken)
    states = run(folder, 2)
    assert states.pop("1 broken") is State.failed
    assert states.pop("4 behind the broken") is State.failed
    assert set(states.values()) == {State.done}
    assert lines(ran)[0] == "shared"
    assert sorted(lines(ran)) == ["2 one", "3 other", "shared"], "a shared stage is executed once, before the others"
    record = TrialFolder(broken).read()
    assert record is not None
    assert (record.exit_code, record.reason) == (3, "planted ended with 3")
    assert TrialFolder(broken).last_lines()[-1] == "no memory"
    behind = TrialFolder(folder / "4 behind the broken").read()
    assert behind is not None
    assert behind.reason == f"what it starts from has failed: {broken}"

    TrialFolder(broken).note(steps=(say(ran, "mended"),))
    assert run(folder)["1 broken"] is State.failed
    assert set(run(folder, retry_failed=True).values()) == {State.done}
    assert lines(ran)[3:] == ["mended", "never"]


def test_trials_that_run_at_once_share_no_card(tmp_path: Path) -> None:
    for number in range(6):
        add(tmp_path / "trials", str(number), python("card", CARD, tmp_path / "cards"))
    run(tmp_path / "trials", 3)
    spans = [line.split() for line in lines(tmp_path / "cards")]
    assert len(spans) == 6
    assert {card for card, _, _ in spans} <= {"0", "1", "2"}
    for card, begin, end in spans:
        same = [other for other in spans if other[0] == card and other != [card, begin, end]]
        assert all(float(other[1]) >= float(end) or float(other[2]) <= float(begin) for other in same)


@pytest.mark.faults
@pytest.mark.loopback
def test_an_interrupt_asks_first_and_the_second_leaves_no_process(tmp_path: Path) -> None:
    for name in ("gentle", "stubborn"):
        code = WAIT if name == "gentle" else STUBBORN
        add(tmp_path / "trials", name, python("wait", code, tmp_path / name))
    add(tmp_path / "trials", "waiting", say(tmp_path / "ran", "never"))
    process = sweep(tmp_path / "trials", 2)
    until(lambda: (tmp_path / "gentle").exists() and len(lines(tmp_path / "stubborn")) == 1)
    pids = [int(word) for word in (tmp_path / "stubborn").read_text().split()]
    process.send_signal(signal.SIGINT)
    until(lambda: TrialFolder(tmp_path / "trials" / "gentle").state() is State.interrupted)
    assert all(began(pid) for pid in pids), "one that saves is not killed"
    process.send_signal(signal.SIGINT)
    process.wait(30)
    until(lambda: not any(is_alive(pid) for pid in pids), 10)
    assert TrialFolder(tmp_path / "trials" / "stubborn").state() is State.interrupted
    assert TrialFolder(tmp_path / "trials" / "waiting").state() is State.pending
    assert not (tmp_path / "ran").exists()


@pytest.mark.faults
@pytest.mark.loopback
def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path: Path) -> None:
    add(tmp_path, "one", python("wait", WAIT.replace("120", "1"), tmp_path / "there"))
    argv = ["nohup", sys.executable, "-m", "tests.train.fake_trials", str(tmp_path), "1"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until((tmp_path / "there").exists)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert TrialFolder(tmp_path / "one").state() is State.done


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_one_process_per_trial(tmp_path: Path) -> None:
    path = add(tmp_path, "held", python("wait", WAIT, tmp_path / "there"))
    process = sweep(tmp_path)
    until((tmp_path / "there").exists)
    try:
        assert TrialFolder(path).state() is State.running
        with pytest.raises(UserError, match="another launch holds"):
            Attempt(TrialFolder(path)).execute(os.environ)
    finally:
        process.terminate()
        process.wait()
    assert not (path / lock.FILE).exists()
    assert TrialFolder(path).state() is State.interrupted


def test_a_record_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = add(tmp_path, "damaged", say(tmp_path / "ran", "never"))
    (path / "trial.json").write_text((path / "trial.json").read_text()[:100])
    with pytest.raises(UserError, match=r"damaged/trial\.json cannot be read"):
        run(tmp_path)


def test_a_trial_that_is_waited_for_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A holder on another machine may be gone for good, and only its user can tell."""
    path = add(tmp_path, "held", say(tmp_path / "ran", "it"))
    answers = iter((True, True))
    monkeypatch.setattr(TrialFolder, "is_held", lambda _: next(answers, False))
    assert run(tmp_path) == {"held": State.done}
    assert [message for message in caplog.messages if str(path / lock.FILE) in message] == caplog.messages[:1]
