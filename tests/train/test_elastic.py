"""A state that was saved on one number of ranks goes on, on another, where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from anchorformer.model_folder import read_shapes
from tests.train.cases import ALIGN, FINETUNE, batches_for, load_frozen, run_config
from tests.train.ranks import Ranks
from train.distributed import World
from train.engine import Engine, build_engine, loading, whole
from train.engine.saved import Saved
from train.engine.universal import convert
from train.run.fingerprint import Piece, fingerprint, join

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEALS = {
    1: [[[0, 1, 2, 3, 4, 5, 6, 7]]],
    2: [[[0, 1, 2], [6, 7]], [[3, 4], [5]]],
    4: [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]],
}


@pytest.fixture(scope="module")
def single() -> Iterator[Ranks]:
    """One rank in a process group of its own."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def start(world: World, folder: str, zero: int, dtype: str, trains: dict[str, Any]) -> Engine:
    # A large eps, or Adam turns rounding of near-zero gradients into steps of full size.
    config = run_config(
        trains, engine="deepspeed", zero__stage=zero, hardware__ranks=world.size, hardware__micro_batch=1,
        stage__eps=1e-2, stage__clip_norm=0.5, stage__warmup_ratio=0.5,
    )  # fmt: skip
    with loading(config, world, DTYPES[dtype]):
        model = load_frozen(Path(folder), config, DTYPES[dtype])
    return build_engine(model, config, world, total_steps=8, dtype=DTYPES[dtype])


def advance(engine: Engine, seed: int) -> float:
    world = engine.world
    batches = batches_for(engine.model, DEALS[world.size][world.rank], seed)
    (count,) = world.sum([float(sum(batch.num_supervised for batch in batches))])
    loss, _ = engine.agree(engine.accumulate(batches, int(count)))
    engine.step()
    return loss


def two_steps(world: World, folder: str, out: str, **case: Any) -> Any:
    """Saves after two steps, and goes on: fingerprints, learning rates and the next losses."""
    engine = start(world, folder, **case)
    for seed in range(2):
        advance(engine, seed)
    if world.is_main:
        Path(out).mkdir()
    world.barrier()
    engine.save(Path(out))
    world.barrier()
    return onward(engine)


def read_back(world: World, folder: str, out: str, converted: str | None = None, **case: Any) -> Any:
    """What a fresh engine goes on with."""
    engine = start(world, folder, **case)
    engine.load(Path(out), None if converted is None else Path(converted))
    return onward(engine)


def onward(engine: Engine) -> Any:
    prints = join(engine.world.gather(fingerprint(engine.values())))
    decay = [group["weight_decay"] for group in engine._param_groups]
    return prints, engine.lrs, decay, [advance(engine, seed) for seed in (2, 3, 4)]


def agree(before: Any, after: Any, rel: float) -> None:
    assert after[0] == before[0], "every parameter, trained or frozen, to the bit"
    assert after[1:3] == before[1:3]
    # The third loss has seen both moments and the count of steps at work.
    assert after[3] == pytest.approx(before[3], rel=rel)


SLOW = pytest.mark.slow
"""Every stage and number format; one of each kind of checkpoint is enough for every day."""


