"""The plan's messages against the collectives that real ranks make, and its checkpoints against real files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.train.cases import ALIGN, FINETUNE, batches_for, load_frozen, run_config
from tests.train.ranks import Ranks
from train.choices import Part
from train.distributed import World
from train.engine import Engine, build_engine, loading
from train.engine import zero as door
from train.plan import traffic
from train.plan.course import checkpoint_bytes
from train.plan.memory import Layout
from train.plan.shapes import shapes_of
from train.plan.traffic import Way, step_traffic
from train.run.fingerprint import fingerprint

DEAL = [[[0, 1, 2], [6, 7]], [[3, 4], [5]]]
MICRO_BATCHES = 2
OPERATIONS = {
    "all_reduce": 2, "all_gather_into_tensor": 1, "all_gather_coalesced": 1, "reduce_scatter_tensor": 1,
    "all_gather": 1, "reduce": 1, "broadcast": 1, "reduce_scatter": 1, "all_to_all_single": 1,
}  # fmt: skip
"""What DeepSpeed asks of its backend, and how many times that passes a tensor round its ring."""
NAMES = 40_000
"""Bytes of names and shapes in a rank's files."""
SMALL = 4096
"""Bytes up to which a message is one of the trainer's own."""


@contextmanager
def counted() -> Iterator[dict[int, float]]:
    """Size of a group -> bytes that its rings gathered or scattered."""
    from deepspeed.comm.torch import TorchBackend

    sums: dict[int, float] = {}
    originals = {name: getattr(TorchBackend, name) for name in OPERATIONS}

    def watching(name: str) -> Any:
        def call(backend: Any, *args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            lists = [value for value in given if isinstance(value, list)]
            tensors = [value for value in given if isinstance(value, torch.Tensor)]
            size = max([sum(map(bytes_of, some)) for some in lists] + [bytes_of(value) for value in tensors])
            group = kwargs.get("group") or next((arg for arg in args if isinstance(arg, dist.ProcessGroup)), None)
            if size > SMALL:
                ranks = dist.get_world_size(group)
                sums[ranks] = sums.get(ranks, 0) + size * OPERATIONS[name]
            return originals[name](backend, *args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(TorchBackend, name, watching(name))
    try:
        yield sums
    finally:
        for name, original in originals.items():
            setattr(TorchBackend, name, original)


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def start(world: World, folder: str, zero: dict[str, Any], nodes: int, trains: dict[str, Any] = FINETUNE) -> Engine:
    config = run_config(
        trains, engine="deepspeed", zero=zero, hardware__micro_batch=1, hardware__ranks=world.size // nodes,
        hardware__nodes=nodes,
    )  # fmt: skip
    own = door.deepspeed_config

    def nothing_kept(*args: Any) -> dict[str, Any]:
        """What a tiny model has would be small or near enough to be kept; nothing of 7B is."""
        made = own(*args)
        made["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
        }  # fmt: skip
        return made

    door.deepspeed_config = nothing_kept
    try:
        with loading(config, world, torch.float32):
            model = load_frozen(Path(folder), config)
        return build_engine(model, config, world, total_steps=4, dtype=torch.float32)
    finally:
        door.deepspeed_config = own


def one_step(world: World, folder: str, out: str, zero: dict[str, Any]) -> Any:
    """Bytes of the third step's collectives, and of what this rank writes of a checkpoint."""
    engine = start(world, folder, zero, 1)
    for number in range(3):
        batches = batches_for(engine.model, DEAL[world.rank % 2], number)
        with counted() as sums:
            engine.agree(engine.accumulate(batches, 20))
            engine.step()
    target = Path(out) / "step"
    if world.is_main:
        target.mkdir()
    world.barrier()
    written = sum(path.stat().st_size for path in engine.save(target))
    return sums, written


def expected(folder: Path, zero: dict[str, Any], ranks: int, nodes: int) -> tuple[dict[int, float], float]:
    """Bytes per size of group, and of a checkpoint, as the plan counts them."""
    config = json.loads((folder / "config.json").read_text())
    shapes = shapes_of(config["vision_config"], config["text_config"], config["selector"], config["connector"])
    layout = Layout(
        ranks=ranks, zero=zero["stage"], value_bytes=4, checkpointing=False, bucket=200_000_000, buckets=1,
        node_ranks=ranks // nodes, hpz=zero.get("hpz", False),
    )  # fmt: skip
    sums: dict[int, float] = {}
    for message in step_traffic(shapes, [Part(part) for part in FINETUNE], layout, MICRO_BATCHES):
        group = {Way.all: ranks, Way.node: ranks // nodes}[message.way]
        sums[group] = sums.get(group, 0) + message.size
    run = run_config(FINETUNE, engine="deepspeed", zero=zero, hardware__ranks=ranks // nodes, hardware__nodes=nodes)
    return sums, sum(checkpoint_bytes(run, shapes, layout).values())


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1)), 2, 3])
def test_a_step_sends_what_is_counted(
    pair: Ranks, tiny_folder: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "ZERO3_REUSE", 0)  # as `start` has told DeepSpeed
    results = pair.run(one_step, folder=str(tiny_folder), out=str(tmp_path), zero={"stage": stage})
    sums, written = expected(tiny_folder, {"stage": stage}, 2, 1)
    for counted_sums, _ in results:
        # Less by what is too small to be told from the trainer's own messages.
        assert counted_sums == {group: pytest.approx(size, rel=0.05) for group, size in sums.items()}
    assert 0 <= sum(size for _, size in results) - written <= NAMES * 2


def two_nodes(world: World, folder: str, out: str) -> Any:
    """Four ranks as two nodes. Finetune: what a step comes to without and with hpZ, and what the latter sends; align
    with hpZ: what comes after a step, of the engine that took it and of a fresh one that read its state."""
    from deepspeed.utils import groups

    def step(engine: Engine, number: int) -> Any:
        batches = batches_for(engine.model, DEAL[world.rank % 2], number)
        norms = engine.agree(engine.accumulate(batches, 20))
        engine.step()
        return norms, fingerprint(engine.values())

    def started(trains: dict[str, Any], *, hpz: bool) -> Engine:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed expects one model in the life of a process
        return start(world, folder, {"stage": 3, "hpz": hpz}, 2, trains)

    plain = started(FINETUNE, hpz=False)
    expected = [step(plain, number) for number in range(3)]
    hpz = started(FINETUNE, hpz=True)
    found = [step(hpz, number) for number in range(2)]
    with counted() as sums:
        found.append(step(hpz, 2))

    told = started(ALIGN, hpz=True)
    step(told, 0)
    target = Path(out) / "step"
    if world.is_main:
        target.mkdir()
    world.barrier()
    told.save(target)
    world.barrier()
    read = started(ALIGN, hpz=True)
    read.load(target)
    return expected == found, sums, step(told, 1) == step(read, 1)


@pytest.mark.slow
def test_hpz_changes_no_number_and_keeps_backward_within_a_node(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "ZERO3_REUSE", 0)
    four = Ranks(4)
    try:
        results = four.run(two_nodes, folder=str(tiny_folder), out=str(tmp_path))
    finally:
        four.close()
    sums, _ = expected(tiny_folder, {"stage": 3, "hpz": True}, 4, 2)
    for is_equal, counted_sums, survives in results:
        assert is_equal
        assert survives
        assert counted_sums == {group: pytest.approx(size, rel=0.05) for group, size in sums.items()}
