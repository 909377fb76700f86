"""What would waste a run is refused before its first step, and being asked changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anchorformer.errors import UserError
from tests.train.cases import ALIGN, FINETUNE, run_config
from tests.train.conftest import MakeRun
from tests.train.test_resume import run_until
from train.checkpoint import seal
from train.config import CheckpointConfig
from train.distributed import alone
from train.engine.plain import PlainEngine
from train.optim import build_optimizer, prime
from train.rehearse import shortened
from train.run.folder import RunFolder
from train.run.identity import numbers_digest
from train.verbs import prepare


def refused(folder: RunFolder, match: str) -> UserError:
    """The mistake that a run is refused with, before its first step and with nothing left behind."""
    with pytest.raises(UserError, match=match) as caught:
        run_until(alone(), str(folder.path))
    assert not folder.metrics.exists()
    assert not folder.state.is_dir() or not list(folder.state.glob("step-*"))
    return caught.value


def test_room_for_all_checkpoints_is_asked_for(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as will lie there at one time, and the model: what one of them takes is not enough."""
    sizes = {}
    for keep in (1, 3):
        run = make_run(f"keep{keep}", FINETUNE, checkpoint__every=1, checkpoint__keep=keep)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        told = refused(run, "there is no room").expected
        sizes[keep] = float(told.removesuffix(" MB needed"))
    monkeypatch.undo()
    run_until(alone(), str(run.path))
    newest = run.state / "step-00000006"
    one = sum(path.stat().st_size for path in newest.iterdir()) / 1e6
    model = sum((run.model / f"{part}.safetensors").stat().st_size for part in FINETUNE) / 1e6
    assert sizes[1] == pytest.approx(2 * one + model, rel=0.15)
    assert sizes[3] == pytest.approx(4 * one + model, rel=0.15)


def test_room_for_the_next_checkpoint_is_asked_for_on_resumption(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are already: none of them goes before the next one is complete."""
    run = make_run("full", ALIGN, checkpoint__every=2, checkpoint__keep=2, resume="auto")
    run_until(alone(), str(run.path))
    shutil.rmtree(run.state / "step-00000006")
    shutil.copytree(run.state / "step-00000004", run.state / "step-00000002")
    one = sum(path.stat().st_size for path in (run.state / "step-00000004").iterdir()) / 1e6
    model = (run.model / "connector.safetensors").stat().st_size / 1e6
    run.done.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="there is no room for 1 more checkpoint") as caught:
        run_until(alone(), str(run.path))
    assert float(caught.value.expected.removesuffix(" MB needed")) == pytest.approx(one + model, rel=0.15)


def test_a_state_that_cannot_be_written_is_told(make_run: MakeRun) -> None:
    run = make_run("blocked", ALIGN)
    run.state.touch()
    assert str(run.state) in refused(run, "cannot be written").what


def test_a_disk_that_gives_back_other_bytes_is_told(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    write = seal.seal

    def rotten(folder: Path, parts: list[seal.Entries]) -> None:
        write(folder, parts)
        path = folder / "connector.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(seal, "seal", rotten)
    told = refused(make_run("rotten", ALIGN), "cannot be read back")
    assert told.found == "connector.safetensors is damaged"


def test_a_load_that_changes_weights_is_told(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    load = PlainEngine.load

    def careless(engine: PlainEngine, folder: Path, converted: Path | None = None) -> None:
        load(engine, folder, converted)
        next(iter(engine.values().values())).values[0] += 1

    monkeypatch.setattr(PlainEngine, "load", careless)
    refused(make_run("careless", ALIGN), "not those that were saved")


def test_being_asked_leaves_no_trace(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import trainer

    asked, not_asked = make_run("asked", FINETUNE), make_run("not_asked", FINETUNE)
    run_until(alone(), str(asked.path))
    assert sorted(path.name for path in asked.state.iterdir()) == ["latest", "step-00000006"]
    assert json.loads(asked.identity.read_text())["order"]
    monkeypatch.setattr(trainer, "before_first_step", lambda _: None)
    run_until(alone(), str(not_asked.path))
    losses = [[json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()] for run in (asked, not_asked)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_the_state_that_is_made_is_the_one_of_a_first_step(fused: bool) -> None:
    """AdamW's own, but for what a step of size zero has counted."""
    device = torch.device("cuda" if fused else "cpu")
    config = run_config(ALIGN)
    model = torch.nn.Module()
    model.connector = torch.nn.Linear(3, 2, device=device)
    mine, torchs = (build_optimizer(model, config.stage, device) for _ in range(2))
    prime(mine, model.connector.parameters())
    for parameter in model.connector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torchs.step()
    for parameter in model.connector.parameters():
        made, expected = mine.state[parameter], torchs.state[parameter]
        assert made.keys() == expected.keys()
        for name, value in made.items():
            assert (value.dtype, value.device, value.shape) == (
                expected[name].dtype, expected[name].device, expected[name].shape,
            )  # fmt: skip
            assert not value.any()


def test_a_rehearsal_keeps_what_numbers_depend_on() -> None:
    config = run_config(FINETUNE, checkpoint__every=500, seed=7, hardware__micro_batch=2)
    short = shortened(config)
    assert short.checkpoint == CheckpointConfig(every=1, keep=2)
    assert short.run == "rehearsals/test"
    assert (short.stage.max_steps, short.stage.epochs) == (2, None)
    same_length = run_config(FINETUNE, seed=7, stage__max_steps=2, stage__name="align", hardware__micro_batch=2)
    assert numbers_digest(short) == numbers_digest(same_length)


def test_only_a_rehearsal_kills_itself(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a config says, a run that nobody rehearses is left alone."""
    run = make_run("real", ALIGN, stage__max_steps=2, checkpoint__every=1, rehearse=True)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("the run has killed itself"))
    run_until(alone(), str(run.path))
    assert run.done.is_file()


def test_a_rehearsal_is_not_prepared_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "compose", lambda _: run_config(ALIGN, rehearse=True))
    with pytest.raises(UserError, match="rehears") as caught:
        prepare.main([])
    assert "python -m train ... rehearse=true" in caught.value.remedy
