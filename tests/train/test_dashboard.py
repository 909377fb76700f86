"""The dashboard: served whatever becomes of the runs, of which it shows all that can be shown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from anchorformer.errors import UserError
from tests.train.cases import ALIGN
from tests.train.conftest import MakeRun
from tests.train.tracked import rows, write
from tests.waiting import until
from train.compose import ROOT
from train.observe.feed import BusyError
from train.observe.trackers.base import TrackerConfig
from train.observe.trackers.trackio import LOOPBACK
from train.run.folder import RunFolder
from train.verbs import dashboard

Look = Callable[[], tuple[str, str]]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Look:
    """One look at the runs below `tmp_path` without a database, and what is said of it."""
    monkeypatch.setattr(dashboard, "show", lambda run, _: len(run.metrics.read_text().splitlines()))
    screen = dashboard.Screen()

    def once() -> tuple[str, str]:
        screen.update([tmp_path])
        out, err = capsys.readouterr()
        return out, err

    return once


def test_it_waits_for_runs_and_lets_them_go(make_run: MakeRun, look: Look) -> None:
    assert "waiting for one" in look()[0]
    assert look() == ("", "")
    run = make_run("run", ALIGN)
    assert look() == ("", "")
    write(run, 1, 2)
    assert "2 step(s) shown" in look()[0]
    assert look() == ("", "")
    write(run, 3, 3, resumed_after=2)
    assert "3 step(s) shown" in look()[0]
    shutil.rmtree(run.path)
    assert "waiting for one" in look()[0]


def test_a_run_before_its_first_step_is_waited_for(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("run", ALIGN)
    dashboard.Screen().update([run.path])
    assert capsys.readouterr() == ("", "")


def test_a_run_that_cannot_be_read_keeps_no_other_from_the_dashboard(make_run: MakeRun, look: Look) -> None:
    good, old = make_run("good", ALIGN), make_run("old", ALIGN)
    for run in (good, old):
        write(run, 1, 2)
    old.config.write_text(old.config.read_text() + "no_longer_there: 1\n")
    out, err = look()
    assert "2 step(s) shown" in out
    assert "no_longer_there" in err


DAMAGES: dict[str, Callable[[RunFolder], object]] = {
    "JSONDecodeError": lambda run: run.metrics.write_text(run.metrics.read_text() + '{"step": 4, "lo\n'),
    "KeyError": lambda run: run.metrics.write_text(run.metrics.read_text() + '{"loss": 4}\n'),
    "TypeError": lambda run: run.health.write_text("3\n"),
    "UnicodeDecodeError": lambda run: run.evals.write_bytes(b"\xff\n"),
    "ValueError": lambda run: (run.media / "step-00000003" / "0-0.png").unlink(),
    "UserError": lambda run: run.config.write_text("run: ["),
    "FileExistsError": lambda run: run.tracker.write_text(""),
}


class Strict(TrackerConfig):
    """Takes every step, and of a picture that it is there, as Trackio does."""

    shown = 0

    def __enter__(self) -> Strict:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, subject: object) -> Strict:
        return self

    def log(self, step: int, values: object, pictures: list[object]) -> None:
        if missing := [one for one in pictures if not one.path.is_file()]:
            raise ValueError(f"File not found: {missing}")


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_are_said_once(make_run: MakeRun, look: Look, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.verbs.sync import show

    def strict(run: RunFolder, _: object) -> int:
        return show(run, Strict())

    monkeypatch.setattr("train.observe.feed.PERIOD", 0.0)
    monkeypatch.setattr(dashboard, "show", strict)
    run, whole = make_run("run", ALIGN), make_run("whole", ALIGN)
    for one in (run, whole):
        write(one, 1, 3)
    DAMAGES[kind](run)
    out, err = look()
    assert "whole: 3 step(s) shown" in out
    assert f"run is left out: {kind}: " in err
    assert look() == ("", "")
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "loss": 1}\n')
    assert look() == ("", "")


def test_what_another_process_holds_is_tried_again(
    make_run: MakeRun, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    causes = [sqlite3.OperationalError("database is locked")] * 2 + [BusyError("process 7 on here")] * 2

    def show(run: RunFolder, _: object) -> int:
        if causes:
            raise causes.pop(0)
        return 2

    monkeypatch.setattr(dashboard, "show", show)
    write(make_run("run", ALIGN), 1, 2)
    assert "database is locked" in look()[1]
    assert look() == ("", "")
    assert "left to process 7 on here" in look()[1]
    assert look() == ("", "")
    assert "2 step(s) shown" in look()[0]


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chekpoints"):
        dashboard.main([str(tmp_path), str(tmp_path / "chekpoints")])


@pytest.mark.slow
def test_all_projects_are_served_from_before_the_first_run_on(make_run: MakeRun, tmp_path: Path) -> None:
    script = "import sys; from train.verbs import dashboard as d; d.PERIOD = 0.2; sys.exit(d.main(sys.argv[1:]))"
    (runs := tmp_path / "runs").mkdir()
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(runs)], cwd=tmp_path, stdout=said, stderr=said,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def wait_for(words: str) -> str:
        until(lambda: words in (tmp_path / "said").read_text() or process.poll() is not None, seconds=100)
        text = (tmp_path / "said").read_text()
        assert words in text
        return text

    try:
        text = wait_for("waiting for one")
        for project in ("anchorformer", "mine"):
            run = make_run(f"runs/{project}", ALIGN, tracker={
                "_target_": "train.observe.trackers.none.NoTracker", "project": project,
            })  # fmt: skip
            write(run, 1, 2)
            wait_for(f"{project}: 2 step(s) shown")
        (runs / "mine" / "metrics.jsonl").write_text("{\n")
        wait_for("mine is left out: JSONDecodeError")
        url = next(word for word in text.split() if word.startswith("http"))
        asked = urllib.request.Request(f"{url}api/get_all_projects", b"{}", {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            assert {"anchorformer", "mine"} <= set(json.loads(answer.read())["data"])
        assert urlsplit(url).query == ""
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    for project in ("anchorformer", "mine"):
        assert rows(tmp_path / ".cache" / "trackio", project) == [(f"runs/{project}", 1), (f"runs/{project}", 2)]


SERVE = """
import sys
def told(event, arguments):
    if event == "socket.bind" and isinstance(arguments[1], tuple):
        print("bound", arguments[1][0], file=sys.__stdout__, flush=True)
sys.addaudithook(told)
from train.observe.trackers.trackio import TrackioConfig
print("served", TrackioConfig(folder=sys.argv[1]).serve(), flush=True)
"""


@pytest.mark.slow
def test_the_dashboard_is_bound_to_loopback_alone(tmp_path: Path) -> None:
    # By these, other programs on the same library are opened to the network.
    variables = {**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path)], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert {address for word, address, *_ in found if word == "bound"} == {LOOPBACK}
    assert [urlsplit(address).hostname for word, address, *_ in found if word == "served"] == [LOOPBACK]
    assert "write_token" not in done.stdout, "the token lets a visitor delete runs"
