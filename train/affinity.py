"""Binds a rank to the cores that are near its card, so that its batches and its launches do not cross the sockets."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

DEVICES = Path("/sys/bus/pci/devices")


def bind_near(card: int, devices: Path = DEVICES) -> None:
    """Leaves this process, and what it starts, those of its cores that the kernel calls local to a card.

    Ranks whose cards are on one socket share its cores. Whoever has bound the process already (Slurm, numactl) is
    obeyed: only of those cores some are left, and where none of them is near the card, all.

    Args:
        card: CUDA's number of it, in this process.
    """
    facts: Any = torch.cuda.get_device_properties(card)  # torch's stubs leave these three out
    place = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
    listed = devices / place / "local_cpulist"
    if not hasattr(os, "sched_setaffinity") or not listed.is_file():
        log.info("card %d (%s): the kernel does not say which cores are near", card, place)
        return
    allowed = os.sched_getaffinity(0)
    near = parse_cores(listed.read_text()) & allowed
    if not near:
        log.warning("card %d (%s): none of this rank's %d cores is near it", card, place, len(allowed))
        return
    os.sched_setaffinity(0, near)
    log.info("card %d (%s): %d of %d cores are near it, and this rank's", card, place, len(near), len(allowed))


def parse_cores(text: str) -> set[int]:
    """The kernel's way to list cores: `0-15,128-143`."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return cores
