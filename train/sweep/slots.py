"""What each of the trials that run at once gets of this machine: cards and cores, disjoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anchorformer.devices import Device
from anchorformer.errors import UserError
from train.config import RunConfig
from train.sweep.config import SweepConfig


@dataclass(frozen=True)
class Slot:
    """A share of the machine.

    Attributes:
        cards: as CUDA_VISIBLE_DEVICES names them; none where trials run on CPU.
        cores: CPU numbers; runs take their threads from how many there are.
    """

    cards: tuple[str, ...]
    cores: frozenset[int]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Of the processes in this slot; without cards they see none."""
        return {**inherited, "CUDA_VISIBLE_DEVICES": ",".join(self.cards)}


def share_out(sweep: SweepConfig, configs: Sequence[RunConfig]) -> list[Slot]:
    """The slots that a sweep's trials take turns in.

    Args:
        configs: of all runs; a slot has as many cards as the widest has ranks.

    Raises:
        UserError: fewer cards than one trial, or than all slots need.
    """
    ranks = max(config.hardware.ranks for config in configs)
    devices = {config.hardware.device for config in configs}
    cards = [] if devices == {Device.cpu} else _cards(sweep)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not cards and Device.cuda not in devices:
        number = sweep.slots or 1
        return [Slot((), _part(cores, place, number)) for place in range(number)]
    number = sweep.slots or max(1, len(cards) // ranks)
    if number * ranks > len(cards):
        raise UserError(
            "there are fewer cards than the trials need that run at once", found=f"{len(cards)} card(s)",
            expected=f"{number * ranks}: slots={number} of {ranks} rank(s)",
            remedy=f"slots={len(cards) // ranks}" if len(cards) >= ranks else "hardware.ranks=..., or hardware=cpu",
        )  # fmt: skip
    return [
        Slot(tuple(cards[place * ranks : (place + 1) * ranks]), _part(cores, place, number)) for place in range(number)
    ]


def _cards(sweep: SweepConfig) -> list[str]:
    if sweep.cards is not None:
        return [str(card) for card in sweep.cards]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [card.strip() for card in visible.split(",") if card.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _part(cores: Sequence[int], place: int, number: int) -> frozenset[int]:
    if number >= len(cores):
        return frozenset((cores[place % len(cores)],))
    share = len(cores) // number
    return frozenset(cores[place * share : (place + 1) * share])
