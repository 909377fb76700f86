"""Runs on cached features: the live run's losses, with no tower running, on one rank and sharded over two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from anchorformer.errors import UserError
from anchorformer.vision import VisionTower
from tests.train.cases import ALIGN, EVERYTHING, FINETUNE, run_config
from tests.train.ranks import Ranks
from train import rank
from train.distributed import World, alone
from train.features import cache_of, fill_cache
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]


def cached_run(world: World, folder: str) -> None:
    """A whole run in whose ranks the tower may not run."""

    def forward(*_: Any) -> None:
        raise AssertionError("the tower ran")

    run, live = RunFolder(Path(folder)), VisionTower.forward
    rank.prepare_process(run.read_config())
    VisionTower.forward = forward  # type: ignore[method-assign,assignment]
    try:
        rank.run_rank(run.read_config(), run, world)
    finally:
        VisionTower.forward = live  # type: ignore[method-assign]


def with_cache(run: RunFolder, cache: Path) -> RunFolder:
    values = yaml.safe_load(run.config.read_text())
    values["data"]["feature_cache"] = str(cache)
    run.write_sealed({run.config.name: yaml.safe_dump(values)})
    fill_cache(run.read_config(), run.start)
    return run


def losses(run: RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


@pytest.mark.parametrize("trains", [ALIGN, FINETUNE])
def test_a_run_has_the_losses_of_the_live_one(trains: dict[str, Any], make_run: MakeRun, tmp_path: Path) -> None:
    live = make_run("live", trains, stage__max_steps=3)
    rank.run_rank(live.read_config(), live, alone())
    cached = with_cache(make_run("cached", trains, stage__max_steps=3), tmp_path / "features")
    cached_run(alone(), str(cached.path))
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    config = cached.read_config()
    caches = [cache_of(config, model, torch.float32, torch.device("cpu")) for model in (cached.start, cached.model)]
    assert len({cache.folder for cache in caches if cache}) == 1  # the next stage reads the same entries


@pytest.mark.slow
def test_ranks_without_images_stay_in_step(pair: Ranks, make_run: MakeRun, tmp_path: Path) -> None:
    """Under ZeRO-3 a rank that ran the tower would wait for ever for one that does not."""
    options = {"stage__max_steps": 3, "hardware__micro_batch": 1}
    sharded = {"engine": "deepspeed", "zero__stage": 3, "hardware__ranks": 2}
    live = make_run("live", ALIGN, **options)
    rank.run_rank(live.read_config(), live, alone())
    cached = with_cache(make_run("sharded", ALIGN, **options, **sharded), tmp_path / "features")
    pair.run(cached_run, folder=str(cached.path))
    assert losses(cached) == pytest.approx(losses(live), rel=1e-4)


def test_a_tower_that_trains_is_refused() -> None:
    with pytest.raises(UserError, match="being trained"):
        run_config(EVERYTHING, data={"root": "-", "sources": {}, "feature_cache": "features"})
