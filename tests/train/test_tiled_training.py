"""Training with tiles: two stages in one process, and the same gradients however images of all grids are dealt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import load_model
from tests.train.cases import ALIGN, FINETUNE
from tests.train.conftest import write_run
from tests.train.ranks import Ranks
from tests.train.test_gradients import DEALS, assert_same, gradients, plain_gradients
from train.distributed import alone
from train.rank import run_rank

Assemble = Callable[..., Path]
RAGGED = {"grids": [[1, 1], [1, 2], [2, 2]]}


@pytest.mark.parametrize("select", ["tile", "image"])
def test_both_stages_with_tiles(assemble_tiny: Assemble, tiny_data: Path, tmp_path: Path, select: str) -> None:
    start = assemble_tiny(tiling={"grids": [[2, 2], [1, 2]], "select": select})
    for name, trains in (("align", ALIGN), ("finetune", FINETUNE)):
        run = write_run(tmp_path, start, tiny_data, name, trains, stage__max_steps=2)
        run_rank(run.read_config(), run, alone())
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(line["images"] > line["samples"] for line in lines)  # tiles
        start = run.model
    model, processor = load_model(start, torch.float32), AnchorFormerProcessor.from_pretrained(start)
    assert model.tiling == processor.image_transform.tiling
    assert model.tiling.select.value == select
    assert model.tiling.counts == (3, 5)


def test_another_tiling_than_the_folder_has_is_refused(
    assemble_tiny: Assemble, tiny_data: Path, tmp_path: Path
) -> None:
    start = assemble_tiny(tiling={"grids": [[2, 2]]})
    run = write_run(tmp_path, start, tiny_data, "other", ALIGN, model__tiling={"grids": [[1, 2]]})
    with pytest.raises(UserError, match=r"tiling of .* is not the one"):
        run_rank(run.read_config(), run, alone())


@pytest.mark.parametrize(
    ("select", "zero"),
    [pytest.param("tile", 2, marks=pytest.mark.slow), pytest.param("tile", 3, marks=pytest.mark.slow),
     pytest.param("image", 2, marks=pytest.mark.slow), ("image", 3)],
)  # fmt: skip
def test_ranks_with_other_grids_stay_in_step(pair: Ranks, assemble_tiny: Assemble, select: str, zero: int) -> None:
    """One rank has text only at times, and selectors are called for other sizes on each."""
    folder = assemble_tiny(tiling=RAGGED | {"select": select})
    expected = plain_gradients(folder, DEALS["1x8x1"], FINETUNE)
    results = pair.run(gradients, folder=str(folder), deal=DEALS["text-only rank"], trains=FINETUNE, zero=zero)
    assert_same(results[0], expected)
    assert results[0][:2] == results[1][:2]
