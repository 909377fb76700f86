"""A run that was killed and resumed leaves the same record as one that was not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from anchorformer.errors import UserError
from data.config import OnBad
from tests.train.cases import ALIGN, FINETUNE, run_config
from tests.train.conftest import launch_again
from tests.train.ranks import Ranks, RanksFailed
from train import checkpoint, rank, trainer
from train.checkpoint import damage, reshape, retention, seal
from train.distributed import World, alone
from train.engine.saved import Form, Saved
from train.run.folder import RunFolder
from train.run.identity import numbers_digest

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
    run_until(alone(), str(resumed.path), stop_at=4)
    names = sorted(path.name for path in resumed.state.iterdir())
    assert names == [".abandoned-step-00000004", ".abandoned-step-00000006", "latest", "step-00000002"]
    assert (resumed.state / "latest").read_text() == "step-00000002\n"
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


def test_a_checkpoint_knows_the_run_s_trackers(make_run: MakeRun) -> None:
    run = make_run("run", ALIGN, stage__max_steps=2, checkpoint__every=1, resume="auto")
    run.tracker.mkdir()
    (run.tracker / "wandb.json").write_text('{"id": "abcd", "shown": 7, "sessions": []}')
    (run.tracker / "trackio.json").write_text('{"id": "half')  # of no harm
    run_until(alone(), str(run.path), stop_at=2)
    assert json.loads((run.state / "step-00000001" / "trainer.json").read_text())["trackers"] == {"wandb": "abcd"}
    shutil.rmtree(run.tracker)
    run_until(alone(), str(run.path))
    assert run.tracker_ids == {"wandb": "abcd"}


@pytest.mark.parametrize("fault", ["no COMPLETE", "truncated", "changed byte", "missing file", "other manifest"])
def test_damaged_checkpoints_are_left_aside(saved: RunFolder, fault: str) -> None:
    newest = saved.state / "step-00000002"
    assert damage(newest, alone()) is None
    state = newest / "connector.safetensors"
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
            (newest / seal.MANIFEST).write_text('{"files": {}}')
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


def test_going_back_leaves_the_other_course(saved: RunFolder, make_run: MakeRun) -> None:
    """After resuming an older step, that step's successors are the newest, and pruning spares them."""
    launch_again(saved, resume=str(saved.state / "step-00000001"), checkpoint={"every": 1, "keep": 1})
    run_until(alone(), str(saved.path))
    names = sorted(path.name for path in saved.state.iterdir())
    assert names == ["latest", "step-00000002"], "the course that was left is behind the new one"
    assert damage(saved.state / "step-00000002", alone()) is None


def test_damaged_checkpoints_are_not_counted(saved: RunFolder) -> None:
    one, two = (saved.state / f"step-0000000{step}" for step in (1, 2))
    three, nine = (saved.state / f"step-0000000{step}" for step in (3, 9))
    shutil.copytree(one, three)
    shutil.copytree(one, nine)
    (nine / "connector.safetensors").write_bytes(b"")
    retention.prune(saved.state, 2, two)
    assert not one.exists()
    assert two.exists(), "the one just written stays, whatever its number"
    assert three.exists()


def of_shards(folder: Path, ranks: int) -> Path:
    """A complete checkpoint of so many ranks, as far as is looked at before a conversion."""
    folder.mkdir(parents=True)
    saved = Saved(form=Form.shards, ranks=ranks, zero_stage=2, optimizer_steps=1, scheduler={})
    seal.seal(folder, [{"engine.json": seal.entry(saved.write(folder), 0)}])
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints that a converter, which does nothing, was called for."""
    names: list[str] = []

    def noted(source: Path, target: Path) -> None:
        names.append(source.name)
        target.mkdir()

    monkeypatch.setattr(reshape, "convert", noted)
    return names


def test_a_conversion_of_another_checkpoint_is_replaced(tmp_path: Path, conversions: list[str]) -> None:
    """As a run leaves it that has gone back behind a step, and come there again."""
    position = of_shards(tmp_path / "step-00000001", 2)
    assert reshape.ensure(position) == reshape.ensure(position)
    assert len(conversions) == 1
    shutil.rmtree(position)
    of_shards(position, 4)
    assert reshape.ensure(position) == reshape.converted(position)
    assert len(conversions) == 2


def test_what_will_be_resumed_from_is_converted(tmp_path: Path, conversions: list[str]) -> None:
    """Also where the newest fits, but turns out to be damaged."""
    of_shards(tmp_path / "step-00000001", 2)
    newest = of_shards(tmp_path / "step-00000002", 1) / "engine.json"
    config = run_config(FINETUNE, zero__stage=2, resume="auto")
    checkpoint.fit(tmp_path, config)
    assert conversions == []
    newest.write_bytes(newest.read_bytes()[:-1] + b" ")
    checkpoint.fit(tmp_path, config)
    assert conversions == ["step-00000001"]
    with pytest.raises(UserError, match="cannot be resumed from"):
        checkpoint.fit(tmp_path, replace(config, resume=str(tmp_path)))


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    saved: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new one is complete: what is left of an old one is a matter of room, and tried again."""

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    two = saved.state / "step-00000002"
    with monkeypatch.context() as planted:
        planted.setattr(shutil, "rmtree", busy)
        retention.prune(saved.state, 1, two)
        assert retention.sweep(saved.state) == []
    assert caplog.text.count("could not be cleared away") == 2
    assert not (saved.state / "step-00000001").exists(), "half of one is not left under a good name"
    assert len(retention.sweep(saved.state)) == 1


