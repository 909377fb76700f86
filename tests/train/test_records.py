"""What a run writes down: facts of a step, metrics.jsonl, the run folder, and choices of device and precision."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.contracts import Batch
from anchorformer.devices import Device, Precision
from anchorformer.errors import UserError
from evals.memory import GIB, Memory
from tests.train.cases import ALIGN, run_config
from train import precision
from train.choices import Part
from train.config import CheckpointConfig, LogConfig
from train.distributed import World, alone, choose_device
from train.facts import StepFacts, gather_facts
from train.observe.journal import Journal, read_lines
from train.observe.memory import unevenness
from train.observe.metrics import Console, step_record, time_record
from train.run.folder import RunFolder
from train.run.identity import numbers_digest
from train.trainer import seed_step

MINE, OTHER = Memory(host=3 * GIB, device=40 * GIB), Memory(host=2 * GIB, device=60 * GIB)


class TwoRanks(World):
    """Rank 0 of two; the other one's facts are given."""

    other: list[Any]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def batch_of(tokens: int, targets: int, images: int, ids: tuple[str, ...], skipped: int = 0) -> Batch:
    return Batch(
        input_ids_S=torch.zeros(tokens, dtype=torch.long), position_ids_S=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32), max_seqlen=tokens,
        tiles_B3HW=torch.zeros(images, 3, 2, 2, dtype=torch.uint8), predict_index_Q=torch.arange(targets),
        targets_Q=torch.zeros(targets, dtype=torch.long), sample_ids=ids, num_skipped=skipped,
    )  # fmt: skip


def test_facts_are_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = TwoRanks(rank=0, size=2, device=torch.device("cpu"))
    object.__setattr__(world, "other", ([(("c",), 30, 5, 1, 0, 900), ((), 1, 0, 0, 2, 1)], 0.5, OTHER, "SIGTERM"))
    monkeypatch.setattr(Memory, "of", lambda device: MINE)
    facts = gather_facts(world, [batch_of(10, 4, 1, ("a",)), batch_of(9, 0, 0, ("b",), skipped=1)], 0.25)
    assert facts == StepFacts(
        sample_ids=("a", "b", "c"), tokens=50, supervised=9, images=2, skipped=3,
        padding_share=round(1 - 50 / (2 * (30 + 9)), 6), squares=100 + 81 + 901,
        own_seconds=(0.25, 0.5), memory=(MINE, OTHER), signal="SIGTERM",
    )  # fmt: skip


def line_of(step: int) -> dict[str, Any]:
    facts = StepFacts(sample_ids=("a",), tokens=4, supervised=2, images=1, skipped=0, padding_share=0.0)
    times = {"seconds": 2.0, "data_wait_seconds": 0.5, "tokens_per_second": 2.0, "samples_per_second": 0.5,
             "ranks": {"host_gib": [1.0, 1.1]}}  # fmt: skip
    return step_record(step, 1.5, {"connector/decay": 1e-3}, 0.7, {Part.connector: 0.7}, facts, times, is_clipped=False)


def test_metrics_are_cut_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = Journal(path, 0)
    for step in (1, 2, 3):
        file.write(line_of(step))
    file.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')  # a kill in the middle of a line
    assert [json.loads(line)["step"] for line in read_lines(path)] == [1, 2, 3]
    resumed = Journal(path, 2)
    resumed.write(line_of(3) | {"loss": 9.0})
    resumed.close()
    assert [json.loads(line)["loss"] for line in read_lines(path)] == [1.5, 1.5, 9.0]
    Journal(path, 0).close()
    assert path.read_text() == ""


