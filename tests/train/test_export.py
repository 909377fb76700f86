"""The trained model is complete and durable under its name, or not there, and all ranks hear why."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer import model_folder
from anchorformer.errors import UserError
from anchorformer.model_folder import MANIFEST, bytes_copied, derive_folder, part_state, partial_of, read_manifest
from anchorformer.weights import check_folder, load_model
from tests.train.cases import ALIGN
from tests.train.conftest import MakeRun
from tests.train.test_resume import run_until
from train.distributed import alone
from train.run.folder import RunFolder


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_while_the_model_is_written(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("full", ALIGN, stage__max_steps=2, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "_write_index", refuse)
        with pytest.raises(UserError, match=r"model cannot be written") as caught:
            run_until(alone(), str(run.path))
    assert "No space left on device" in caught.value.found
    assert not run.done.exists()
    assert not run.model.exists()
    assert not partial_of(run.model).exists(), "half a model is not left on the full disk"
    run_until(alone(), str(run.path))
    assert run.done.exists()
    check_folder(run.model, every_hash=True)


def test_what_cannot_be_linked_needs_room(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_copied(tiny_folder, {"connector"}, tmp_path) == 0
    monkeypatch.setattr(os, "link", refuse)
    sizes = {name: entry["bytes"] for name, entry in read_manifest(tiny_folder).items()}
    others = sum(size for name, size in sizes.items() if name.startswith(("vision_tower", "language_model")))
    assert bytes_copied(tiny_folder, {"connector"}, tmp_path) == others
    assert bytes_copied(tiny_folder, set(model_folder.PARTS), tmp_path) == 0
    assert not list(tmp_path.iterdir())


def test_every_file_is_on_the_disk_before_it_has_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable: set[str] = set()
    out, sync = tmp_path / "model", os.fsync

    def note(handle: int) -> None:
        durable.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        assert out.exists() == (tmp_path.name in durable), "and its folder behind it"
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    model = load_model(tiny_folder, torch.float32)
    derive_folder(tiny_folder, {"connector": part_state(model, "connector")}, out)
    files = {path.name for path in out.iterdir()}
    assert MANIFEST in files
    assert durable == files | {partial_of(out).name, tmp_path.name}


def test_a_kill_between_model_and_done_costs_an_export(make_run: MakeRun) -> None:
    run = make_run("killed", ALIGN, stage__max_steps=2, resume="auto")
    run_until(alone(), str(run.path))
    before = (run.model / "connector.safetensors").read_bytes()
    run.done.unlink()
    partial_of(run.model).mkdir()
    run_until(alone(), str(run.path))
    assert (run.model / "connector.safetensors").read_bytes() == before
    assert RunFolder(run.path).done.exists()
    assert not partial_of(run.model).exists()
