"""Every engine takes the same step, keeps the same state, and needs no compiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.errors import UserError
from anchorformer.model_folder import read_shapes
from tests.train.cases import ALIGN, FINETUNE, batches_for, load_frozen, run_config
from tests.train.ranks import NO_EXTENSIONS, Ranks
from train.choices import Part
from train.distributed import World, alone
from train.engine import Engine, build_engine, loading
from train.engine.base import total_norm
from train.run.fingerprint import fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HALVES = [[[0, 1, 2], [6, 7]], [[3, 4], [5]]]
ALL = [[[0, 1, 2, 3, 4, 5, 6, 7]]]


def start(world: World, folder: str, engine: str, zero: int, dtype: str, trains: dict[str, Any]) -> Engine:
    # A large eps, or Adam turns rounding of near-zero gradients into steps of full size; a clip that bites.
    config = run_config(
        trains, engine=engine, zero__stage=zero, hardware__ranks=world.size, hardware__micro_batch=1,
        stage__eps=1e-2, stage__clip_norm=0.5, stage__warmup_ratio=0.5,
    )  # fmt: skip
    with loading(config, world, DTYPES[dtype]):
        model = load_frozen(Path(folder), config, DTYPES[dtype])
    return build_engine(model, config, world, total_steps=4, dtype=DTYPES[dtype])


def advance(engine: Engine, seed: int, deal: list[list[list[int]]]) -> float:
    batches = batches_for(engine.model, deal[engine.world.rank], seed)
    (count,) = engine.world.sum([float(sum(batch.num_supervised for batch in batches))])
    loss, norms = engine.agree(engine.accumulate(batches, int(count)))
    assert total_norm(norms) > engine.config.stage.clip_norm, "clipping must be seen at work"
    engine.step()
    return loss


def three_steps(world: World, folder: str, engine: str, zero: int, dtype: str, trains: dict[str, Any]) -> Any:
    """Losses, learning rates, and on rank 0 the weights of all trained parts after three steps."""
    deal = HALVES if world.size == 2 else ALL
    machine = start(world, folder, engine, zero, dtype, trains)
    lrs, losses = [], []
    for seed in range(3):
        lrs.append(machine.lrs)
        losses.append(advance(machine, seed, deal))
    parts = [machine.gather(Part(part)) for part in trains]
    assert all((part is not None) == world.is_main for part in parts)
    assert not Path(NO_EXTENSIONS).exists()
    return losses, lrs, {name: value for part in parts for name, value in (part or {}).items()}


@pytest.fixture(scope="module")
def yardstick(tiny_folder: Path) -> Any:
    return three_steps(alone(), str(tiny_folder), "plain", 0, "fp32", FINETUNE)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_steps_agree_with_the_plain_engine(pair: Ranks, tiny_folder: Path, yardstick: Any, zero: int) -> None:
    (losses, lrs, weights), _ = pair.run(
        three_steps, folder=str(tiny_folder), engine="deepspeed", zero=zero, dtype="fp32", trains=FINETUNE
    )
    assert losses == pytest.approx(yardstick[0], rel=1e-5)
    assert lrs == yardstick[1]
    shapes = {name: shape for name, shape in read_shapes(tiny_folder).items() if not name.startswith("vision_tower")}
    assert {name: tuple(value.shape) for name, value in weights.items()} == shapes
    for name, value in weights.items():
        torch.testing.assert_close(value, yardstick[2][name], rtol=0, atol=2e-6, msg=name)


def test_bf16_keeps_fp32_weights(tiny_folder: Path, yardstick: Any) -> None:
    losses, _, weights = three_steps(alone(), str(tiny_folder), "plain", 0, "bf16", FINETUNE)
    assert losses == pytest.approx(yardstick[0], rel=2e-2)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    engine = start(alone(), str(tiny_folder), "plain", 0, "bf16", FINETUNE)
    trained = {name for name, value in engine.model.named_parameters() if value.requires_grad}
    assert {name for name, value in engine.values().items() if value.values.dtype == torch.float32} == trained


def save_and_load(
    world: World, folder: str, out: str, engine: str, zero: int, dtype: str, trains: dict[str, Any]
) -> Any:
    """What comes after two steps: of the engine that took them, and of a fresh one that read its state."""
    assert world.size == 1 or os.environ["PATH"] == ""
    deal = HALVES if world.size == 2 else ALL
    target = Path(out) / "step"
    outcomes = []
    for is_fresh in (False, True):
        machine = start(world, folder, engine, zero, dtype, trains)
        if is_fresh:
            machine.load(target)
        else:
            for seed in range(2):
                advance(machine, seed, deal)
            if world.is_main:
                target.mkdir()
            world.barrier()
            machine.save(target)
            world.barrier()
        before = fingerprint(machine.values())
        outcomes.append((before, machine.lrs, advance(machine, 2, deal), fingerprint(machine.values())))
    return outcomes


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_state_survives_to_the_bit(pair: Ranks, tiny_folder: Path, tmp_path: Path, zero: int, dtype: str) -> None:
    for told, read in pair.run(
        save_and_load, folder=str(tiny_folder), out=str(tmp_path), engine="deepspeed", zero=zero, dtype=dtype,
        trains=FINETUNE,
    ):  # fmt: skip
        assert told == read
    assert not (tmp_path / "latest").exists(), "which checkpoint is the latest is not the engine's to say"


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_state_survives_to_the_bit(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    told, read = save_and_load(alone(), str(tiny_folder), str(tmp_path), "plain", 0, dtype, FINETUNE)
    assert told == read


def frozen_stay_out(world: World, folder: str, out: str, zero: int) -> set[str]:
    """Names that a finetune checkpoint of a ZeRO engine holds weights or moments of."""
    machine = start(world, folder, "deepspeed", zero, "fp32", FINETUNE)
    target = Path(out) / "step"
    if world.is_main:
        target.mkdir()
    world.barrier()
    machine.save(target)
    world.barrier()
    names: set[str] = set()
    for path in target.glob("*model_states.pt"):
        names |= set(torch.load(path, weights_only=True)["module"])
    return names


@pytest.mark.parametrize("zero", [2, 3])
def test_frozen_weights_are_not_saved(pair: Ranks, tiny_folder: Path, tmp_path: Path, zero: int) -> None:
    names, _ = pair.run(frozen_stay_out, folder=str(tiny_folder), out=str(tmp_path), zero=zero)
    trained = {name for name in read_shapes(tiny_folder) if not name.startswith("vision_tower.")}
    parameters = {name for name in names if name in read_shapes(tiny_folder)}
    assert parameters == trained


def test_plain_engine_is_for_one_process(tiny_folder: Path) -> None:
    config = run_config(ALIGN)
    two = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match="one process"):
        build_engine(load_frozen(tiny_folder, config), config, two, total_steps=1, dtype=torch.float32)
