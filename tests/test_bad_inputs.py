"""Every planted bad input, one row each: refused with found, expected and remedy, or accepted as declared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor

from anchorformer.errors import UserError
from tests.bad_inputs import checkpoints, configs, folders, images, records
from tests.bad_inputs.case import Case, World
from tests.spoilt import encoded, spoken
from tests.train.cases import ALIGN
from tests.train.conftest import write_run
from tests.train.test_resume import run_until
from train.distributed import alone

CASES = [case for room in (configs, records, images, folders, checkpoints) for case in room.CASES]
SCREEN = 24
"""Lines that a message may have."""


@pytest.fixture(scope="module")
def sound(tiny_folder: Path, tiny_backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """What the cases spoil copies of: a model, its backbones, and a run of one step."""
    root = tmp_path_factory.mktemp("sound")
    (root / "images").mkdir()
    (root / "images/good.png").write_bytes(encoded("PNG"))
    mix = [{"id": number, "image": "good.png", "conversations": spoken()} for number in range(4)]
    (root / "mix.json").write_text(json.dumps(mix))
    run = write_run(root, tiny_folder, root, "run", ALIGN, stage__max_steps=1, checkpoint__every=1)
    run_until(alone(), str(run.path))
    return World(root, tiny_folder, tiny_backbones, run.path, AutoProcessor.from_pretrained(tiny_folder))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, sound: World, tmp_path: Path) -> None:
    world = World(tmp_path, sound.model, sound.backbones, sound.run, sound.processor)
    if not case.says:
        case.plant(world)
        return
    with pytest.raises(UserError) as caught:
        case.plant(world)
    error = caught.value
    assert all((error.what, error.found, error.expected, error.remedy)), "each has to say something"
    assert len(str(error).splitlines()) <= SCREEN
    for words in case.says:
        assert words in str(error)


def test_the_table_is_as_long_as_it_says() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert sum(bool(case.says) for case in CASES) >= 200
