"""MFU of a step: only where there is a peak to compare with, and then the plan's arithmetic over it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.memory import Memory
from tests.train.cases import ALIGN, load_frozen, run_config
from train.choices import Part
from train.distributed import World, alone
from train.facts import StepFacts
from train.observe.metrics import Console, time_record
from train.observe.mfu import mfu_of
from train.plan.flops import Work, model_flops

FACTS = StepFacts(
    sample_ids=("a", "b"), tokens=300, supervised=40, images=2, skipped=0, padding_share=0.0, squares=46_000,
    own_seconds=(0.1, 0.1), memory=(Memory(host=1), Memory(host=1)),
)  # fmt: skip
CARDS = World(rank=0, size=2, device=torch.device("cuda", 0))


def named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


def test_share_of_the_peak_of_all_cards(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "NVIDIA A100-SXM4-80GB")
    model = load_frozen(tiny_folder, run_config(ALIGN), torch.bfloat16)
    mfu = mfu_of(model, {Part.connector}, CARDS)
    assert mfu is not None
    work = Work(positions=300, squares=46_000, supervised=40, images=2)
    flops = sum(model_flops(mfu.shapes, {Part.connector}, work).values())
    assert mfu.share(FACTS, 0.25) == pytest.approx(flops / (0.25 * 2 * 312e12))
    record = time_record(0.25, 0.0, FACTS, torch.device("cpu"), mfu)
    assert record["mfu"] == round(mfu.share(FACTS, 0.25), 6)


def test_none_where_there_is_nothing_to_compare_with(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    halves = load_frozen(tiny_folder, run_config(ALIGN), torch.bfloat16)
    with caplog.at_level(logging.INFO):
        assert mfu_of(halves, {Part.connector}, alone()) is None
        assert caplog.text == "", "nobody asks for the MFU of a CPU"
        named(monkeypatch, "Tesla T4")
        assert mfu_of(halves, {Part.connector}, CARDS) is None
        assert "the peak of Tesla T4 is not known" in caplog.text
        named(monkeypatch, "NVIDIA H200")
        assert mfu_of(load_frozen(tiny_folder, run_config(ALIGN)), {Part.connector}, CARDS) is None
        assert "bf16" in caplog.text
        other: Any = halves
        other.config.connector = {"_target_": "mine.Own"}
        assert mfu_of(halves, {Part.connector}, CARDS) is None
        assert "mine.Own" in caplog.text
    assert "mfu" not in time_record(0.25, 0.0, FACTS, torch.device("cpu"))


def test_the_console_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(total_steps=2, first_step=0)
    console.count(1.0)
    time = {"seconds": 1.0, "data_wait_seconds": 0.0, "tokens_per_second": 1.0, "samples_per_second": 1.0,
            "ranks": {"host_gib": [1.0]}}  # fmt: skip
    record = {"step": 1, "loss": 1.0, "lr": {"connector/decay": 1.0}, "grad_norm": 1.0}
    with caplog.at_level(logging.INFO):
        console.show(record | {"time": time | {"mfu": 0.4321}})
        console.show(record | {"time": time})
    first, second = (entry.getMessage() for entry in caplog.records)
    assert "MFU 43.2%" in first
    assert "MFU" not in second
