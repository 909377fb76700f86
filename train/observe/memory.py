"""How much memory each rank has held, on its card and in RAM, and which rank stands out."""

from __future__ import annotations

from collections.abc import Sequence

from evals.memory import GIB, Memory

RATIO = 1.1
"""Of a rank over the mean of the others, from which on they are called uneven; a card has not much more to spare."""
LEAST_GIB = 0.5
"""What such a rank must hold beyond that mean for it to be worth a word."""


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
