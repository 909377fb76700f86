"""How much memory each rank has held, on its card and in RAM, and which rank stands out."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GIB = 2**30
RATIO = 1.1
"""Of a rank over the mean of the others, from which on they are called uneven; a card has not much more to spare."""
LEAST_GIB = 0.5
"""What such a rank must hold beyond that mean for it to be worth a word."""


@dataclass(frozen=True)
class Memory:
    """The most that one rank has held so far, in bytes.

    Attributes:
        host: resident in RAM, of the rank's process; its loader's processes are not counted.
        device: in tensors on its card; None where it computes on CPU.
    """

    host: int
    device: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> Memory:
        """Of this process; looks at counters on the host, so that no card is waited for."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        on_card = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
        return cls(host=resident if sys.platform == "darwin" else resident * 1024, device=on_card)

    @property
    def computing(self) -> int:
        """Where the steps are computed: on the card, or in RAM where there is none."""
        return self.host if self.device is None else self.device


def by_rank(ranks: Sequence[Memory]) -> dict[str, list[float]]:
    """GiB of each rank: `host_gib`, and `device_gib` where the ranks have cards."""
    devices = [memory.device for memory in ranks if memory.device is not None]
    on_cards = {"device_gib": [round(device / GIB, 3) for device in devices]} if devices else {}
    return on_cards | {"host_gib": [round(memory.host / GIB, 3) for memory in ranks]}


def unevenness(gib: Sequence[float], kind: str) -> str | None:
    """A few words about the fullest rank, where it holds clearly more than the others.

    Args:
        gib: of each rank.
        kind: of memory.
    """
    fullest = max(range(len(gib)), key=gib.__getitem__)
    others = [held for rank, held in enumerate(gib) if rank != fullest]
    mean = sum(others) / len(others) if others else gib[fullest]
    if gib[fullest] < max(RATIO * mean, mean + LEAST_GIB):
        return None
    return f"{kind} of rank {fullest} {gib[fullest]:.1f} GiB, of the others {mean:.1f}"
