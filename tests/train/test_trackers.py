"""Trackers: fed from the run's files, each step once, and nothing that happens to one reaches the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchorformer.errors import UserError
from tests.train.cases import ALIGN
from tests.train.tracked import KEY, WANDB, histories, over, rows, synced, write
from tests.waiting import until
from train import rank
from train.compose import ROOT
from train.distributed import alone
from train.observe import observer
from train.observe.background import Background
from train.observe.feed import BusyError, curves, feed
from train.observe.journal import Journal, Tail
from train.observe.trackers.base import Picture, Subject, TrackerConfig
from train.observe.trackers.trackio import TrackioConfig
from train.observe.trackers.wandb import WandbConfig
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]


class Shelf(TrackerConfig):
    """A tracker in memory, which remembers as a real one does."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float], list[str]]] = []

    @contextmanager
    def open(self, subject: Subject) -> Iterator[Any]:
        shelf = self

        class Session:
            shown = max((step for step, *_ in shelf.steps), default=0)

            def log(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
                shelf.steps.append((step, dict(values), [picture.caption for picture in pictures]))
                self.shown = step

        yield Session()


def test_every_step_is_shown_once_with_all_that_belongs_to_it(make_run: MakeRun) -> None:
    folder, shelf = make_run("run", ALIGN), Shelf()
    write(folder, 1, 3)
    folder.metrics.write_text(folder.metrics.read_text() + '{"step": 4, "lo')  # in the middle of a line
    assert feed(folder, shelf, over()) == 3
    assert feed(folder, shelf, over()) == 0
    # Resumed from a checkpoint of step 1: its steps 2 and 3 are there already, with the same numbers.
    write(folder, 2, 6, resumed_after=1)
    assert feed(folder, shelf, over()) == 3
    assert [step for step, *_ in shelf.steps] == [1, 2, 3, 4, 5, 6]
    assert shelf.steps[5] == (
        6,
        {"train/loss": 1 / 6, "train/clipped": 0.0, "train/lr/connector": 0.1, "eval/docvqa/loss": 0.6,
         "eval/docvqa/score": 0.5, "eval/docvqa/groups/human/score": 0.25, "health/images": 1.0,
         "health/coverage": 0.5},
        ["?\nb (right: c / d)"],
    )  # fmt: skip


def test_a_run_that_goes_on_is_followed_by_one_at_a_time(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.observe.feed.PERIOD", 0.01)
    folder, shelf, event = make_run("run", ALIGN), Shelf(), threading.Event()
    write(folder, 1, 2)
    thread = threading.Thread(target=feed, args=[folder, shelf, event])
    thread.start()
    while len(shelf.steps) < 2:
        time.sleep(0.01)
    with pytest.raises(BusyError):
        feed(folder, shelf, over())
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "loss": 0.5}\n{"step": 4,')
    event.set()
    thread.join(10)
    assert [step for step, *_ in shelf.steps] == [1, 2, 3]


def test_a_tail_keeps_to_the_file_that_it_began(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.take()) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(tail.take()) == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert list(tail.take()) == [{"step": 2}]
    Journal(path, 1).close()  # a resumption takes step 2 back, in another file of that name
    assert list(tail.take()) == []
    tail.close()


def test_only_what_changes_is_a_curve() -> None:
    assert curves("eval", {"step": 3, "task": "a", "score": None, "n": 4, "metric": "anls"}) == {}
    assert curves("train", {"step": 3, "time": {"seconds": 2}}) == {"train/time/seconds": 2.0}


STUB = {
    "hangs": (
        "import pathlib, time\n"
        "def init(**_):\n    pathlib.Path(__file__).with_name('hangs').touch()\n    time.sleep(600)\n"
        "Settings = dict"
    ),
    "raises": "def init(**_):\n    raise RuntimeError('no network')\nSettings = dict",
}


@pytest.mark.parametrize("kind", ["hangs", pytest.param("raises", marks=pytest.mark.slow)])
def test_a_broken_tracker_does_not_reach_the_run(
    make_run: MakeRun, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub = tmp_path / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(STUB[kind])
    monkeypatch.setenv("PYTHONPATH", str(stub.parent))
    monkeypatch.setattr("train.run.identity.ROOT", ROOT)
    started: list[Background] = []

    class Kept(Background):
        def __init__(self, folder: RunFolder) -> None:
            super().__init__(folder)
            started.append(self)
            if kind == "raises":
                started[0]._process.wait(60)

    monkeypatch.setattr(observer, "Background", Kept)
    plain, tracked = make_run("plain", ALIGN), make_run("tracked", ALIGN, tracker=WANDB)
    if kind == "raises":  # there is a step to show before the first of this attempt
        write(tracked, 1, 1)
        monkeypatch.setattr(observer, "Journal", lambda path, step: Journal(path, step or 1))
    for folder in (plain, tracked):
        rank.run_rank(folder.read_config(), folder, alone())
    try:
        losses = [
            [json.loads(line)["loss"] for line in folder.metrics.read_text().splitlines()][-6:]
            for folder in (plain, tracked)
        ]
        assert losses[0] == losses[1]
        assert tracked.done.exists()
        warnings = [record.message for record in caplog.records if "python -m train sync" in record.message]
        assert len(warnings) == (1 if kind == "raises" else 0)
        if kind == "hangs":
            # So short a run may be over before the process has got as far as the tracker.
            deadline = time.monotonic() + 60
            while not (stub / "hangs").exists():
                assert time.monotonic() < deadline, "the tracker was never started"
                time.sleep(0.05)
            assert started[0]._process.poll() is None, "it hangs still, and nobody waits"
            with pytest.raises(BusyError):
                feed(tracked, Shelf(), over())
    finally:
        os.killpg(started[0]._process.pid, signal.SIGKILL) if started[0]._process.poll() is None else None
        started[0]._process.wait()
    shelf = Shelf()
    feed(tracked, shelf, over())
    assert [step for step, *_ in shelf.steps][-6:] == [1, 2, 3, 4, 5, 6], "a later sync is complete"


def test_a_tracker_that_cannot_be_started_does_not_reach_the_run(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: RunFolder) -> Background:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(observer, "Background", refused)
    run = make_run("run", ALIGN, tracker=WANDB)
    rank.run_rank(run.read_config(), run, alone())
    assert run.done.exists()
    assert [message for message in caplog.messages if "cannot be started" in message]


def test_a_tracker_that_hangs_ends_soon_after_its_run(make_run: MakeRun, tmp_path: Path) -> None:
    stub = tmp_path / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(STUB["hangs"])
    folder = make_run("run", ALIGN, tracker=WANDB)
    write(folder, 1, 2)
    script = (
        "import sys; from train.observe import background as b; b.GRACE = 0.5\n"
        "b.os.nice = lambda by: print(f'nice {by}', flush=True)\nb.main(sys.argv[1:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder.path)], cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(stub.parent)}, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    assert "given up" in process.stderr
    assert process.stdout == "nice 10\n", "it comes behind the training"


@contextmanager
def listener() -> Iterator[tuple[str, list[object]]]:
    """A server that notes who connects, standing for everything outside this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls: list[object] = []

        def listen() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                calls.append(address)
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_what_a_wandb_that_hung_has_not_shown_is_shown_by_sync(make_run: MakeRun) -> None:
    folder = make_run("run", ALIGN, tracker=WANDB)
    write(folder, 1, 2)
    tracker = Background(folder)
    try:
        until(lambda: any(folder.tracker.glob("wandb/offline-run-*/*.wandb")), seconds=100)
        os.killpg(tracker._process.pid, signal.SIGSTOP)  # it hangs, in the middle of a session
        write(folder, 3, 4, resumed_after=2)
        assert tracker.trouble() is None
        tracker.leave()
    finally:
        os.killpg(tracker._process.pid, signal.SIGKILL)
        tracker._process.wait()
    assert "4 step(s) shown" in synced(folder)
    assert histories(folder) == [1, 2, 3, 4]


def test_every_project_of_wandb_has_every_step(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, int]] = []

    class Session:
        def __init__(self, *, project: str, **_: object) -> None:
            self._project = project

        def log(self, values: object, step: int) -> None:
            logged.append((self._project, step))

        def finish(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Session, Settings=dict, Image=lambda *_, **__: None))
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING", "WANDB_API_KEY"):  # as they were, behind the test
        monkeypatch.setenv(name, "")
    run = make_run("run", ALIGN)
    write(run, 1, 2)
    assert [feed(run, WandbConfig(project=name), over()) for name in ("a", "b", "a")] == [2, 2, 0]
    write(run, 3, 3, resumed_after=2)
    assert [feed(run, WandbConfig(project=name), over()) for name in ("a", "b")] == [1, 1]
    assert feed(run, WandbConfig(project="a", entity="team"), over()) == 3
    assert sorted(logged) == [("a", 1), ("a", 1), ("a", 2), ("a", 2), ("a", 3), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]


@pytest.mark.slow
def test_wandb_offline_makes_files_and_no_connection(make_run: MakeRun) -> None:
    folder = make_run("run", ALIGN, tracker=WANDB)
    write(folder, 1, 4)
    with listener() as (address, calls):
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"), address)
        variables = {**proxies, "no_proxy": "", "NO_PROXY": "", "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY}
        assert "4 step(s) shown" in synced(folder, **variables)
        assert "0 step(s) shown" in synced(folder, **variables)
        # A session that was killed is thrown away, with what it had of steps 5 and 6.
        (broken := folder.tracker / "wandb" / f"offline-run-20991231_000000-{_id(folder)}").mkdir()
        write(folder, 3, 6, resumed_after=2)
        assert "2 step(s) shown" in synced(folder, **variables)
        assert calls == []
    assert not broken.exists()
    assert histories(folder) == [1, 2, 3, 4, 5, 6]
    assert len(list(folder.tracker.glob("wandb/offline-run-*"))) == 2
    assert len(list(folder.tracker.glob("wandb/offline-run-*/files/media/images/anchors/*.png"))) == 2
    assert not [path for path in folder.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def _id(folder: RunFolder) -> str:
    return str(json.loads((folder.tracker / "wandb.json").read_text())["id"])


ONLINE = """
import json, os, pathlib
from pathlib import Path
class Settings:
    def __init__(self, **_): pass
class Image:
    def __init__(self, path, caption): self.path = path
class Run:
    def __init__(self, path):
        self.path = path
        self.step = json.loads(path.read_text().splitlines()[-1])[0] + 1 if path.is_file() else 0
    def log(self, values, step):
        with self.path.open("a") as file:
            file.write(json.dumps([step, sorted(values)]) + chr(10))
        if os.environ.get("DIES_AT") == str(step):
            os._exit(9)
    def finish(self): pass
def init(*, id, mode, **_):
    assert mode == "online" == os.environ["WANDB_MODE"]
    return Run(Path(os.environ["SERVICE"]) / id)
"""


@pytest.mark.slow
def test_online_the_service_says_where_the_run_goes_on(make_run: MakeRun, tmp_path: Path) -> None:
    stub, service = tmp_path / "stub" / "wandb", tmp_path / "service"
    for folder in (stub, service):
        folder.mkdir(parents=True)
    (stub / "__init__.py").write_text(textwrap.dedent(ONLINE))
    run = make_run("run", ALIGN)
    write(run, 1, 5)
    words = ("tracker=wandb", "tracker.mode=online")
    variables = {"PYTHONPATH": str(stub.parent), "SERVICE": str(service), "WANDB_API_KEY": KEY}
    with pytest.raises(AssertionError):
        synced(run, *words, **variables, DIES_AT="3")
    assert "2 step(s) shown" in synced(run, *words, **variables)
    (path,) = service.iterdir()
    assert path.name == _id(run)
    assert [json.loads(line)[0] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_trackio_has_every_run_once(make_run: MakeRun, tmp_path: Path) -> None:
    one, other = make_run("one", ALIGN), make_run("other", ALIGN)
    words = ("tracker=trackio", f"tracker.folder={tmp_path / 'trackio'}", "tracker.group=sweep")
    write(one, 1, 4)
    write(other, 1, 2)
    assert "4 step(s) shown" in synced(one, *words)
    assert "2 step(s) shown" in synced(other, *words)
    write(one, 4, 6, resumed_after=3)
    assert "2 step(s) shown" in synced(one, *words)
    assert rows(tmp_path / "trackio") == [("one", step) for step in range(1, 7)] + [("other", 1), ("other", 2)]
    # Another run of that name is not taken for the one that was there.
    (one.tracker / "trackio.json").unlink()
    assert "6 step(s) shown" in synced(one, *words)
    assert len({name for name, _ in rows(tmp_path / "trackio")}) == 3


def test_what_trackio_has_not_kept_is_an_error(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage = SimpleNamespace(get_run_records=lambda _: [], get_max_step_for_run=lambda *_, **__: 1)
    session = SimpleNamespace(id="", log=lambda *_, **__: None)
    fake = SimpleNamespace(
        TRACKIO_DIR=tmp_path, SQLiteStorage=storage, init=lambda **_: session, finish=lambda: None, Image=None
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for name in ("TRACKIO_DIR", "HF_HUB_OFFLINE"):  # as they were, behind the test
        monkeypatch.setenv(name, "1")
    run = make_run("run", ALIGN)
    write(run, 1, 2)
    with pytest.raises(sqlite3.OperationalError, match="after 1"):
        feed(run, TrackioConfig(folder=str(tmp_path)), over())
    with pytest.raises(UserError, match="one database"):
        feed(run, TrackioConfig(folder=str(tmp_path / "other")), over())


def test_what_is_not_installed_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrackioConfig, "package", "trackio_that_is_not_there")
    with pytest.raises(UserError, match=r"\.\[dashboard\]"):
        TrackioConfig().check()
