"""Runs with records to show, and what tests read back of trackers that have shown them."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from train.compose import ROOT
from train.observe.journal import Journal
from train.run.folder import RunFolder

WANDB = {"_target_": "train.observe.trackers.wandb.WandbConfig"}
TRACKIO = {"_target_": "train.observe.trackers.trackio.TrackioConfig"}
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


def over() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def synced(folder: RunFolder, *words: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "train", "sync", str(folder.path), *words], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def rows(folder: Path, project: str = "anchorformer") -> list[tuple[str, int]]:
    """Run and step of all that lies in a database of Trackio."""
    with sqlite3.connect(folder / f"{project}.db") as database:
        found = database.execute("select run_name, step, metrics from metrics order by run_name, step").fetchall()
    assert all("train/loss" in json.loads(metrics) for *_, metrics in found)
    return [(name, step) for name, step, _ in found]
