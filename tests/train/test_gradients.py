"""However eight samples are dealt to ranks, micro-batches and accumulation, loss and gradients are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.contracts import Batch
from tests.train.cases import EVERYTHING, FINETUNE, batches_for, load_frozen, run_config
from tests.train.ranks import Ranks
from train.distributed import World, alone
from train.engine import build_engine, loading
from train.engine.base import total_norm
from train.engine.plain import PlainEngine

TOLERANCE = 1e-6
"""Of the largest gradient: sums of fp32 numbers in another order differ by about their rounding, 1.2e-7 each."""

DEALS: dict[str, list[list[list[int]]]] = {
    "1x8x1": [[[0, 1, 2, 3, 4, 5, 6, 7]]],
    "one by one": [[[0], [1], [2], [3], [4], [5], [6], [7]]],
    "2x2x2": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "2x1x4": [[[0], [1], [2], [3]], [[4], [5], [6], [7]]],
    "text-only rank": [[[0, 1, 2], [6, 7]], [[3, 4], [5]]],
    "three against two": [[[0], [1, 2], [6, 7]], [[3, 4], [5], []]],
    "rank without targets": [[[0, 1, 2, 3, 4, 5, 6], []], [[7], []]],
}  # fmt: skip
"""Rank by rank, micro-batch by micro-batch."""


def tie(model: Any) -> None:
    """Output layer and token embeddings become one tensor, as small language models are built."""
    model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight


def gradients(
    world: World, folder: str, deal: list[list[list[int]]], trains: dict[str, Any], zero: int, is_tied: bool = False
) -> Any:
    """Loss, part norms, and on rank 0 every whole gradient of one accumulated step under DeepSpeed."""
    from deepspeed.utils import safe_get_full_grad

    config = run_config(
        trains, engine="deepspeed", zero__stage=zero, zero__bucket_size=100_000,
        hardware__ranks=world.size, hardware__micro_batch=1,
    )  # fmt: skip
    with loading(config, world, torch.float32):
        model = load_frozen(Path(folder), config)
    if is_tied:
        tie(model)
    engine = build_engine(model, config, world, total_steps=4, dtype=torch.float32)
    batches = batches_for(engine.model, deal[world.rank])
    (total,) = world.sum([float(sum(batch.num_supervised for batch in batches))])
    loss, norms = engine.agree(engine.accumulate(batches, int(total)))
    found = {}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            found[name] = safe_get_full_grad(parameter).clone()
    engine.step()
    return loss, norms, found if world.is_main else None


@pytest.fixture(scope="module")
def yardsticks(tiny_folder: Path) -> dict[str, Any]:
    return {name: plain_gradients(tiny_folder, DEALS["1x8x1"], trains) for name, trains in TRAINS.items()}


TRAINS = {"finetune": FINETUNE, "everything": EVERYTHING, "align": {"connector": FINETUNE["connector"]}}


def plain_gradients(folder: Path, deal: list[list[list[int]]], trains: dict[str, Any], is_tied: bool = False) -> Any:
    """The same from the plain engine."""
    config = run_config(trains)
    model = load_frozen(folder, config)
    if is_tied:
        tie(model)
    engine = build_engine(model, config, alone(), total_steps=4, dtype=torch.float32)
    batches = batches_for(model, deal[0])
    loss, norms = engine.agree(engine.accumulate(batches, sum(batch.num_supervised for batch in batches)))
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss, norms, found


def assert_same(found: Any, yardstick: Any) -> None:
    loss, norms, gradients_ = found
    assert loss == pytest.approx(yardstick[0], rel=TOLERANCE)
    assert norms == pytest.approx(yardstick[1], rel=1e-5)
    assert gradients_.keys() == yardstick[2].keys()
    largest = max(float(value.abs().max()) for value in yardstick[2].values())
    worst = {name: float((value - yardstick[2][name]).abs().max()) / largest for name, value in gradients_.items()}
    name = max(worst, key=lambda key: worst[key])
    assert worst[name] <= TOLERANCE, f"{name} differs by {worst[name]:.2e} of the largest gradient"


@pytest.mark.parametrize("stage", TRAINS)
def test_packed_and_one_by_one_agree(tiny_folder: Path, yardsticks: dict[str, Any], stage: str) -> None:
    assert_same(plain_gradients(tiny_folder, DEALS["one by one"], TRAINS[stage]), yardsticks[stage])


def product(names: Sequence[str], fast: dict[str, tuple[int, ...]]) -> list[Any]:
    """Every name with every ZeRO stage; those that are not in `fast` belong to the complete run."""
    return [
        pytest.param(
            name, zero, marks=() if zero in fast.get(name, ()) else pytest.mark.slow, id=f"{name}, ZeRO-{zero}"
        )
        for name in names
        for zero in range(4)
    ]


FAST_DEALS = {"three against two": (0, 1, 2, 3), "2x2x2": (2,), "2x1x4": (3,), "text-only rank": (1, 3),
              "rank without targets": (2,)}  # fmt: skip


@pytest.mark.parametrize(
    ("deal", "zero"), product([name for name, ranks in DEALS.items() if len(ranks) == 2], FAST_DEALS)
)
def test_two_ranks_agree_with_one(
    pair: Ranks, tiny_folder: Path, yardsticks: dict[str, Any], deal: str, zero: int
) -> None:
    results = pair.run(gradients, folder=str(tiny_folder), deal=DEALS[deal], trains=FINETUNE, zero=zero)
    assert_same(results[0], yardsticks["finetune"])
    assert results[0][:2] == results[1][:2], "ranks must agree to the bit on what they log and decide by"


@pytest.mark.parametrize(("stage", "zero"), product(["align", "everything"], {"align": (2,), "everything": (3,)}))
def test_other_stages_agree(pair: Ranks, tiny_folder: Path, yardsticks: dict[str, Any], stage: str, zero: int) -> None:
    deal = DEALS["three against two"]
    results = pair.run(gradients, folder=str(tiny_folder), deal=deal, trains=TRAINS[stage], zero=zero)
    assert_same(results[0], yardsticks[stage])


@pytest.mark.parametrize("zero", [2, 3])
def test_tied_embeddings_agree(pair: Ranks, tiny_folder: Path, zero: int) -> None:
    yardstick = plain_gradients(tiny_folder, DEALS["1x8x1"], FINETUNE, is_tied=True)
    deal = DEALS["three against two"]
    results = pair.run(gradients, folder=str(tiny_folder), deal=deal, trains=FINETUNE, zero=zero, is_tied=True)
    assert "language_model.lm_head.weight" not in results[0][2]
    assert_same(results[0], yardstick)


def test_a_step_without_targets_is_zero(tiny_folder: Path) -> None:
    loss, norms, found = plain_gradients(tiny_folder, [[[7]]], FINETUNE)
    assert loss == 0.0
    assert set(norms.values()) == {0.0}
    assert all(torch.count_nonzero(value) == 0 for value in found.values())


def added_up(world: World, folder: str, engine: str, zero: int) -> Any:
    """bf16 gradients of eight micro-batches per rank: accumulated, their norm, and one by one, added in fp32."""
    from deepspeed.utils import safe_get_full_grad

    # A rate that moves no weight, so that one engine can take the same micro-batches twice.
    trains = {part: {"lr": 1e-30} for part in FINETUNE}
    config = run_config(
        trains, engine=engine, zero__stage=zero, hardware__ranks=world.size, hardware__micro_batch=1,
        stage__clip_norm=0.0,
    )  # fmt: skip
    with loading(config, world, torch.bfloat16):
        model = load_frozen(Path(folder), config, torch.bfloat16)
    machine = build_engine(model, config, world, total_steps=9, dtype=torch.bfloat16)
    deal = DEALS["one by one"][0]
    batches = batches_for(machine.model, deal[::-1] if world.rank else deal)
    (total,) = world.sum([float(sum(batch.num_supervised for batch in batches))])

    def taken(part: list[Batch]) -> tuple[dict[str, torch.Tensor], float]:
        _, norms = machine.agree(machine.accumulate(part, int(total)))
        norm = total_norm(norms)
        if isinstance(machine, PlainEngine):
            pairs = machine._pairs.items()
            found = {name: master.grad.clone() for name, (_, master) in pairs if master.grad is not None}
        else:
            trained = {name: value for name, value in machine.model.named_parameters() if value.requires_grad}
            found = {name: safe_get_full_grad(value).clone() for name, value in trained.items()}
        machine.step()
        return found, norm

    singles = [taken([batch])[0] for batch in batches]
    exact = {name: sum(single[name].float() for single in singles) for name in singles[0]}
    return *taken(batches), exact


@pytest.mark.parametrize(("engine", "zero"), [("plain", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_bf16_micro_batches_add_up_in_fp32(pair: Ranks, tiny_folder: Path, engine: str, zero: int) -> None:
    """No value is off by more than the rounding of one bf16 number, 2^-9; a bf16 sum rounds every time."""
    if engine == "plain":
        found, norm, exact = added_up(alone(), str(tiny_folder), engine, zero)
    else:
        found, norm, exact = pair.run(added_up, folder=str(tiny_folder), engine=engine, zero=zero)[0]
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        floor = TOLERANCE * float(exact[name].abs().max())
        torch.testing.assert_close(value, exact[name], rtol=2**-9, atol=floor)
    assert norm == pytest.approx(math.sqrt(sum(float(value.double().square().sum()) for value in exact.values())))
