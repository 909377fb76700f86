"""A step of a run is taken once more and comes out as it was; what has changed meanwhile is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import train.__main__ as entry
from anchorformer.errors import UserError
from tests.train.cases import FINETUNE
from train import rank
from train.distributed import alone
from train.faults.guards import TrainingHalted
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunFolder, int], RunFolder]:
    """`python -m train replay` with its ranks in this process; returns the replay's own folder."""

    def call(folder: RunFolder, step: int) -> RunFolder:
        started: list[str] = []
        monkeypatch.setattr(os, "execve", lambda _, argv, __: started.append(argv[-1]))
        entry.main(["replay", str(folder.path), f"step={step}"])
        own = RunFolder(Path(started[0]))
        go(own)
        return own

    return call


def go(folder: RunFolder) -> None:
    config = folder.read_config()
    rank.prepare_process(config)
    rank.run_rank(config, folder, alone())


def files(folder: RunFolder) -> dict[str, int]:
    """Everything in a run's folder but its replays, with the time of the last change."""
    paths = [path for path in folder.path.rglob("*") if path.is_file()]
    own = [path for path in paths if "replay" not in path.relative_to(folder.path).parts]
    return {str(path): path.stat().st_mtime_ns for path in own}


def test_a_step_comes_out_as_it_was(
    make_run: MakeRun, replay: Callable[[RunFolder, int], RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run("done", FINETUNE, checkpoint__every=2, checkpoint__keep=9)
    go(folder)
    before = files(folder)
    with caplog.at_level("INFO"):
        own = replay(folder, 4)
    assert "resumed from" in caplog.text
    assert "step-00000002 after step 2" in caplog.text, "the checkpoint of step 4 holds weights that step 4 has changed"
    assert "step 4 is reproduced to the bit" in caplog.text
    lines = [json.loads(line) for line in own.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "part_grad_norm" in lines[-1]
    assert files(folder) == before, "a replay writes nowhere but below replay/"
    assert not own.state.exists()
    assert not own.model.exists()
    assert not own.done.exists()
    caplog.clear()
    (folder.state / "step-00000002" / "COMPLETE").unlink()
    with caplog.at_level("INFO"):
        replay(folder, 3)
    assert "resumed" not in caplog.text, "without a checkpoint before it, from the start"
    assert "step 3 is reproduced to the bit" in caplog.text


def test_another_loss_or_sample_is_told(make_run: MakeRun, replay: Callable[[RunFolder, int], RunFolder]) -> None:
    folder = make_run("changed", FINETUNE, stage__max_steps=2)
    go(folder)
    text = folder.metrics.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines[1]["loss"] *= 1 + 3e-6
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"step 2 of .* is not reproduced\n  found:    loss"):
        replay(folder, 2)
    lines[1]["sample_ids"].reverse()
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"is not reproduced\n  found:    samples"):
        replay(folder, 2)


def test_a_halt_comes_again(
    make_run: MakeRun, replay: Callable[[RunFolder, int], RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    # A real one: Adam's first step of this size leaves no finite logits.
    folder = make_run("wild", {"connector": {"lr": 1e30}, "language_model": {"lr": 1e30}})
    with pytest.raises(TrainingHalted, match="step 2: "):
        go(folder)
    with pytest.raises(UserError, match="has not come to step 2"):
        replay(folder, 2)
    folder.black_boxes.mkdir()
    (folder.black_boxes / "rank_0.json").write_text(json.dumps({"step": 2, "cause": "halted"}))
    with caplog.at_level("INFO"):
        replay(folder, 2)
    assert "step 2 halts the run again" in caplog.text
    (folder.black_boxes / "rank_0.json").write_text(json.dumps({"step": 1, "cause": "hung"}))
    folder.metrics.unlink()
    with pytest.raises(UserError, match="the failure that ended the run"):
        replay(folder, 1)


@pytest.mark.parametrize("words", [[], ["RUN"], ["RUN", "step=0"], ["RUN", "step=x"], ["RUN", "steps=3"]])
def test_what_is_asked_for_has_to_be_clear(words: list[str]) -> None:
    with pytest.raises(UserError, match="replay takes a run and a step"):
        entry.main(["replay", *words])
