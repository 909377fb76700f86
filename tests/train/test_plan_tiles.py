"""The plan with tiles: positions, passes through the tower, and views of the connector."""

from __future__ import annotations

import pytest

from train.choices import Part
from train.compose import compose
from train.config import RunConfig
from train.plan.fit import memory_at
from train.plan.flops import Work, forward_flops
from train.plan.shapes import Shapes, read_shapes
from train.plan.table import Assumptions, plan_stage, render


def planned(*overrides: str) -> tuple[RunConfig, Shapes]:
    config = compose(["stage=align", "experiment=paper_7b", "hardware=a100x8", *overrides], {"data.root": "-"})
    return config, read_shapes(config)


@pytest.mark.parametrize(("tiling", "tiles"), [("none", 1), ("grid_2x2", 4), ("grid_3x3_global", 10), ("anyres", 5)])
def test_a_tile_costs_what_an_image_costs(tiling: str, tiles: int) -> None:
    _, plain = planned()
    config, shapes = planned(f"tiling={tiling}")
    work = Work.of_sample(shapes, text=18, supervised=17, images=2)
    assert work.positions == 18 + 2 * tiles * 145
    assert work.images == 2 * tiles
    assert shapes.connector == plain.connector
    one = forward_flops(plain, Work.of_sample(plain, text=18, supervised=17, images=1))
    for part in (Part.vision_tower, Part.connector):
        assert forward_flops(shapes, work)[part] == 2 * tiles * one[part]
    assert memory_at(config, shapes, plan_stage(config).choice.layout, 2048).total > 0
    assert Work.of_sample(shapes, text=18, supervised=17, images=2, tiles=3).positions == 18 + 6 * 145


def test_over_all_tiles_an_image_has_as_many_anchors_as_a_tile() -> None:
    _, plain = planned()
    _, shapes = planned("tiling=grid_2x2_global", "model.tiling.select=image")
    work = Work.of_sample(shapes, text=18, supervised=17, images=3)
    assert (work.positions, work.images) == (18 + 3 * 145, 15)
    forward = forward_flops(shapes, work)
    one = forward_flops(plain, Work.of_sample(plain, text=18, supervised=17, images=1))
    assert forward[Part.vision_tower] == 15 * one[Part.vision_tower]
    # Three views of 2881 tokens: dearer than three of 577, cheaper than fifteen of them with 145 queries each.
    assert 3 * one[Part.connector] < forward[Part.connector] < 15 * one[Part.connector]


def test_the_table_counts_tiles() -> None:
    config, _ = planned("tiling=grid_2x2_global")
    text = render(plan_stage(config), Assumptions(mfu=0.4))
    assert "tiles of 145" in text
    assert "1 image(s), 5 tiles, 743 positions" in text
    assert "743" not in render(plan_stage(planned()[0]), Assumptions(mfu=0.4))
