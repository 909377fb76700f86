"""Parameter groups hold what a stage trains, once; the learning rate follows its course."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.cases import ALIGN, EVERYTHING, FINETUNE, load_frozen, run_config
from train.choices import Schedule
from train.config import StageConfig
from train.optim import build_optimizer, build_scheduler, lr_factor, parameter_groups

STAGE = run_config(ALIGN).stage


def stage_with(warmup: float, floor: float, schedule: Schedule = Schedule.cosine) -> StageConfig:
    return replace(STAGE, warmup_ratio=warmup, min_lr_ratio=floor, schedule=schedule)


@given(st.integers(1, 3000), st.floats(0, 0.5), st.floats(0, 0.9))
def test_course_of_the_learning_rate(total: int, warmup: float, floor: float) -> None:
    stage = stage_with(warmup, floor)
    course = [lr_factor(step, total, stage) for step in range(total)]
    rising = math.ceil(warmup * total)
    assert all(0 < value <= 1 for value in course)
    assert course[:rising] == sorted(course[:rising])
    assert course[rising:] == sorted(course[rising:], reverse=True)
    assert max(course) == pytest.approx(1.0)
    assert lr_factor(total, total, stage) == pytest.approx(floor if rising < total else 1.0)


def test_published_recipe() -> None:
    """LLaVA-1.5 aligns in 2181 steps of 256: warm-up of 66, the peak after it, half of it in the middle of the rest."""
    stage = stage_with(0.03, 0.0)
    assert lr_factor(0, 2181, stage) == pytest.approx(1 / 66)
    assert lr_factor(65, 2181, stage) == lr_factor(66, 2181, stage) == 1.0
    assert lr_factor(66 + (2181 - 66) // 2, 2181, stage) == pytest.approx(0.5, abs=1e-3)


def test_constant_stays() -> None:
    stage = stage_with(0.1, 0.0, Schedule.constant)
    assert {lr_factor(step, 100, stage) for step in range(10, 100)} == {1.0}


@pytest.mark.parametrize("trains", [ALIGN, FINETUNE, EVERYTHING], ids=["align", "finetune", "everything"])
def test_groups_hold_each_trained_parameter_once(tiny_folder: Path, trains: dict[str, dict[str, float]]) -> None:
    config = run_config(trains)
    model = load_frozen(tiny_folder, config)
    groups = parameter_groups(model, config.stage)
    held = [id(value) for group in groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in model.parameters() if value.requires_grad)
    for group in groups:
        part, kind = group["name"].split("/")
        assert group["lr"] == trains[part]["lr"]
        assert group["weight_decay"] == (trains[part].get("weight_decay", 0.0) if kind == "decay" else 0.0)
        assert all((value.ndim >= 2) == (kind == "decay") for value in group["params"])


def test_each_part_has_its_own_rate(tiny_folder: Path) -> None:
    config = run_config(FINETUNE)
    model = load_frozen(tiny_folder, config)
    optimizer = build_optimizer(model, config.stage, torch.device("cpu"))
    scheduler = build_scheduler(optimizer, stage_with(0.0, 0.0), total_steps=4)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["connector/decay"] == pytest.approx(FINETUNE["connector"]["lr"] / 2)
    assert rates["language_model/no_decay"] == pytest.approx(FINETUNE["language_model"]["lr"] / 2)
