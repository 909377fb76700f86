"""A conversion for other ranks that is ended anywhere leaves no process, and is made again as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anchorformer.model_folder import sha256
from tests.faults.killed_conversion import CHILD, PLACES
from tests.faults.planted import run_whole
from tests.train.cases import FINETUNE
from tests.train.ranks import Ranks
from train.checkpoint import damage, retention
from train.compose import ROOT
from train.distributed import alone
from train.run.folder import RunFolder
from train.verbs import checkpoint as verb

MakeRun = Callable[..., RunFolder]
PROGRAM = Path(__file__).with_name("killed_conversion.py")
CASES = [(CHILD, signal.SIGTERM), *((place, signal.SIGKILL) for place in PLACES)]


def processes_of(folder: Path) -> list[int]:
    """Those that have a path below the folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # gone since it was listed
        if f"{folder}".encode() in words:
            found.append(int(path.parent.name))
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*.pt")}


@pytest.mark.parametrize(
    "cases", [pytest.param(CASES[:1], marks=pytest.mark.faults), pytest.param(CASES[1:], marks=pytest.mark.chaos)],
    ids=["told to end", "killed everywhere"],
)  # fmt: skip
def test_a_conversion_is_ended(
    make_run: MakeRun, pair: Ranks, tmp_path: Path, cases: list[tuple[str, signal.Signals]]
) -> None:
    run = make_run(
        "moved", FINETUNE, engine="deepspeed", zero__stage=2, hardware__ranks=2, hardware__micro_batch=1,
        stage__max_steps=2, checkpoint__every=2,
    )  # fmt: skip
    pair.run(run_whole, folder=str(run.path))
    converted = run.state / f"{retention.UNIVERSAL}step-00000002"
    for place, number in cases:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), place, number.name, str(run.path)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
        )  # fmt: skip
        assert done.returncode == -number, (place, done.stderr)
        deadline = time.monotonic() + 30
        while (left := processes_of(run.state)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], "the converter and its workers end with the launcher"
        if converted.exists():
            assert damage(converted, alone()) is None, "under its name it is complete"
    assert verb.main(["convert", str(run.path)]) == 0
    assert damage(converted, alone()) is None
    found = hashes(converted)
    assert not list(run.state.glob(f"{retention.TEMPORARY}*")), "what the kills have left is gone"
    shutil.rmtree(converted)
    assert verb.main(["convert", str(run.path)]) == 0
    assert hashes(converted) == found