@pytest.mark.parametrize(
    ("zero", "dtype"),
    [(2, "fp32"), *(pytest.param(*case, marks=SLOW) for case in ((0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"),
                                                                 (1, "bf16"), (2, "bf16"), (3, "bf16")))],
)  # fmt: skip
def test_align_goes_on_with_one_rank_more_or_less(
    pair: Ranks, single: Ranks, tiny_folder: Path, tmp_path: Path, zero: int, dtype: str
) -> None:
    case = {"folder": str(tiny_folder), "zero": zero, "dtype": dtype, "trains": ALIGN}
    rel = 1e-5 if dtype == "fp32" else 1e-2
    for number, (writers, readers) in enumerate([(pair, single), (single, pair)]):
        out = tmp_path / str(number)
        before = writers.run(two_steps, out=str(out), **case)[0]
        for after in readers.run(read_back, out=str(out), **case):
            agree(before, after, rel)
        # Under another stage as well: nothing in the files knows of ranks.
        for after in readers.run(read_back, out=str(out), **case | {"zero": 5 - zero if zero > 1 else zero}):
            agree(before, after, rel)


@SLOW
@pytest.mark.parametrize("zero", [2, 3])
def test_align_goes_on_with_four_ranks(
    pair: Ranks, single: Ranks, tiny_folder: Path, tmp_path: Path, zero: int
) -> None:
    case = {"folder": str(tiny_folder), "zero": zero, "dtype": "fp32", "trains": ALIGN}
    before = pair.run(two_steps, out=str(tmp_path / "two"), **case)[0]
    four = Ranks(4)
    try:
        for after in four.run(read_back, out=str(tmp_path / "two"), **case):
            agree(before, after, 1e-5)
        before = four.run(two_steps, out=str(tmp_path / "four"), **case)[0]
    finally:
        four.close()
    for after in [*pair.run(read_back, out=str(tmp_path / "four"), **case),
                  *single.run(read_back, out=str(tmp_path / "four"), **case)]:  # fmt: skip
        agree(before, after, 1e-5)


def gathered(world: World) -> tuple[list[Any], list[int] | None]:
    """What this rank holds of a tensor of which both have a half, and of what both have told."""
    half = Piece(torch.full((2,), float(world.rank)), start=2 * world.rank, total=4)
    found = whole.gather(world, {"w": half}, {"w": (2, 2)}, is_parted=True)
    return [tensor.tolist() for tensor in found.values()], world.collect(world.rank)


def test_whole_tensors_are_put_together_on_one_rank_only(pair: Ranks) -> None:
    assert pair.run(gathered) == [([[[0.0, 0.0], [1.0, 1.0]]], [0, 1]), ([], None)]


def test_an_align_checkpoint_is_the_connector_and_its_moments(pair: Ranks, tiny_folder: Path, tmp_path: Path) -> None:
    pair.run(two_steps, folder=str(tiny_folder), out=str(tmp_path / "step"), zero=3, dtype="bf16", trains=ALIGN)
    files = {path.name for path in (tmp_path / "step").iterdir()}
    assert files == {"connector.safetensors", "optimizer.safetensors", "engine.json"}
    shapes = {name: shape for name, shape in read_shapes(tiny_folder).items() if name.startswith("connector.")}
    with safe_open(tmp_path / "step" / "connector.safetensors", framework="pt") as shard:
        found = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    values = sum(tensor.numel() for tensor in found.values())
    size = (tmp_path / "step" / "connector.safetensors").stat().st_size
    assert size < 1.1 * 4 * values
    assert Saved.read(tmp_path / "step").optimizer_steps == 2


@pytest.mark.parametrize(
    ("zero", "dtype"),
    [(3, "fp32"), *(pytest.param(*case, marks=SLOW) for case in ((1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"),
                                                                 (3, "bf16")))],
)  # fmt: skip
def test_finetune_goes_on_after_conversion(
    pair: Ranks, single: Ranks, tiny_folder: Path, tmp_path: Path, zero: int, dtype: str
) -> None:
    """DeepSpeed's own loader would give all groups the first one's decay, and count a step once for every group."""
    case = {"folder": str(tiny_folder), "zero": zero, "dtype": dtype, "trains": FINETUNE}
    rel = 1e-5 if dtype == "fp32" else 1e-2
    for number, (writers, readers) in enumerate([(pair, single), (single, pair)]):
        out, converted = tmp_path / f"{number}", tmp_path / f"{number}-universal"
        before = writers.run(two_steps, out=str(out), **case)[0]
        assert not Saved.read(out).fits(readers.size, zero)
        assert Saved.read(out).fits(writers.size, zero)
        convert(out, converted)
        for after in readers.run(read_back, out=str(out), converted=str(converted), **case):
            agree(before, after, rel)