def test_a_save_that_fails_leaves_nothing(saved: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk it would be in the way of the next one."""
    launch_again(saved, resume=str(saved.state / "step-00000001"))
    left = saved.state / ".tmp-step-00000007"
    left.mkdir()

    def full(*_: Any) -> None:
        assert not left.exists(), "what an earlier kill has left goes before the first step"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(seal, "seal", full)
    with pytest.raises(UserError, match="No space left"):
        run_until(alone(), str(saved.path))
    assert not list(saved.state.glob(".tmp-*"))


def test_a_full_disk_is_told_before_saving(
    saved: RunFolder, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(path.stat().st_size for path in (saved.state / "step-00000002").iterdir())
    for folder, free in ((saved, needed // 2), (make_run("fresh", ALIGN, checkpoint__every=1), 0)):
        launch_again(folder, resume=str(saved.state / "step-00000001") if folder is saved else "never")
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError, match=r"B free\n.*B needed"):
            run_until(alone(), str(folder.path))
        assert not list(folder.state.glob(".tmp-*"))


def test_changed_data_are_refused(make_run: MakeRun, tiny_data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "data"
    shutil.copytree(tiny_data, copied)
    folder = make_run("moved", ALIGN, stage__max_steps=2, checkpoint__every=1)
    config = yaml.safe_load(folder.config.read_text())
    config["data"]["root"] = str(copied)
    folder.config.write_text(yaml.safe_dump(config))
    run_until(alone(), str(folder.path))
    launch_again(folder, resume=str(folder.state / "step-00000001"))
    (copied / "mix.json").write_text((copied / "mix.json").read_text().replace("star", "moon"))
    with pytest.raises(UserError, match="data have changed since the checkpoint of step 1: source mix\n"):
        run_until(alone(), str(folder.path))
    assert (folder.state / "step-00000002").exists(), "nothing is set aside by a resumption that was refused"


def test_bad_image_policy_may_change_on_resumption() -> None:
    config = run_config(ALIGN)
    lenient = replace(config, data=replace(config.data, on_bad_image=OnBad.skip, max_dropped_share=0.5))
    assert numbers_digest(lenient) == numbers_digest(config)


def save_twice(world: World, folder: str) -> list[str]:
    """Per rank, what `damage` says after the sealed file of the last rank has lost its last byte's value."""
    run_until(world, folder)
    newest = max((Path(folder) / "state").glob("step-*"))
    told = [str(damage(newest, world))]
    if world.is_main:
        entries = json.loads((newest / seal.MANIFEST).read_text())["files"]
        path = newest / max(name for name, entry in entries.items() if entry["rank"] == world.size - 1)
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    world.barrier()
    return [*told, str(damage(newest, world))]


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_rank_lists_and_checks_its_own_files(pair: Ranks, make_run: MakeRun, zero: int) -> None:
    run = make_run(
        "own", FINETUNE, engine="deepspeed", zero__stage=zero, hardware__ranks=2, hardware__micro_batch=1,
        stage__max_steps=1,
    )  # fmt: skip
    first, second = pair.run(save_twice, folder=str(run.path))
    assert first == second, "both ranks know what only the second has read"
    assert first[0] == "None"
    assert first[1].endswith("is damaged")
    files = json.loads((run.state / "step-00000001" / seal.MANIFEST).read_text())["files"]
    assert {entry["rank"] for entry in files.values()} == {0, 1}
    assert all(entry["rank"] == 1 for name, entry in files.items() if "rank_1" in name.replace("mp_rank", ""))
