"""How much memory a process has held, on its card and in RAM."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """The most that a process has held so far, in bytes.

    Attributes:
        host: resident in RAM; a loader's processes are not counted.
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
