"""Frozen means frozen: what a stage does not train keeps its bits, and a run that breaks this does not go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from anchorformer.errors import UserError
from anchorformer.model_folder import read_index, sha256
from tests.train.cases import ALIGN, EVERYTHING, FINETUNE, load_frozen, run_config
from tests.train.ranks import Ranks
from train import rank
from train.choices import Part
from train.distributed import World, alone
from train.engine import build_engine
from train.facts import StepFacts
from train.faults.guards import FrozenGuard, TrainingHalted, check_numbers
from train.run.fingerprint import Piece, fingerprint, join
from train.run.folder import RunFolder
from train.stage import assert_declared, freeze, render, table

MakeRun = Callable[..., RunFolder]
FACTS = StepFacts(sample_ids=("a/1", "b/2"), tokens=9, supervised=4, images=1, skipped=0, padding_share=0.0)


def align_three_steps(world: World, folder: str) -> None:
    run = RunFolder(Path(folder))
    rank.prepare_process(run.read_config())
    rank.run_rank(run.read_config(), run, world)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in set(read_index(folder).values()):
        found |= load_file(folder / name)
    return found


def assert_only_the_connector_moved(run: RunFolder) -> None:
    before, after = tensors(run.start), tensors(run.model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        is_same = torch.equal(value, after[name])
        assert is_same != name.startswith("connector."), name
    for name in set(read_index(run.start).values()) - {"connector.safetensors"}:
        assert sha256(run.start / name) == sha256(run.model / name)


def test_three_plain_align_steps(make_run: MakeRun) -> None:
    run = make_run("plain", ALIGN, stage__max_steps=3)
    align_three_steps(alone(), str(run.path))
    assert_only_the_connector_moved(run)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert all(set(line["lr"]) == {"connector/decay", "connector/no_decay"} for line in lines)


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_three_sharded_align_steps(pair: Ranks, make_run: MakeRun, zero: int) -> None:
    run = make_run(
        "zero", ALIGN, stage__max_steps=3, engine="deepspeed", zero__stage=zero, hardware__ranks=2,
        hardware__micro_batch=1,
    )  # fmt: skip
    pair.run(align_three_steps, folder=str(run.path))
    assert_only_the_connector_moved(run)


def test_optimizer_holds_only_the_connector(tiny_folder: Path) -> None:
    config = run_config(ALIGN)
    model = load_frozen(tiny_folder, config)
    engine = build_engine(model, config, alone(), total_steps=1, dtype=torch.float32)
    held = {id(value) for group in engine.optimizer.param_groups for value in group["params"]}  # type: ignore[attr-defined]
    assert held == {id(value) for value in model.connector.parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("language_model.model.norm.weight", "frozen parameters changed: language_model.model.norm.weight"),
     (None, "trained parts did not change: connector")],
)  # fmt: skip
def test_guard_sees_planted_faults(tiny_folder: Path, spoil: str | None, message: str) -> None:
    config = run_config(ALIGN)
    model = load_frozen(tiny_folder, config)
    engine = build_engine(model, config, alone(), total_steps=4, dtype=torch.float32)
    guard = FrozenGuard(engine, alone())
    for name, value in model.named_parameters():
        if name == spoil or (spoil and value.requires_grad):
            value.data.view(-1)[-1] += 1e-3
    guard.observe(FACTS)
    guard.observe(FACTS)
    with pytest.raises(AssertionError, match=message):
        guard.observe(FACTS)


def test_guard_names_single_parameters_that_rest(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(ALIGN)
    model = load_frozen(tiny_folder, config)
    guard = FrozenGuard(build_engine(model, config, alone(), total_steps=4, dtype=torch.float32), alone())
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    for name, value in model.named_parameters():
        if name in trained[1:]:
            value.data += 1e-3
    for _ in range(3):
        guard.observe(FACTS)
    assert guard.is_proven
    assert f"have not changed in 3 steps: {trained[0]}" in caplog.text


def test_guard_waits_for_an_image(tiny_folder: Path) -> None:
    config = run_config(ALIGN)
    engine = build_engine(load_frozen(tiny_folder, config), config, alone(), total_steps=9, dtype=torch.float32)
    guard = FrozenGuard(engine, alone())
    text_only = StepFacts(sample_ids=("t",), tokens=3, supervised=2, images=0, skipped=0, padding_share=0.0)
    for _ in range(5):
        guard.observe(text_only)
    guard.finish()
    assert not guard.is_proven


@pytest.mark.parametrize(
    ("loss", "norms", "message"),
    [(float("nan"), {Part.connector: 1.0}, "loss is nan"),
     (1.0, {Part.connector: 1.0, Part.language_model: float("inf")}, "gradient of language_model is inf"),
     (1.0, {Part.connector: 0.0}, "connector's gradient is zero")],
)  # fmt: skip
def test_numbers_that_stop_a_run(loss: float, norms: dict[Part, float], message: str) -> None:
    with pytest.raises(TrainingHalted, match=message) as caught:
        check_numbers(7, loss, norms, FACTS)
    assert "a/1, b/2" in str(caught.value)
    assert "step 7" in str(caught.value)
    assert caught.value.exit_code == 3


def test_no_image_no_connector_gradient_is_fine() -> None:
    facts = StepFacts(sample_ids=("t",), tokens=3, supervised=2, images=0, skipped=0, padding_share=0.0)
    check_numbers(1, 1.0, {Part.connector: 0.0}, facts)


def broken_on_rank_one(world: World, folder: str) -> str:
    """A loss that is not a number on one rank only, in the third step."""
    from train.engine.base import Engine

    run = RunFolder(Path(folder))
    accumulate, steps = Engine.accumulate, iter(range(1, 10))

    def planted(self: Engine, *arguments: Any) -> float:
        loss = accumulate(self, *arguments)
        return float("nan") if next(steps) == 3 and world.rank == 1 else loss

    Engine.accumulate = planted  # type: ignore[method-assign]
    try:
        align_three_steps(world, folder)
    except TrainingHalted as error:
        return str(error)
    finally:
        Engine.accumulate = accumulate  # type: ignore[method-assign]
    return f"{run.path} went on"


def test_all_ranks_stop_together(pair: Ranks, make_run: MakeRun) -> None:
    run = make_run(
        "nan", ALIGN, stage__max_steps=5, checkpoint__every=1, engine="deepspeed", hardware__ranks=2,
        hardware__micro_batch=1,
    )  # fmt: skip
    one, other = pair.run(broken_on_rank_one, folder=str(run.path))
    assert one == other
    assert one.startswith("step 3: loss is nan")
    assert "mix/r" in one
    assert (run.state / "latest").read_text() == "step-00000002\n"
    assert not run.model.exists()
    assert not run.done.exists()


def test_stage_without_parts_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="trains nothing"):
        load_frozen(tiny_folder, run_config({}))


def test_table_counts_whole_parts(tiny_folder: Path) -> None:
    config = run_config(FINETUNE)
    model = load_frozen(tiny_folder, config)
    rows = {row.part: row for row in table(model, config.stage)}
    assert rows[Part.vision_tower].trainable == 0
    assert sum(row.total for row in rows.values()) == sum(value.numel() for value in model.parameters())
    assert rows[Part.connector].trainable == rows[Part.connector].total > 0
    text = render(list(rows.values()))
    assert len({len(line.split("  ")[0]) for line in text.splitlines()}) >= 1
    assert "language_model" in text
    assert f"{rows[Part.connector].total:,}" in text


def test_half_frozen_parts_are_noticed(tiny_folder: Path) -> None:
    config = run_config(EVERYTHING)
    model = load_frozen(tiny_folder, config)
    next(model.connector.parameters()).requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="connector"):
        assert_declared(model, config.stage, set())
    freeze(model, config.stage)
    with pytest.raises(AssertionError, match="optimizer holds 0 tensors"):
        assert_declared(model, config.stage, set())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.data(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_fingerprint_sees_every_bit(size: int, data: Any, dtype: torch.dtype) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    changed = values.clone()
    bits = changed.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 14))
    assert of(values) == of(values.clone())
    assert of(values) != of(changed)
    if size > 1:
        assert of(values) != of(values.flip(0))
    # However it is divided over ranks, and padded by none of them.
    first = data.draw(st.integers(0, size))
    parts = [Piece(values[:first], 0, size), Piece(values[first:], first, size)]
    assert join([fingerprint({"a": part}) for part in parts if part.values.numel()]) == of(values)


def of(values: torch.Tensor) -> dict[str, int]:
    return join([fingerprint({"a": Piece.whole(values)})])


def test_replicas_that_differ_are_noticed() -> None:
    ranks = [fingerprint({"a": Piece.whole(torch.full((3,), value))}) for value in (1.0, 2.0)]
    with pytest.raises(AssertionError, match="different values of a"):
        join(ranks)
