"""Budgets, recommendations and remedies of the plan, the command, and what the trainer makes of it."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorformer.devices import Device
from anchorformer.errors import UserError
from data.overrides import options
from tests.train.tiny_world import write_world
from train.choices import Checkpointing
from train.compose import compose
from train.config import RunConfig
from train.plan.cards import CARDS, card_of_device
from train.plan.fit import (
    choose,
    largest_budget,
    layout_of,
    memory_at,
    memory_limit,
    most_positions,
    recommend,
    remedies,
    settle,
)
from train.plan.memory import host_memory
from train.plan.shapes import read_shapes
from train.prepare import prepare
from train.verbs import plan
from train.zero import Offload

GB = 1e9


@functools.cache
def paper(stage: str = "finetune", *more: str) -> RunConfig:
    return compose([f"stage={stage}", "experiment=paper_7b", "data.root=/d", "init_from=/m", *more])


def limit_of(config: RunConfig) -> float:
    limit = memory_limit(config)
    assert limit is not None
    return limit


@settings(max_examples=30, deadline=None)
@given(
    memory=st.floats(20, 200), stage=st.sampled_from(["align", "finetune"]),
    zero=st.sampled_from(["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]),
    checkpointing=st.booleans(),
)  # fmt: skip
def test_the_largest_budget_is_the_largest(memory: float, stage: str, zero: str, checkpointing: bool) -> None:
    config = paper(stage, f"zero={zero}")
    size, layout = read_shapes(config), layout_of(config, checkpointing=checkpointing)
    budget = largest_budget(config, size, layout, memory * GB)
    most = most_positions(config)
    assert budget == 0 or memory_at(config, size, layout, budget).total <= memory * GB
    assert budget == most or memory_at(config, size, layout, budget + 1).total > memory * GB


def test_more_of_anything_takes_no_less_memory() -> None:
    config = paper()
    size, layout = read_shapes(config), layout_of(config, checkpointing=False)
    base = memory_at(config, size, layout, 4096).total
    assert memory_at(config, size, layout, 4097).total > base
    assert memory_at(config, size, replace(layout, checkpointing=True), 4096).total < base
    assert memory_at(config, size, replace(layout, lean=False), 4096).total > base
    assert memory_at(config, size, replace(layout, value_bytes=4), 4096).total > base
    stages = [memory_at(config, size, replace(layout, zero=zero), 4096).total for zero in (0, 1, 2, 3)]
    assert stages == sorted(stages, reverse=True)

    sharded = replace(layout, zero=3, node_ranks=8, ranks=64)
    stored = memory_at(config, size, sharded, 4096)
    for changes in ({"optimizer": Offload.cpu}, {"parameters": Offload.cpu}, {"optimizer": Offload.nvme}):
        assert memory_at(config, size, replace(sharded, **changes), 4096).total < stored.total
        host = host_memory(size, config.stage.whole_parts, replace(sharded, **changes))
        assert host.memory > 0
        assert (host.disk > 0) == (Offload.nvme in changes.values())
    copied = memory_at(config, size, replace(sharded, hpz=True), 4096)
    assert copied.weights - stored.weights == 2 * sum(size.parameters.values()) / 8, "all weights once in each node"


def test_what_leaves_the_card_is_on_the_host() -> None:
    config = paper("finetune", "zero=zero3_offload")
    size = read_shapes(config)
    layout = layout_of(config, checkpointing=False)
    kept, moved = (
        memory_at(config, size, replace(layout, optimizer=place, parameters=place), 4096)
        for place in (Offload.none, Offload.cpu)
    )
    host = host_memory(size, config.stage.whole_parts, layout)
    # There, what is sent back is laid out once more.
    back = 2 * sum(size.parameters[part] for part in config.stage.whole_parts) / 8
    assert host.memory == pytest.approx(kept.total - moved.total + back)


def test_recommendations() -> None:
    def best(*more: str) -> tuple[int, bool]:
        config = paper("finetune", *more)
        choice = recommend(config, read_shapes(config), limit_of(config))
        assert choice is not None
        assert choice.fits
        assert choice.memory.total <= limit_of(config)
        return choice.layout.zero, choice.layout.checkpointing

    assert best() == (2, False), "7B on 80 GB"
    assert best("hardware=a100_40gbx8") == (3, False), "7B on 40 GB"
    assert best("llm=vicuna_13b") == (3, False), "13B on 80 GB"
    assert best("llm=vicuna_13b", "hardware.card=a100-40gb") == (3, True)


def test_presets_follow_the_recommendation() -> None:
    assert paper().zero.stage == 2
    assert paper().zero.overlap_comm
    assert paper("finetune", "hardware=a100_40gbx8").zero.stage == 3
    assert paper("finetune", "hardware=a100_40gbx8", "zero=zero2").zero.stage == 2, "the command line wins"
    for preset in options("hardware"):
        config = compose(["stage=align", "data.root=/d", f"hardware={preset}"])
        assert (config.data.num_workers > 0) == (config.hardware.device is Device.cuda)


def test_what_is_left_open_is_planned() -> None:
    planned = settle(paper())
    assert planned.hardware.activation_checkpointing is Checkpointing.off
    budget = planned.data.token_budget
    assert budget is not None
    assert budget % 64 == 0
    assert budget >= 2 * planned.data.max_length
    assert settle(planned) == planned, "a run that is resumed plans the same"

    tight = settle(paper("finetune", "hardware.memory_gb=34"))
    assert tight.hardware.activation_checkpointing is Checkpointing.on
    assert (tight.data.token_budget or 0) >= tight.data.max_length

    given_ = settle(paper("finetune", "data.token_budget=3000"))
    assert given_.data.token_budget == 3000
    assert given_.hardware.activation_checkpointing is Checkpointing.off

    nowhere = compose(["stage=align", "hardware=cpu", "data.root=/d"])
    assert settle(nowhere) == replace(
        nowhere, hardware=replace(nowhere.hardware, activation_checkpointing=Checkpointing.off)
    )


def test_a_budget_of_ones_own_is_obeyed() -> None:
    config = paper("finetune", "data.token_budget=50000", "hardware.activation_checkpointing=off")
    assert settle(config) == config
    assert not choose(config, read_shapes(config), limit_of(config)).fits


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["hardware.activation_checkpointing=off", "hardware.memory_gb=38"], "activation_checkpointing=on"),
        (["data.token_budget=20000", "hardware.activation_checkpointing=off"], r"=on; or data\.token_budget=\d+$"),
        (["hardware.memory_gb=24"], "zero=zero3"),
        (["hardware.memory_gb=12"], r"a card of at least \d+ GB.*; or \d+ ranks with zero=zero3"),
    ],
)
def test_what_does_not_fit_says_what_would(more: list[str], expected: str, capsys: Any) -> None:
    with pytest.raises(UserError, match="does not fit") as caught:
        plan.main(["stage=finetune", "experiment=paper_7b", *more])
    assert re.search(expected, caught.value.remedy), caught.value.remedy
    assert "fits: no" in capsys.readouterr().out

    config, seen = paper("finetune", *more), list[str]()
    for remedy in remedies(config, read_shapes(config), limit_of(config)):
        if " of at least " in remedy or " ranks with " in remedy:
            continue
        seen.append(remedy)
        words = [word for word in more if word.split("=")[0] not in remedy]
        again = paper("finetune", *words, *remedy.split())
        assert choose(again, read_shapes(again), limit_of(again)).fits, remedy
    assert seen, "something that can be typed"


def test_a_run_that_cannot_fit_is_refused_before_it_starts() -> None:
    with pytest.raises(UserError, match="max_length=2048 positions does not fit") as caught:
        settle(paper("finetune", "hardware.memory_gb=24"))
    assert "zero=zero3" in caught.value.remedy


def test_the_command(capsys: Any) -> None:
    plan.main(["experiment=paper_7b", "--price=2", "--samples=600000", "--mfu=0.5"])
    out = capsys.readouterr().out
    align, finetune = out.split("stage finetune")
    for words in ("weights", "optimizer", "gradients", "activations", "logits", "peak", "recommended", "fits: yes"):
        assert words in align
        assert words in finetune
    assert "(assumed, not measured)" in out
    rate = float(re.findall(r"expected: ([\d.]+) samples/s", align)[0])
    assert rate == pytest.approx(8 * 0.5 * 312 / 4.7036, rel=0.01)
    hours, cost = re.findall(r"expected: ([\d.]+) hours.*hours, ([\d.]+) at 2 per card", align)[0]
    assert float(hours) == pytest.approx(600_000 / rate / 3600, abs=0.01)
    assert float(cost) == pytest.approx(float(hours) * 8 * 2, rel=0.02)


def test_a_number_of_anchors_that_the_image_decides_is_expected_and_said(capsys: Any) -> None:
    words = ["experiment=paper_7b", "stage=align", "hardware=a100x8", "selector=correlation", "tiling=grid_2x2_global"]
    assert plan.main([*words, "data.feature_cache=f"]) == 0
    assert "tiles of 196 (expected: model.selector.expected_share; 576 at most)" in capsys.readouterr().out
    assert plan.main([*words, "data.feature_cache=f", "model.selector.expected_share=1.0"]) == 0
    assert "tiles of 576 (expected" in capsys.readouterr().out


def test_a_plan_without_a_card_is_still_a_plan(capsys: Any) -> None:
    assert plan.main(["stage=align", "experiment=paper_7b", "hardware=one_gpu"]) == 0
    out = capsys.readouterr().out
    assert "fits: not known" in out
    assert "expected speed: not known" in out
    with pytest.raises(UserError, match="--mfu is a share"):
        plan.main(["stage=align", "experiment=paper_7b", "--mfu=40"])
    with pytest.raises(UserError, match=r"hardware\.card=z100 is not known"):
        plan.main(["stage=align", "experiment=paper_7b", "hardware.card=z100"])


NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200", "NVIDIA L40S": "l40s", "NVIDIA A10": "a10", "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA A10G": None, "Tesla T4": None,
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_known_by_the_name_of_their_device(name: str) -> None:
    expected = NAMES[name]
    assert card_of_device(name) == (CARDS[expected] if expected else None)


def test_a_run_is_prepared_with_what_was_planned(tiny_backbones: Path, tmp_path: Path) -> None:
    overrides = [*write_world(tmp_path, tiny_backbones), "run=planned", "hardware.memory_gb=4"]
    settled = prepare(compose(overrides), ["test"]).read_config()
    budget = settled.data.token_budget
    assert budget is not None
    assert budget >= settled.data.max_length
    assert settled.hardware.activation_checkpointing is Checkpointing.off
    resumed = prepare(compose([*overrides, "resume=auto"]), ["test"]).read_config()
    assert resumed.data.token_budget == budget
