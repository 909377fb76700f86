"""How long each rank takes by itself, and which one the others keep waiting for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


class Stopwatch:
    """Measures a rank's forward passes, the largest piece of a step in which it does not wait for another rank.

    Whole steps tell nothing: in their collectives all ranks wait for the slowest and so take equally long. (Under
    ZeRO-3 the forward pass has collectives too; there only a rank that is slow with its data stands out.) Passes in
    eval mode belong to a validation, and to no step. On CUDA the time is taken between events in the stream and read a
    step later, so that nothing is waited for.

    Args:
        model: as the engine calls it.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []
        model.register_forward_pre_hook(self._mark)
        model.register_forward_hook(self._mark)

    def _mark(self, model: nn.Module, *_: object) -> None:
        if not model.training:
            return
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> float:
        """Seconds of the forward passes since it was called last; on CUDA these must have come to their end."""
        starts, ends = self._marks[::2], self._marks[1::2]
        self._marks = []
        if self._is_cuda:
            return sum(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) / 1e3
        return float(sum(end - start for start, end in zip(starts, ends, strict=True)))


class Lag:
    """Watches the ranks' own seconds for one that is slower than the others step after step."""

    STEPS = 10
    """How many steps on end; samples of uneven length make any rank the slowest for one or two."""
    RATIO = 1.5
    """Own seconds over the mean of the others'."""
    SHARE = 0.1
    """What the others must lose, as a share of the step, for it to be worth a line."""

    def __init__(self) -> None:
        self._rank, self._count = -1, 0

    def observe(self, own_seconds: Sequence[float], step_seconds: float) -> str | None:
        """The warning, once per `STEPS` steps of lagging.

        Args:
            own_seconds: of each rank, without its waiting for others.
            step_seconds: of the whole step.
        """
        slowest = max(range(len(own_seconds)), key=own_seconds.__getitem__)
        others = [seconds for rank, seconds in enumerate(own_seconds) if rank != slowest]
        mean = sum(others) / len(others) if others else own_seconds[slowest]
        lost = own_seconds[slowest] - mean
        if lost < self.SHARE * step_seconds or own_seconds[slowest] < self.RATIO * mean:
            self._rank, self._count = -1, 0
            return None
        self._count = self._count + 1 if slowest == self._rank else 1
        self._rank = slowest
        if self._count % self.STEPS:
            return None
        over_all = max(own_seconds) * len(own_seconds) / sum(own_seconds)
        return (
            f"rank {slowest} is slow: {own_seconds[slowest]:.3g} s by itself, the others {mean:.3g} s (max/mean "
            f"{over_all:.2f}), for {self._count} steps; every step waits {lost:.3g} s for it"
        )