def test_console_tells_progress_and_remaining_time(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(total_steps=100, first_step=8)
    console.count(2.0)
    console.count(2.0)
    with caplog.at_level(logging.INFO):
        console.show(line_of(10))
    assert "step 10/100  10%" in caplog.text
    assert "left 0:03:00" in caplog.text
    assert "2 tok/s" in caplog.text, "with a peak that is known and without one"
    assert "data 25%" in caplog.text
    assert "rank" not in caplog.text, "the ranks are even"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        record = line_of(12)
        record["time"]["ranks"] = {"host_gib": [1.0, 9.0], "device_gib": [60.0, 70.0]}
        console.show(record)
    assert caplog.messages[0].endswith(
        "  card of rank 1 70.0 GiB, of the others 60.0  RAM of rank 1 9.0 GiB, of the others 1.0"
    )


@pytest.mark.parametrize(
    ("gib", "is_uneven"),
    [([70.0], False), ([70.0, 70.0], False), ([70.0, 64.0], False), ([64.0, 70.5], True), ([0.1, 0.4], False),
     ([0.1, 0.7], True), ([60.0, 60.0, 80.0, 60.0], True)],
)  # fmt: skip
def test_what_counts_as_uneven(gib: list[float], *, is_uneven: bool) -> None:
    words = unevenness(gib, "card")
    assert (words is not None) == is_uneven
    if words is not None:
        assert f"rank {gib.index(max(gib))} " in words


def test_each_rank_is_listed_in_the_steps_that_are_logged() -> None:
    facts = StepFacts(sample_ids=("a",), tokens=4, supervised=2, images=1, skipped=0, padding_share=0.0,
                      own_seconds=(0.5, 0.25), memory=(MINE, OTHER))  # fmt: skip
    time = time_record(1.0, 0.0, facts, torch.device("cpu"))
    assert time["ranks"] == {"own_seconds": [0.5, 0.25], "device_gib": [40.0, 60.0], "host_gib": [3.0, 2.0]}
    assert (time["slowest_rank"], time["fullest_rank"], time["peak_memory_gib"]) == (0, 1, 60.0)
    assert "ranks" not in time_record(1.0, 0.0, facts, torch.device("cpu"), is_logged=False)
    on_cpu = replace(facts, memory=(replace(MINE, device=None), replace(OTHER, device=None)))
    assert time_record(1.0, 0.0, on_cpu, torch.device("cpu"))["ranks"].keys() == {"own_seconds", "host_gib"}


def test_memory_is_counted_without_waiting_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waited"))
    held = Memory.of(torch.device("cuda", 0))
    assert held.computing == held.device == 7
    block = torch.ones(64 * 2**20 // 4)
    alone_on_cpu = Memory.of(torch.device("cpu"))
    assert alone_on_cpu.computing == alone_on_cpu.host > block.nbytes


def test_digest_covers_what_numbers_depend_on() -> None:
    config = run_config(ALIGN)
    same = replace(config, run="x", resume="auto", log=LogConfig(every=3), checkpoint=CheckpointConfig(every=1))
    assert numbers_digest(same) == numbers_digest(config)
    assert numbers_digest(replace(config, seed=1)) != numbers_digest(config)
    assert numbers_digest(replace(config, data=replace(config.data, max_length=9))) != numbers_digest(config)
    assert numbers_digest(replace(config, data=replace(config.data, num_workers=9))) == numbers_digest(config)


def test_step_seeds_are_a_function_of_place() -> None:
    def draw(*place: int) -> float:
        seed_step(*place)
        return float(torch.rand(()))

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(seed, step, rank) for seed in range(2) for step in range(3) for rank in range(2)}) == 12


@pytest.mark.parametrize(
    ("asked", "has_bf16", "width", "expected"),
    [
        (Precision.auto, True, 256, torch.bfloat16),
        (Precision.auto, True, 32, torch.float32),
        (Precision.auto, False, 4096, torch.float32),
        (Precision.bf16, False, 32, torch.bfloat16),
        (Precision.fp32, True, 4096, torch.float32),
    ],
)
def test_precision_on_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: Precision, has_bf16: bool, width: int,
    expected: torch.dtype,
) -> None:  # fmt: skip
    monkeypatch.setattr(precision, "bf16_is_fast_on_cpu", lambda: has_bf16)
    with caplog.at_level(logging.INFO):
        assert precision.choose_dtype(asked, torch.device("cpu"), width) == expected
    assert str(expected).removeprefix("torch.") in caplog.text


def test_device_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(Device.auto, 1) == torch.device("cuda", 1)
    assert choose_device(Device.cpu, 1) == torch.device("cpu")
    with pytest.raises(UserError, match="more ranks than CUDA devices"):
        choose_device(Device.auto, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(Device.auto, 5) == torch.device("cpu")
    with pytest.raises(UserError, match=r"hardware\.device=cpu"):
        choose_device(Device.cuda, 0)


def test_a_world_of_one_needs_no_group() -> None:
    world = alone()
    assert (world.gather("a"), world.sum([1.0, 2.0]), world.broadcast("b")) == (["a"], [1.0, 2.0], "b")
    world.barrier()


def test_run_folder_names_its_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="nothing to start from"):
        _ = folder.start
    (tmp_path / "start").mkdir()
    assert folder.start == tmp_path / "start"
    (tmp_path / "start.txt").write_text("/models/base\n")
    assert folder.start == Path("/models/base")
    with pytest.raises(UserError, match="not a run folder"):
        folder.read_config()


def test_the_first_reason_to_halt_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_halted(3, "loss is nan")
    folder.write_halted(2, "later")
    assert json.loads(folder.halted.read_text()) == {"exit_code": 3, "message": "loss is nan"}
