"""A rank from the run folder it is given to the model it leaves behind, and what it says when it cannot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anchorformer.errors import UserError
from anchorformer.weights import check_folder, load_model
from tests.train.cases import ALIGN, FINETUNE
from train import distributed, rank
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as torchrun would have started it, alone; pytest keeps its own logging."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rank, "start_logging", lambda *_: None)
    yield
    distributed.stop()


@pytest.mark.usefixtures("as_rank")
def test_main_leaves_a_model(make_run: MakeRun) -> None:
    run = make_run("one", FINETUNE, stage__max_steps=3, stage__template="v1", log__every=2)
    assert rank.main([str(run.path)]) == 0
    assert run.done.read_text() == "3 steps\n"
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ["part_grad_norm" in line for line in lines] == [False, True, True]
    assert all(line["samples"] == len(line["sample_ids"]) == 4 for line in lines)
    check_folder(run.model)
    model = load_model(run.model, torch.float32)
    assert all(torch.isfinite(value).all() for value in model.parameters())

    from transformers import AutoProcessor

    assert AutoProcessor.from_pretrained(run.model).template == "v1", "the stage's template goes with its model"
    assert AutoProcessor.from_pretrained(run.start).template == "chat", "and the start folder keeps its own"


@pytest.mark.usefixtures("as_rank")
def test_a_damaged_start_is_told_before_weights_are_loaded(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("damaged", ALIGN)
    broken = tmp_path / "broken"
    shutil.copytree(run.start, broken)
    raw = bytearray((broken / "connector.safetensors").read_bytes())
    raw[-1] ^= 1
    (broken / "connector.safetensors").write_bytes(raw)
    (run.path / "start.txt").write_text(f"{broken}\n")
    monkeypatch.setattr("anchorformer.weights.load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="damaged at connector"):
        rank.main([str(run.path)])
    told = json.loads(run.halted.read_text())
    assert told["exit_code"] == 2
    assert "expected:" in told["message"]


def test_a_full_disk_does_not_turn_a_mistake_into_a_crash(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(rank, "start_logging", lambda *_: None)
    run = make_run("full", ALIGN)
    monkeypatch.setattr("train.run.folder.write_atomically", full)
    with pytest.raises(UserError, match="not a rank"):
        rank.main([str(run.path)])
    assert "No space left" in caplog.text


def test_a_process_without_ranks_is_told_so(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(rank, "start_logging", lambda *_: None)
    with pytest.raises(UserError, match="not a rank"):
        rank.main([str(make_run("alone", ALIGN).path)])


def test_logging_of_a_rank(tmp_path: Path) -> None:
    """In a process of its own, whose logging it takes over, and under another name, as torchrun has it."""
    program = (
        "import logging, runpy, sys\n"
        "from pathlib import Path\n"
        "from transformers.utils import logging as bars\n"
        "module = runpy.run_module('train.rank', run_name='as_main')\n"
        "module['start_logging'](module['RunFolder'](Path(sys.argv[1])), int(sys.argv[2]))\n"
        "module['log'].info('hello, %s', 'hf_s3cret')\n"
        "print(bars.is_progress_bar_enabled())\n"
    )
    for number in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(number)], cwd=ROOT, capture_output=True, text=True,
            check=True, env=os.environ | {"HF_TOKEN": "hf_s3cret"},
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == str(number == 0), "one rank draws"
        assert "train.rank: hello, ***\n" in (tmp_path / "logs" / f"rank_{number}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_under_the_agent(make_run: MakeRun, zero: int) -> None:
    run = make_run(
        "pair", FINETUNE, stage__max_steps=4, checkpoint__every=2, engine="deepspeed", zero__stage=zero,
        hardware__ranks=2, hardware__micro_batch=1,
    )  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "train.faults.agent",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "train.rank",
        str(run.path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.done.exists()
    for number in range(2):
        assert "train.trainer" in run.log(number).read_text() or number > 0
        assert "connector" in run.log(number).read_text()
    assert "left 0:00:00" in done.stdout
    check_folder(run.model)
    load_model(run.model, torch.float32)
