"""Ranks on the cores near their cards; the kernel's account of them is a folder like /sys/bus/pci/devices."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from train import affinity


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """What the process would have been bound to; it may use 0 to 15, and each card has the bus of its number."""
    calls: list[set[int]] = []

    def facts(card: int) -> SimpleNamespace:
        return SimpleNamespace(pci_domain_id=0, pci_bus_id=16 + card, pci_device_id=0)

    monkeypatch.setattr(affinity.torch.cuda, "get_device_properties", facts)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: calls.append(set(cores)))
    return calls


def card(devices: Path, bus: int, cores: str) -> None:
    (devices / f"0000:{bus:02x}:00.0").mkdir()
    (devices / f"0000:{bus:02x}:00.0" / "local_cpulist").write_text(f"{cores}\n")


def test_a_rank_takes_of_its_cores_those_near_its_card(tmp_path: Path, bound: list[set[int]]) -> None:
    card(tmp_path, 16, "0-3,64-67")
    card(tmp_path, 17, "9")
    for number in (0, 1):
        affinity.bind_near(number, tmp_path)
    assert bound == [{0, 1, 2, 3}, {9}], "64 to 67 were taken from it by whoever has started it"


def test_where_nothing_is_known_or_nothing_is_near_a_rank_keeps_its_cores(
    tmp_path: Path, bound: list[set[int]], caplog: pytest.LogCaptureFixture
) -> None:
    affinity.bind_near(0, tmp_path)
    card(tmp_path, 16, "")
    card(tmp_path, 17, "32-63")
    for number in (0, 1):
        affinity.bind_near(number, tmp_path)
    assert not bound
    assert "card 1 (0000:11:00.0): none of this rank's 16 cores is near it" in caplog.text


@pytest.mark.gpu
def test_the_cores_near_a_real_card() -> None:
    before = os.sched_getaffinity(0)
    try:
        affinity.bind_near(0)
        assert os.sched_getaffinity(0) <= before
    finally:
        os.sched_setaffinity(0, before)
