"""Two strict runs leave the same bytes, and the guards over a step's numbers cost it nothing."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anchorformer.errors import UserError
from tests.train.cases import ALIGN, FINETUNE, run_config
from tests.train.ranks import Ranks
from train import rank, trainer
from train.compose import ROOT
from train.distributed import World, alone
from train.repro import naming_what_is_not_deterministic, set_determinism
from train.run.folder import RunFolder
from train.start import Topology, command, environment

MakeRun = Callable[..., RunFolder]


def go(world: World, folder: str) -> None:
    config = RunFolder(Path(folder)).read_config()
    rank.prepare_process(config)
    rank.run_rank(config, RunFolder(Path(folder)), world)


def test_two_strict_runs_leave_the_same_bytes(pair: Ranks, make_run: MakeRun) -> None:
    runs = [
        make_run(
            name, FINETUNE, repro="strict", engine="deepspeed", zero__stage=2, hardware__ranks=2,
            hardware__micro_batch=1, hardware__precision="bf16", stage__max_steps=4,
        )
        for name in ("one", "other")
    ]  # fmt: skip
    for run in runs:
        pair.run(go, folder=str(run.path))
    one, other = ([{**json.loads(line), "time": {}} for line in run.metrics.read_text().splitlines()] for run in runs)
    assert json.dumps(one) == json.dumps(other)
    weights = [{path.name: path.read_bytes() for path in run.model.glob("*.safetensors")} for run in runs]
    assert weights[0] == weights[1]
    assert len(weights[0]) >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_two_strict_runs_on_cuda_leave_the_same_bytes(make_run: MakeRun, precision: str) -> None:
    """Each in a process of its own: cuBLAS reads its workspace once."""
    runs = [
        make_run(name, FINETUNE, repro="strict", hardware__device="cuda", hardware__precision=precision)
        for name in ("one", "other")
    ]
    for run in runs:
        argv = command(run.path, run.read_config(), Topology())
        done = subprocess.run(
            argv, cwd=ROOT, env=environment(run.read_config(), os.environ), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = ([{**json.loads(line), "time": {}} for line in run.metrics.read_text().splitlines()] for run in runs)
    assert json.dumps(one) == json.dumps(other)
    weights = [{path.name: path.read_bytes() for path in run.model.glob("*.safetensors")} for run in runs]
    assert weights[0] == weights[1]


def test_strict_asks_for_it_on_cuda_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    set_determinism(run_config(ALIGN, hardware__device="cuda"))
    assert asked == []
    set_determinism(run_config(ALIGN, hardware__device="cuda", repro="strict"))
    assert asked == [True]
    assert not torch.backends.cudnn.benchmark


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    set_determinism(run_config(ALIGN))
    with pytest.raises(UserError, match=r"put_.* has no deterministic form"), naming_what_is_not_deterministic():
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="another"), naming_what_is_not_deterministic():
        raise RuntimeError("another")


class Looks(TorchDispatchMode):
    """Counts how often a value of a tensor is read back, which on a GPU makes the host wait."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[func.name()] += func.name() in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Exchanges between ranks and looks at tensors inside the block."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        exchange = getattr(World, name)

        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return exchange(*arguments)

        return call

    with monkeypatch.context() as patch, Looks(counts):
        for name in ("gather", "sum", "broadcast", "barrier"):
            patch.setattr(World, name, counting(name))
        yield counts


def test_the_guard_over_numbers_costs_no_look_and_no_exchange(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("guarded", FINETUNE)
    with counted(monkeypatch) as guarded:
        go(alone(), str(run.path))
    monkeypatch.setattr(trainer, "check_numbers", lambda *_: None)
    with counted(monkeypatch) as free:
        go(alone(), str(make_run("free", FINETUNE).path))
    assert guarded == free
    assert guarded["sum"] == run.read_config().stage.max_steps, "loss and norms travel together, once a step"
    assert guarded["aten::_local_scalar_dense"] > 0
    assert guarded["gather"] > 0


def test_clipped_steps_are_counted(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run("clipped", FINETUNE)
    with caplog.at_level("INFO"):
        go(alone(), str(run.path))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    clip_norm = run.read_config().stage.clip_norm
    assert [line["clipped"] for line in lines] == [line["grad_norm"] > clip_norm for line in lines]
    count = sum(line["clipped"] for line in lines)
    assert count > 0
    assert f"gradients were clipped in {count} of {len(lines)} step(s)" in caplog.text
    off = make_run("off", FINETUNE, stage__clip_norm=0, stage__max_steps=2)
    go(alone(), str(off.path))
    assert not any(json.loads(line)["clipped"] for line in off.metrics.read_text().splitlines())
