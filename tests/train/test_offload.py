"""Optimizer and weights off the card: the same steps, the same state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.errors import UserError
from tests.train.cases import FINETUNE, batches_for, load_frozen, run_config
from tests.train.ranks import Ranks
from train.choices import Part
from train.distributed import World, alone
from train.engine import Engine, build_engine, loading
from train.run.fingerprint import fingerprint

HALVES = [[[0, 1, 2], [6, 7]], [[3, 4], [5]]]
ALL = [[[0, 1, 2, 3, 4, 5, 6, 7]]]
OFFLOADS: dict[str, dict[str, Any]] = {
    "zero1_cpu": {"stage": 1, "offload_optimizer": "cpu"},
    "zero2_cpu": {"stage": 2, "offload_optimizer": "cpu"},
    "zero3_cpu": {"stage": 3, "offload_optimizer": "cpu"},
    "zero3_both": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "zero3_parameters": {"stage": 3, "offload_parameters": "cpu"},
}


def start(world: World, folder: str, zero: dict[str, Any], dtype: torch.dtype) -> Engine:
    config = run_config(
        FINETUNE, engine="deepspeed" if zero else "plain", zero=zero, hardware__micro_batch=1, stage__eps=1e-2,
        stage__clip_norm=0.5, stage__warmup_ratio=0.5, hardware__ranks=world.size,
    )  # fmt: skip
    with loading(config, world, dtype):
        model = load_frozen(Path(folder), config, dtype)
    return build_engine(model, config, world, total_steps=4, dtype=dtype)


def advance(engine: Engine, seed: int, deal: list[list[list[int]]]) -> tuple[float, dict[Part, float]]:
    batches = batches_for(engine.model, deal[engine.world.rank], seed)
    (count,) = engine.world.sum([float(sum(batch.num_supervised for batch in batches))])
    loss, norms = engine.agree(engine.accumulate(batches, int(count)))
    engine.step()
    return loss, norms


def three_steps(world: World, folder: str, zero: dict[str, Any], deal: Any, dtype: torch.dtype = torch.float32) -> Any:
    machine = start(world, folder, zero, dtype)
    taken = [advance(machine, seed, deal) for seed in range(3)]
    parts = [machine.gather(Part(part)) for part in FINETUNE]
    return taken, {name: value for part in parts for name, value in (part or {}).items()}


@pytest.fixture(scope="module")
def yardstick(tiny_folder: Path) -> Any:
    return three_steps(alone(), str(tiny_folder), {}, ALL)


@pytest.mark.parametrize(
    "name",
    [name if name in ("zero2_cpu", "zero3_both") else pytest.param(name, marks=pytest.mark.slow) for name in OFFLOADS],
)
def test_offloaded_steps_agree_with_the_plain_engine(pair: Ranks, tiny_folder: Path, yardstick: Any, name: str) -> None:
    (taken, weights), _ = pair.run(three_steps, folder=str(tiny_folder), zero=OFFLOADS[name], deal=HALVES)
    for (loss, norms), (expected, expected_norms) in zip(taken, yardstick[0], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(value, yardstick[1][key], rtol=0, atol=2e-6, msg=key)


def save_and_load(world: World, folder: str, out: str, zero: dict[str, Any], then: dict[str, Any] | None = None) -> Any:
    """After two steps: what comes of the engine that took them, and of a fresh one (under `then`) that read them."""
    is_swapped = "nvme" in zero.values()
    assert os.environ["PATH"] == "" or is_swapped, "no compiler is needed"
    target = Path(out) / "step"
    outcomes = []
    for is_fresh in (False, True):
        machine = start(world, folder, then if is_fresh and then else zero, torch.bfloat16)
        if is_fresh:
            machine.load(target)
        else:
            for seed in range(2):
                advance(machine, seed, HALVES)
            if world.is_main:
                target.mkdir()
            world.barrier()
            machine.save(target)
            world.barrier()
        before = fingerprint(machine.values())
        outcomes.append((before, machine.lrs, advance(machine, 2, HALVES), fingerprint(machine.values())))
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_state_survives_to_the_bit(pair: Ranks, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    for told, read in pair.run(save_and_load, folder=str(tiny_folder), out=str(tmp_path), zero=OFFLOADS[name]):
        assert told == read


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("zero2", "zero2_cpu"), ("zero3", "zero3_both"), ("zero3_both", "zero3")])
def test_a_run_goes_on_where_its_state_lies_elsewhere(
    pair: Ranks, tiny_folder: Path, tmp_path: Path, one: str, other: str
) -> None:
    zeros = OFFLOADS | {"zero2": {"stage": 2}, "zero3": {"stage": 3}}
    given = {"folder": str(tiny_folder), "out": str(tmp_path), "zero": zeros[one], "then": zeros[other]}
    for (before, lrs, (loss, _), _), (read, read_lrs, (read_loss, _), _) in pair.run(save_and_load, **given):
        assert read == before
        assert read_lrs == lrs
        assert read_loss == pytest.approx(loss, rel=1e-6)


def refused(world: World, folder: str, out: str) -> str:
    machine = start(world, folder, {"stage": 3}, torch.bfloat16)
    target = Path(out) / "step"
    if world.is_main:
        target.mkdir()
    world.barrier()
    machine.save(target)
    machine.config = run_config(
        FINETUNE, engine="deepspeed", hardware__ranks=world.size,
        zero={"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/nvme"},
    )  # fmt: skip
    try:
        machine.load(target)
    except UserError as error:
        return error.remedy
    return "not refused"


@pytest.mark.slow
def test_shards_are_not_read_into_files(pair: Ranks, tiny_folder: Path, tmp_path: Path) -> None:
    for remedy in pair.run(refused, folder=str(tiny_folder), out=str(tmp_path)):
        assert "zero=zero3_offload" in remedy
