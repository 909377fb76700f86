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
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from tests.train.cases import ALIGN
from train import rank
from train.compose import ROOT
from train.distributed import alone
from train.observe import observer
from train.observe.background import Background
from train.observe.feed import BusyError, curves, feed
from train.observe.journal import Journal, Tail
from train.observe.trackers.base import Picture, Subject, TrackerConfig
from train.observe.trackers.trackio import LOOPBACK
from train.run.folder import RunFolder
from train.verbs import dashboard, sync

MakeRun = Callable[..., RunFolder]
WANDB = {"_target_": "train.observe.trackers.wandb.WandbConfig"}
KEY = "0123456789abcdef0123456789abcdef01234567"


def write(folder: RunFolder, first: int, last: int, resumed_after: int | None = None) -> None:
    """Records of steps as a run leaves them: those of a step's validation before its line."""
    kept = first - 1 if resumed_after is None else resumed_after
    metrics, health, evals = (Journal(path, kept) for path in (folder.metrics, folder.health, folder.evals))
    for step in range(first, last + 1):
        if step % 2 == 0:
            evals.write({"step": step, "dataset": "docvqa", "loss": step / 10})
            evals.write({"step": step, "task": "docvqa", "score": 0.5, "n": 7, "groups": {"human": {"score": 0.25}}})
        if step % 3 == 0:
            health.write({"step": step, "images": 1, "coverage": 0.5})
            media = folder.media / f"step-{step:08d}"
            media.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (28, 28), (9 * step, 0, 0)).save(media / "0-0.png")
            one = {"id": "a", "question": "?", "answer": "b", "references": ["c", "d"], "overlays": ["0-0.png"]}
            (media / "answers.json").write_text(json.dumps([one]))
        metrics.write({"step": step, "loss": 1 / step, "clipped": False, "lr": {"connector": 0.1}, "sample_ids": ["x"]})
    for journal in (metrics, health, evals):
        journal.close()


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


def over() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


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
    "hangs": "import time, pathlib\ndef init(**_):\n    pathlib.Path(__file__).with_name('hung').touch()\n"
    "    time.sleep(600)\nSettings = dict",
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
            assert started[0]._process.poll() is None, "it hangs still, and nobody waits"
            deadline = time.monotonic() + 60
            while not (stub / "hung").exists() and time.monotonic() < deadline:
                time.sleep(0.05)  # on a machine that is busy the run may be over before it hangs
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
    script = "import sys; from train.observe import background as b; b.GRACE = 0.5; b.main(sys.argv[1:])"
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder.path)], cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(stub.parent)}, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    assert "given up" in process.stderr


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


def histories(folder: RunFolder) -> list[int]:
    """Steps in the offline files of wandb, in the order in which they were logged."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for path in sorted(folder.tracker.glob("wandb/offline-run-*/*.wandb")):
        for payload in _payloads(path.read_bytes()[7:]):
            record = Record.FromString(payload)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return steps


def _payloads(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB, the first of them shorter by wandb's own header."""
    place, whole, begin = 0, b"", -7
    while place + 7 <= len(data):
        left = 32768 - (place - begin) % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def synced(folder: RunFolder, *words: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "train", "sync", str(folder.path), *words], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert rows(tmp_path) == [("one", step) for step in range(1, 7)] + [("other", 1), ("other", 2)]
    # Another run of that name is not taken for the one that was there.
    (one.tracker / "trackio.json").unlink()
    assert "6 step(s) shown" in synced(one, *words)
    assert len({name for name, _ in rows(tmp_path)}) == 3


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


def rows(folder: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(folder / "trackio" / "anchorformer.db") as database:
        found = database.execute("select run_name, step, metrics from metrics order by run_name, step").fetchall()
    assert all("train/loss" in json.loads(metrics) for *_, metrics in found)
    return [(name, step) for name, step, _ in found]


def test_sync_says_what_it_needs(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", ALIGN)
    for words, found in (([], "nothing"), ([str(tmp_path / "no"), "tracker=wandb"], "no such folder"),
                         ([str(run.path)], "tracker=none"), ([str(run.path), "tracker=tensorbord"], "tensorbord"),
                         ([str(run.path), "project=x"], "project=x"),
                         ([str(run.path), "tracker=wandb", "tracker.mod=online"], "mod")):  # fmt: skip
        with pytest.raises(UserError, match=found):
            sync.main(words)


def test_a_run_keeps_its_names_in_another_tracker(make_run: MakeRun) -> None:
    spec = {"_target_": "train.observe.trackers.none.NoTracker", "project": "mine", "group": "sweep"}
    tracker = sync.tracker_of(make_run("run", ALIGN, tracker=spec), {"tracker": "wandb", "tracker.entity": "team"})
    assert to_plain(tracker) == {
        "project": "mine", "group": "sweep", "name": None, "mode": "offline", "entity": "team",
    }  # fmt: skip


def test_what_is_not_installed_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.observe.trackers.trackio import TrackioConfig

    monkeypatch.setattr(TrackioConfig, "package", "trackio_that_is_not_there")
    with pytest.raises(UserError, match=r"\.\[dashboard\]"):
        TrackioConfig().check()


def test_a_run_that_cannot_be_read_keeps_no_other_from_the_dashboard(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    good, old = make_run("good", ALIGN), make_run("old", ALIGN)
    for run in (good, old):
        write(run, 1, 2)
    old.config.write_text(old.config.read_text() + "no_longer_there: 1\n")
    monkeypatch.setattr(dashboard, "show", lambda run, _: len(run.metrics.read_text().splitlines()))
    monkeypatch.setattr(dashboard.TrackioConfig, "serve", lambda _: "http://127.0.0.1:1")
    monkeypatch.setattr(dashboard.time, "sleep", interrupted)
    assert dashboard.main([str(good.path), str(old.path)]) == 0
    out, err = capsys.readouterr()
    assert "2 step(s) shown" in out
    assert "dashboard: http" in out
    assert "no_longer_there" in err
