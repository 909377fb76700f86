"""What one step sends between ranks and between card and host, in bytes: counted as DeepSpeed 0.19 does it, which
`tests/train/test_plan_traffic.py` compares with the collectives of real ranks."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from train.choices import Part
from train.config import LoraConfig
from train.plan.connectors import FP32
from train.plan.memory import MASTER_AND_MOMENTS, ZERO3_PREFETCH, ZERO3_REUSE, Layout, value_counts
from train.plan.shapes import Shapes
from train.zero import Offload

GROUPS = 4
"""Groups of parameters, each of which stages 1 and 2 gather at once: connector and language model, matrices and not."""


class Phase(str, Enum):
    """When it travels, and so what it can hide behind."""

    forward = "forward"
    backward = "backward"
    after = "after"
    """Behind the last backward, where nothing is computed."""


class Way(str, Enum):
    """Between whom."""

    all = "all"
    """All ranks."""
    node = "node"
    """The ranks of each node."""
    host = "host"
    """A card and its host."""
    disk = "disk"
    """A host and its NVMe."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What travels one way in one phase of a step.

    Attributes:
        size: bytes, of the whole tensor where it is gathered or scattered; of one rank on the way to the host.
        calls: in how many pieces.
        hides: whether the computation of its phase goes on meanwhile.
    """

    phase: Phase
    way: Way
    size: float
    calls: float
    hides: bool


def step_traffic(
    shapes: Shapes, trains: Collection[Part], layout: Layout, micro_batches: int, lora: LoraConfig | None = None, *,
    overlaps: bool = True, qwz: bool = False, qgz: bool = False,
) -> list[Message]:  # fmt: skip
    """All messages of an optimizer step of `micro_batches` forwards and backwards.

    | stage | once per step | per micro-batch |
    |---|---|---|
    | 0 | all-reduce of the gradients | |
    | 1 | all-reduce of the gradients, gather of the new weights | |
    | 2 | gather of the new weights | all-reduce of the gradients |
    | 3 | | gather for forward, gather for backward, scatter of the gradients |

    Stages 1 and 2 do reduce to all ranks, of which each keeps its part. An all-reduce counts twice its bytes, being a
    scatter and a gather. With hpZ only the first gather of trained weights after a step goes to all ranks.

    Args:
        overlaps: `zero.overlap_comm`: whether reducing goes on beside backward.
        qwz, qgz: weights in 8 bits, gradients in 4.

    Raises:
        UserError: an adapted layer whose shape is not known.
    """
    total, trained = value_counts(shapes, trains, lora)
    size, sent = layout.value_bytes, []
    # What is needed again soon after the turn is not given back; a tower that nobody trains is not needed again.
    seen_once = 0 if Part.vision_tower in trains else shapes.parameters[Part.vision_tower]
    again = max(0.0, total - seen_once - ZERO3_REUSE / 2)
    if layout.ranks > 1:
        sent = (
            _gathering(layout, micro_batches, total, trained, again, overlaps=overlaps, qwz=qwz, qgz=qgz)
            if layout.zero == 3
            else _reducing(layout, micro_batches, trained, overlaps=overlaps)
        )
    mine = trained / layout.ranks
    if layout.parameters is not Offload.none:
        fetched = micro_batches * size * total / layout.ranks
        for phase in (Phase.forward, Phase.backward):
            calls = micro_batches * math.ceil(total / ZERO3_PREFETCH)
            sent.append(Message(phase=phase, way=Way.host, size=fetched, calls=calls, hides=True))
            if layout.parameters is Offload.nvme:
                sent.append(Message(phase=phase, way=Way.disk, size=fetched, calls=calls, hides=True))
    if layout.optimizer is not Offload.none:
        gradients, weights = FP32 * mine * micro_batches, size * mine
        calls = math.ceil(mine / layout.bucket)
        sent.append(Message(phase=Phase.backward, way=Way.host, size=gradients, calls=calls, hides=overlaps))
        sent.append(Message(phase=Phase.after, way=Way.host, size=weights, calls=calls, hides=False))
        if layout.optimizer is Offload.nvme:  # read with the gradients, written without
            swapped = (2 * MASTER_AND_MOMENTS + FP32) * mine
            sent.append(Message(phase=Phase.after, way=Way.disk, size=swapped, calls=calls, hides=False))
    return sent


def _reducing(layout: Layout, micro_batches: int, trained: int, *, overlaps: bool) -> list[Message]:
    size, buckets = layout.value_bytes * trained, math.ceil(trained / layout.bucket)
    times = micro_batches if layout.zero == 2 else 1
    reduced = Message(
        phase=Phase.backward if layout.zero else Phase.after, way=Way.all, size=2 * size * times,
        calls=2 * buckets * times, hides=overlaps and layout.zero > 0,
    )  # fmt: skip
    gathered = Message(phase=Phase.after, way=Way.all, size=size, calls=GROUPS, hides=False)
    return [reduced, gathered] if layout.zero else [reduced]


def _gathering(
    layout: Layout, micro_batches: int, total: int, trained: int, again: float, *, overlaps: bool, qwz: bool, qgz: bool
) -> list[Message]:
    byte = 1 if qwz else layout.value_bytes

    def gather(phase: Phase, way: Way, values: float, times: int) -> Message:
        calls = math.ceil(values / ZERO3_PREFETCH) * times
        return Message(phase=phase, way=way, size=byte * values * times, calls=calls, hides=True)

    if layout.hpz:
        gathers = [
            gather(Phase.forward, Way.all, trained, 1),
            gather(Phase.forward, Way.node, total - trained, 1),
            gather(Phase.forward, Way.node, total, micro_batches - 1),
            gather(Phase.backward, Way.node, again, micro_batches),
        ]
    else:
        gathers = [
            gather(Phase.forward, Way.all, total, micro_batches), gather(Phase.backward, Way.all, again, micro_batches),
        ]  # fmt: skip
    scattered = trained * micro_batches * (0.5 if qgz else layout.value_bytes)
    calls = math.ceil(trained / layout.bucket) * micro_batches
    scatter = Message(phase=Phase.backward, way=Way.all, size=scattered, calls=calls, hides=overlaps)
    return [message for message in [*gathers, scatter] if message.size]
