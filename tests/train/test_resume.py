"""A run that was killed and resumed leaves the same record as one that was not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from tests.train.cases import ALIGN, FINETUNE
from tests.train.ranks import Ranks, RanksFailed
from train import checkpoint, rank, trainer
from train.checkpoint import damage
from train.distributed import World, alone
from train.folder import RunFolder

MakeRun = Callable[..., RunFolder]
STEPS, EVERY, STOPPED_AT = 20, 4, 13


class Interrupted(Exception):
    """Planted in the middle of a step."""


def run_until(world: World, folder: str, stop_at: int | None = None, is_killed: bool = False) -> None:
    """Runs a prepared folder; in the middle of step `stop_at` every rank is left or killed."""
    run = RunFolder(Path(folder))
    config = run.read_config()
    rank.prepare_process(config)
    check = trainer.check_numbers

    def planted(step: int, *rest: Any) -> None:
        if step == stop_at:
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted
        check(step, *rest)

    trainer.check_numbers = planted  # type: ignore[assignment]
    try:
        rank.run_rank(config, run, world)
    except Interrupted:
        return
    finally:
        trainer.check_numbers = check


def record(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's metrics without what depends on the clock."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for line in lines:
        del line["time"]
    return lines


CASES = {
    f"{stage}, ZeRO-{zero}": (trains, zero)
    for stage, trains in (("align", ALIGN), ("finetune", FINETUNE))
    for zero in (2, 3)
}


def sharded(make_run: MakeRun, case: str) -> tuple[RunFolder, RunFolder]:
    """Two folders of the same run; the second one may be resumed."""
    trains, zero = CASES[case]
    changes = {
        "engine": "deepspeed", "zero__stage": zero, "hardware__ranks": 2, "hardware__micro_batch": 1,
        "stage__max_steps": STEPS, "checkpoint__every": EVERY,
    }  # fmt: skip
    return make_run("whole", trains, **changes), make_run("broken", trains, **changes, resume="auto")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(pair: Ranks, make_run: MakeRun, case: str) -> None:
    whole, broken = sharded(make_run, case)
    pair.run(run_until, folder=str(whole.path))
    with pytest.raises(RanksFailed, match="killed"):
        pair.run(run_until, folder=str(broken.path), stop_at=STOPPED_AT, is_killed=True)
    assert [line["step"] for line in record(broken)] == list(range(1, STOPPED_AT))
    pair.run(run_until, folder=str(broken.path))
    assert record(broken) == record(whole)
    assert broken.done.exists()


def test_left_and_resumed_equals_uninterrupted(pair: Ranks, make_run: MakeRun) -> None:
    whole, broken = sharded(make_run, "finetune, ZeRO-3")
    pair.run(run_until, folder=str(whole.path))
    pair.run(run_until, folder=str(broken.path), stop_at=STOPPED_AT)
    assert not broken.done.exists()
    pair.run(run_until, folder=str(broken.path))
    assert record(broken) == record(whole)


def test_plain_engine_resumes_exactly(make_run: MakeRun) -> None:
    changes = {"stage__max_steps": 6, "checkpoint__every": 2, "checkpoint__keep": 9, "hardware__micro_batch": 2}
    whole, resumed = make_run("whole", FINETUNE, **changes), make_run("resumed", FINETUNE, **changes, resume="auto")
    run_until(alone(), str(whole.path))
    run_until(alone(), str(resumed.path))
    for step in (4, 6):
        for path in (resumed.state / f"step-{step:08d}").iterdir():
            path.unlink()
    run_until(alone(), str(resumed.path))
    assert record(resumed) == record(whole)


def test_two_runs_write_the_same_record(make_run: MakeRun) -> None:
    one, other = make_run("one", FINETUNE), make_run("other", FINETUNE)
    run_until(alone(), str(one.path))
    run_until(alone(), str(other.path))
    strip = [json.dumps(line) for line in record(one)]
    assert strip == [json.dumps(line) for line in record(other)]
    assert len({line["loss"] for line in record(one)}) == len(strip), "every step sees other samples"


@pytest.fixture
def saved(make_run: MakeRun) -> RunFolder:
    folder = make_run("saved", ALIGN, stage__max_steps=2, checkpoint__every=1)
    run_until(alone(), str(folder.path))
    return folder


@pytest.mark.parametrize("fault", ["no COMPLETE", "truncated", "changed byte", "missing file", "other manifest"])
def test_damaged_checkpoints_are_left_aside(saved: RunFolder, fault: str) -> None:
    newest = saved.state / "step-00000002"
    assert damage(newest) is None
    state = newest / "plain.pt"
    match fault:
        case "no COMPLETE":
            (newest / checkpoint.COMPLETE).unlink()
        case "truncated":
            state.write_bytes(state.read_bytes()[:-100])
        case "changed byte":
            raw = bytearray(state.read_bytes())
            raw[len(raw) // 2] ^= 1
            state.write_bytes(raw)
        case "missing file":
            state.unlink()
        case "other manifest":
            (newest / checkpoint.MANIFEST).write_text('{"files": {}}')
    assert checkpoint.find(saved.state, "auto", alone()) == saved.state / "step-00000001"
    with pytest.raises(UserError, match="cannot be resumed from"):
        checkpoint.find(saved.state, str(newest), alone())


def test_nothing_to_resume_starts_afresh(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "auto", alone()) is None
    assert checkpoint.find(tmp_path, "never", alone()) is None


def test_another_configuration_is_refused(saved: RunFolder, make_run: MakeRun) -> None:
    newest = str(saved.state / "step-00000002")
    other = make_run("other", {"connector": {"lr": 5e-3}}, stage__max_steps=2, resume=newest)
    with pytest.raises(UserError, match="another configuration"):
        run_until(alone(), str(other.path))


def test_only_the_newest_checkpoints_stay(make_run: MakeRun) -> None:
    folder = make_run("kept", ALIGN, stage__max_steps=5, checkpoint__every=1, checkpoint__keep=2)
    run_until(alone(), str(folder.path))
    assert sorted(path.name for path in folder.state.iterdir()) == ["latest", "step-00000004", "step-00000005"]
    assert (folder.state / "latest").read_text() == "step-00000005\n"
