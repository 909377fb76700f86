"""A hash of every parameter's bits that is the same however the parameter is divided over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one parameter.

    Attributes:
        values: one-dimensional view of what is held; writing into it writes into the engine.
        start: place of its first value in the flattened parameter.
        total: values of the whole parameter.
    """

    values: Tensor
    start: int
    total: int

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        """All of a tensor; one that is not contiguous is copied, and can be hashed but not written into."""
        flat = tensor.detach().reshape(-1)
        return cls(flat, 0, flat.numel())

    @property
    def is_whole(self) -> bool:
        return self.values.numel() == self.total


class Print(NamedTuple):
    """Hash of a piece; of a whole parameter where `is_whole`."""

    bits: int
    is_whole: bool


_CHUNK = 1 << 22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


def fingerprint(pieces: Mapping[str, Piece]) -> dict[str, Print]:
    """A 64-bit hash of each piece's bits, computed where it lies.

    It is the sum of all values' bits, each multiplied by an odd number that depends on its place in the whole
    parameter. Integer sums wrap and commute, so the hash is the same on every device and with every number of threads,
    and the hashes of a parameter's pieces add up to that of the whole. It guards against accidents, not against an
    adversary.
    """
    return {name: Print(_hash(piece), piece.is_whole) for name, piece in pieces.items()}


def join(ranks: Sequence[Mapping[str, Print]]) -> dict[str, int]:
    """Hashes of whole parameters from those of every rank's pieces.

    Raises:
        AssertionError: ranks that each hold a whole parameter hold different bits of it.
    """
    joined: dict[str, int] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        prints = [rank[name] for rank in ranks if name in rank]
        replicas = {found.bits for found in prints if found.is_whole}
        if len(replicas) > 1:
            raise AssertionError(f"ranks hold different values of {name}")
        joined[name] = replicas.pop() if replicas else _wrapped(found.bits for found in prints)
    return joined


def _hash(piece: Piece) -> int:
    total = torch.zeros((), dtype=torch.int64, device=piece.values.device)
    place = piece.start
    for chunk in piece.values.split(_CHUNK) if piece.values.numel() else ():
        end = place + chunk.numel()
        mixed = torch.arange(place, end, dtype=torch.int64, device=chunk.device) * _ODD
        # Odd multipliers, so that no change of a single value can vanish; mixed, so that no pattern of changes does.
        multipliers = (mixed ^ (mixed >> 29)) | 1
        total += (chunk.view(_BITS[chunk.element_size()]).long() * multipliers).sum()
        place = end
    return int(total)


def _wrapped(parts: Iterable[int]) -> int:
    """The sum of int64 values as int64 arithmetic has it."""
    return (sum(parts) + (1 << 63)) % (1 << 64) - (1 << 63)
