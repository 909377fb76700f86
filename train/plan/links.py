"""Speeds and latencies of what bytes travel over outside of a card, each with its source; all times made of them are
estimates."""

from __future__ import annotations

from dataclasses import dataclass

REACHED = 0.75
"""Share of a link's data sheet that large messages reach. Assumed."""
ADAPTER_GBS = 25.0
"""InfiniBand HDR, 200 Gb/s, one direction. A DGX A100 has one adapter for each card (its data sheet)."""
HOST_LINK_GBS = 32.0
"""Card to host: PCIe 4.0 of 16 lanes, one direction (the standard)."""
HOST_MEMORY_GBS = 400.0
"""Of a node: two sockets of eight channels DDR4-3200 (data sheet of EPYC 7742)."""
NVME_GBS = 12.0
"""Of a node: four drives. Assumed; drives differ."""
DISK_GBS = 2.0
"""At which one node writes and hashes a checkpoint. Assumed; `--disk` says otherwise."""

BASE_SECONDS, HOP_SECONDS, NETWORK_HOP_SECONDS = 8.4e-6, 3.4e-6, 14.0e-6
"""Start of a ring and its steps within a node and between nodes. Source: NCCL's own model for choosing an algorithm
(`src/graph/tuning.cc`, ring, protocol simple, NVLink and network)."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that take part in a collective.

    Attributes:
        ranks: all of them.
        nodes: over which they are spread evenly.
        link: GB/s of one card to its neighbours in the node.
        network: GB/s of one node to the others, all of its adapters together.
    """

    ranks: int
    nodes: int
    link: float
    network: float

    def ring_seconds(self, size: float, calls: float) -> tuple[float, float]:
        """Latency, and time in motion, of gathering or scattering `size` bytes in `calls` rings.

        A ring passes (n - 1) / n of the bytes over every link; NCCL lays as many rings as there are adapters, so that a
        node's crossing has all of them. An all-reduce is two of these.
        """
        if self.ranks == 1:
            return 0.0, 0.0
        crossings = self.nodes - 1
        steps = self.ranks - 1 - crossings
        latency = calls * (BASE_SECONDS + steps * HOP_SECONDS + crossings * NETWORK_HOP_SECONDS)
        speed = REACHED * 1e9 * (self.link if self.nodes == 1 else min(self.link, self.network))
        return latency, size * (self.ranks - 1) / self.ranks / speed
