"""Saving that is killed, or meets a full or read-only disk; and ranks that are more or fewer at the next start."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

import train.__main__ as entry
from anchorformer import model_folder
from anchorformer.errors import UserError
from anchorformer.model_folder import write_manifest
from tests.train.cases import ALIGN, FINETUNE
from tests.train.conftest import pair  # noqa: F401 (a fixture)
from tests.train.ranks import Ranks, RanksFailed
from tests.train.test_resume import record, run_until
from tests.train.tiny_world import write_world
from train.checkpoint import damage, fit, retention
from train.compose import ROOT, compose
from train.distributed import World, alone
from train.engine import whole
from train.engine.files import Files
from train.prepare import prepare
from train.run.folder import RunFolder
from train.verbs import checkpoint as verb

pytestmark = pytest.mark.faults

MakeRun = Callable[..., RunFolder]
PAIR: dict[str, Any] = {
    "engine": "deepspeed", "hardware__ranks": 2, "hardware__micro_batch": 1, "stage__max_steps": 6,
    "checkpoint__every": 2, "checkpoint__keep": 9, "resume": "auto",
}  # fmt: skip


def killed_in_save(world: World, folder: str) -> None:
    """The last rank writes half of its file of step 4, and is gone."""
    save = Files.save

    def half(files: Files, state_dict: Any, path: str) -> None:
        save(files, state_dict, path)
        if world.rank == world.size - 1 and "step-00000004" in path:
            os.truncate(path, os.stat(path).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    Files.save = half  # type: ignore[method-assign]
    run_until(world, folder)


@pytest.mark.loopback
@pytest.mark.parametrize("zero", [2, 3])
def test_a_kill_in_the_middle_of_a_save(
    pair: Ranks, make_run: MakeRun, zero: int  # noqa: F811
) -> None:  # fmt: skip
    reference, run = (make_run(name, FINETUNE, **PAIR, zero__stage=zero) for name in ("whole", "killed"))
    pair.run(run_until, folder=str(reference.path))
    with pytest.raises(RanksFailed, match="killed"):
        pair.run(killed_in_save, folder=str(run.path))
    names = {path.name for path in run.state.iterdir()}
    assert names == {".tmp-step-00000004", "step-00000002", "latest"}
    assert (run.state / "latest").read_text() == "step-00000002\n"
    pair.run(run_until, folder=str(run.path))
    assert record(run) == record(reference)
    assert not list(run.state.glob(".tmp-*")), "the next save clears away what the kill has left"


def full_disk(world: World, folder: str, on_rank: int) -> str:
    """What this rank is told when one of them cannot write its part of step 4."""
    save, save_file = torch.save, whole.save_file

    def refused(state: Any, path: Any, **named: Any) -> None:
        if world.rank == on_rank and "step-00000004" in str(path):
            # As torch and safetensors call it.
            if save_file is whole.save_file:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1317824 vs 1317712")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        (save if save_file is whole.save_file else save_file)(state, path, **named)

    is_whole = RunFolder(Path(folder)).read_config().stage.trains.keys() == {"connector"}
    try:
        if is_whole:
            whole.save_file = refused  # type: ignore[assignment]
        else:
            torch.save = refused
        run_until(world, folder)
    except UserError as error:
        return str(error)
    finally:
        torch.save, whole.save_file = save, save_file
    return "nothing"


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("trains", "zero", "on_rank"), [(FINETUNE, 2, 0), (FINETUNE, 2, 1), (FINETUNE, 3, 1), (ALIGN, 2, 0)]
)
def test_a_full_disk_is_told_by_all_ranks(
    pair: Ranks, make_run: MakeRun, trains: dict[str, Any], zero: int, on_rank: int  # noqa: F811
) -> None:  # fmt: skip
    run = make_run("full", trains, **PAIR, zero__stage=zero)
    told = pair.run(full_disk, folder=str(run.path), on_rank=on_rank)
    assert told[0] == told[1], "no rank is left waiting for another"
    assert str(run.state / ".tmp-step-00000004") in told[0]
    assert "bytes free" in told[0]
    assert not list(run.state.glob(".tmp-*")), "half a checkpoint is not left on the full disk"
    assert (run.state / "latest").read_text() == "step-00000002\n"
    assert damage(run.state / "step-00000002", alone()) is None
    pair.run(run_until, folder=str(run.path))
    assert len(record(run)) == 6


def full_at_export(world: World, folder: str) -> str:
    """What this rank is told when rank 0 cannot write the trained model."""

    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_index = model_folder._write_index
    model_folder._write_index = refused
    try:
        run_until(world, folder)
    except UserError as error:
        return str(error)
    finally:
        model_folder._write_index = write_index
    return "nothing"


@pytest.mark.loopback
def test_a_disk_that_is_full_for_the_model_is_told_by_all_ranks(pair: Ranks, make_run: MakeRun) -> None:  # noqa: F811
    run = make_run("full", ALIGN, **{**PAIR, "stage__max_steps": 2}, zero__stage=2)
    told = pair.run(full_at_export, folder=str(run.path))
    assert told[0] == told[1], "no rank is left waiting for another"
    assert f"{run.model} cannot be written" in told[0]
    assert not run.done.exists()


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[None]:
    """A file system of its own at `place`; skips where this user may not mount one."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a file system takes root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.loopback
