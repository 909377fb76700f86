"""A run that is done stands for its command only while config and start are what they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anchorformer.errors import UserError
from anchorformer.model_folder import MANIFEST, sha256
from tests.train.cases import ALIGN
from tests.train.conftest import MakeRun
from train.prepare import is_done


def test_a_done_run_is_taken_only_for_what_it_was(make_run: MakeRun, tiny_folder: Path) -> None:
    folder = make_run("done", ALIGN)
    config = replace(folder.read_config(), resume="auto")
    (folder.path / "start.txt").write_text(f"{tiny_folder}\n{sha256(tiny_folder / MANIFEST)}\n")
    assert not is_done(config)
    folder.done.write_text("6 steps\n")
    assert is_done(config)
    assert not is_done(replace(config, resume="never"))

    with pytest.raises(UserError, match=r"another config\n.*max_steps"):
        is_done(replace(config, stage=replace(config.stage, max_steps=7)))
    (folder.path / "start.txt").write_text(f"{tiny_folder}\n{'0' * 64}\n")
    with pytest.raises(UserError, match="has been replaced"):
        is_done(config)
