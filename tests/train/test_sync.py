"""`train sync`: several runs, each for itself, and what becomes of them in one exit code."""

from __future__ import annotations

import os
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from tests.train.cases import ALIGN
from tests.train.conftest import MakeRun
from tests.train.tracked import KEY, TRACKIO, WANDB, rows, synced, write
from train.observe.feed import feed
from train.observe.trackers.none import NoTracker
from train.verbs import sync

STUB = """
import os
from pathlib import Path
class Settings:
    def __init__(self, **_): pass
class Run:
    step = 0
    def log(self, values, step): pass
    def finish(self): pass
def init(*, mode, name, **_):
    with Path(os.environ["SEEN"]).open("a") as file:
        file.write(f"{name} {mode} {os.environ.get('WANDB_API_KEY')}" + chr(10))
    if name == "raises":
        raise RuntimeError("no network")
    return Run()
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a wandb that does nothing was started with, a line per start; of the processes that sync starts."""
    stub = tmp_path / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(textwrap.dedent(STUB))
    paths = [str(stub.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return tmp_path / "seen"


def test_an_offline_run_takes_the_key_from_no_other(make_run: MakeRun, seen: Path, tmp_path: Path) -> None:
    for name, mode in (("one", "offline"), ("two", "online")):
        write(make_run(name, ALIGN, tracker=WANDB | {"mode": mode}), 1, 2)
        os.utime(tmp_path / name / "config.yaml", (len(name), 1 if name == "one" else 2))
    assert sync.main([str(tmp_path)]) == 0
    assert seen.read_text().splitlines() == ["one offline None", f"two online {KEY}"]
    assert os.environ["WANDB_API_KEY"] == KEY


def test_what_is_wrong_with_one_run_keeps_no_other_from_being_fed(
    make_run: MakeRun, seen: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    specs: dict[str, Any] = {"damaged": WANDB, "raises": WANDB, "untracked": None, "whole": WANDB}
    for at, (name, spec) in enumerate(specs.items()):
        run = make_run(name, ALIGN, **({"tracker": spec} if spec else {}))
        write(run, 1, 2)
        if name == "damaged":
            run.config.write_text("run: [")
        os.utime(run.config, (at, at))
    assert sync.main([str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert [line.rpartition("/")[2] for line in out.splitlines()] == ["whole: 2 step(s) shown"]
    for words in (
        "damaged/config.yaml cannot be read",
        "RuntimeError: no network",
        "untracked has no tracker of its own",
    ):
        assert words in err
    for name in ("damaged", "raises", "untracked"):
        assert f"{name} is left out" in err


def test_one_exit_code_for_several_runs() -> None:
    ends = {(0, 0): 0, (2, 2): 2, (75, 75): 75, (0, 75): 75, (0, 2): 1, (75, 1): 1, (1, 1): 1}
    assert {codes: sync._summary(list(codes)) for codes in ends} == ends


def test_a_run_that_is_being_fed_is_left_to_whom_it_names(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.observe.feed.PERIOD", 0.01)
    run, opened, is_over = make_run("run", ALIGN), threading.Event(), threading.Event()

    class Slow(NoTracker):
        def open(self, subject: Any) -> Any:
            opened.set()
            is_over.wait(60)
            raise RuntimeError("over")

    def fed() -> None:
        with pytest.raises(RuntimeError, match="over"):
            feed(run, Slow(), is_over)

    thread = threading.Thread(target=fed)
    thread.start()
    assert opened.wait(60)
    assert sync.main([str(run.path), "tracker=wandb"]) == 75
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    is_over.set()
    thread.join(60)


def test_sync_says_what_it_needs(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", ALIGN)
    for words, found in (([], "nothing"), ([str(tmp_path / "no"), "tracker=wandb"], "no such folder"),
                         ([str(run.path)], "tracker=none"), ([str(run.path), "tracker=tensorbord"], "tensorbord"),
                         ([str(run.path), "project=x"], "project=x"),
                         ([str(run.path), "tracker=wandb", "tracker.mod=online"], "mod")):  # fmt: skip
        with pytest.raises(UserError, match=found):
            sync.main(words)


def test_a_mistake_about_all_runs_is_said_once(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("one", "other"):
        write(make_run(name, ALIGN), 1, 1)
    with pytest.raises(UserError, match="mod"):
        sync.main([str(tmp_path), "tracker=wandb", "tracker.mod=online"])


def test_a_run_keeps_its_names_in_another_tracker(make_run: MakeRun) -> None:
    spec = {"_target_": "train.observe.trackers.none.NoTracker", "project": "mine", "group": "sweep"}
    tracker = sync.tracker_of(make_run("run", ALIGN, tracker=spec), {"tracker": "wandb", "tracker.entity": "team"})
    assert to_plain(tracker) == {
        "project": "mine", "group": "sweep", "name": None, "mode": "offline", "entity": "team",
    }  # fmt: skip


def test_runs_are_found_but_replays_and_rehearsals(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    for at, name in enumerate(("late", "sweep/trial", "unbegun", "late/replay", "late/rehearsals")):
        run = make_run(name, ALIGN)
        if name != "unbegun":
            write(run, 1, 1)
        os.utime(run.config, (10 - at, 10 - at))
    assert [run.path.name for run in sync.find_runs(tmp_path)] == ["trial", "late"]
    assert [run.path.name for run in sync.find_runs(tmp_path / "unbegun")] == ["unbegun"]


@pytest.mark.slow
def test_every_database_of_trackio_has_every_run_once(make_run: MakeRun, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    one = make_run("one", ALIGN, tracker=TRACKIO | {"folder": str(a)})
    other = make_run("other", ALIGN, tracker=TRACKIO | {"folder": str(b), "project": "mine"})
    write(one, 1, 2)
    write(other, 1, 3)
    assert sync.main([str(tmp_path)]) == 0  # each into its own
    assert (rows(a), rows(b, "mine")) == ([("one", 1), ("one", 2)], [("other", 1), ("other", 2), ("other", 3)])
    assert "2 step(s) shown" in synced(one, f"tracker.folder={b}")  # as a dashboard does with its own
    write(one, 3, 4, resumed_after=2)
    assert "2 step(s) shown" in synced(one)
    write(one, 5, 5, resumed_after=4)
    assert "3 step(s) shown" in synced(one, f"tracker.folder={b}")
    # As after a resumption whose folder had lost its notes.
    known = one.tracker_ids
    (one.tracker / "trackio.json").unlink()
    one.restore_tracker_ids(known)
    assert "1 step(s) shown" in synced(one)
    assert "0 step(s) shown" in synced(one, f"tracker.folder={b}")
    assert rows(a) == rows(b) == [("one", step) for step in range(1, 6)]