def test_a_disk_that_is_too_small_is_told_before_the_first_step(make_run: MakeRun) -> None:
    run = make_run("small", ALIGN)
    with small_disk(run.state, "size=200k"), pytest.raises(UserError, match="there is no room") as caught:
        run_until(alone(), str(run.path))
    assert caught.value.found == "0.2 MB free"
    assert caught.value.expected.endswith("MB needed")
    assert not run.metrics.exists()


@pytest.mark.loopback
def test_a_read_only_disk_is_told_before_the_first_step(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("locked", ALIGN)
    with small_disk(run.state, "ro"), pytest.raises(UserError, match="cannot be written") as caught:
        run_until(alone(), str(run.path))
    assert os.strerror(errno.EROFS) in caught.value.found
    assert str(run.state) in caught.value.what
    assert not run.metrics.exists()


@pytest.mark.loopback
def test_a_read_only_output_folder_is_told_by_the_launcher(tmp_path: Path, tiny_backbones: Path) -> None:
    words = [*write_world(tmp_path, tiny_backbones), "run=locked"]
    with small_disk(tmp_path / "checkpoints", "size=50m"):
        prepare(compose(words), [])
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "checkpoints")], check=True)
        with pytest.raises(UserError, match="cannot be made"):
            prepare(compose([*words, "run=other"]), [])


@pytest.fixture(scope="module")
def single() -> Iterator[Ranks]:
    """One rank in a process group of its own."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def give_ranks(folder: RunFolder, ranks: int) -> None:
    """What the launcher does with another `hardware.ranks`."""
    config = yaml.safe_load(folder.config.read_text())
    config["hardware"]["ranks"] = ranks
    folder.config.write_text(yaml.safe_dump(config))


def ids(folder: RunFolder) -> list[list[str]]:
    return [sorted(line["sample_ids"]) for line in record(folder)]


@pytest.mark.parametrize(("trains", "zero"), [(FINETUNE, 2), (FINETUNE, 3), (ALIGN, 3)])
def test_a_run_goes_on_with_other_ranks(
    pair: Ranks, single: Ranks, make_run: MakeRun, trains: dict[str, Any], zero: int  # noqa: F811
) -> None:  # fmt: skip
    """From two ranks to one, and back to two: same steps, samples and learning rates; losses but for their rounding."""
    reference, run = (make_run(name, trains, **PAIR, zero__stage=zero) for name in ("whole", "moved"))
    pair.run(run_until, folder=str(reference.path))
    pair.run(run_until, folder=str(run.path), stop_at=3)
    give_ranks(run, 1)
    if trains is FINETUNE:
        with pytest.raises(RanksFailed, match=f"python -m train checkpoint convert {run.path} "):
            single.run(run_until, folder=str(run.path))
        assert verb.main(["convert", str(run.path)]) == 0
    single.run(run_until, folder=str(run.path), stop_at=5)
    give_ranks(run, 2)
    fit(run.state, run.read_config())
    pair.run(run_until, folder=str(run.path))
    assert [line["step"] for line in record(run)] == [1, 2, 3, 4, 5, 6]
    assert ids(run) == ids(reference)
    for mine, other in zip(record(run), record(reference), strict=True):
        assert mine["lr"] == other["lr"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert not list(run.state.glob(f"{retention.UNIVERSAL}*")), "a conversion goes behind the next checkpoint"


def test_a_rehearsal_proves_the_way_through(tmp_path: Path, tiny_backbones: Path) -> None:
    words = [*write_world(tmp_path, tiny_backbones), "run=first", "rehearse=true", "stage.global_batch=4", "seed=3"]
    done = subprocess.run(
        [sys.executable, "-m", "train", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    proved = [line for line in done.stdout.splitlines() if line.startswith("proved: ")]
    assert len(proved) == 6
    for part in ("2 rank(s) took 2 steps of 4 samples", "rank 1 was killed (-9)", "step-00000001", "answers 3"):
        assert part in "\n".join(proved)
    runs = tmp_path / "checkpoints"
    assert not (runs / "first").exists(), "the run itself has not begun"
    folder = RunFolder(runs / "rehearsals" / "first")
    config = folder.read_config()
    assert (config.seed, config.stage.global_batch, config.stage.max_steps) == (3, 4, 2)
    assert not (folder.path / "LOCK").exists()
    assert json.loads(folder.metrics.read_text().splitlines()[1])["step"] == 2


def test_a_rehearsal_fails_where_the_run_would(
    tmp_path: Path, tiny_backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation config that transformers would refuse to save months later, behind the last step."""
    words = [*write_world(tmp_path, tiny_backbones), "run=first"]
    start = prepare(compose(words), []).start
    path = start / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5}))
    write_manifest(start)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ranks would have been started"))
    with pytest.raises(UserError, match=r"generation_config\.json is not valid"):
        entry.main([*words, "rehearse=true"])
