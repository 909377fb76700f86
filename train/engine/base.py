"""What the trainer asks of an engine, whatever is underneath."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from anchorformer.contracts import Batch
from train.config import Part, RunConfig
from train.distributed import World


class Engine(abc.ABC):
    """Gradients, the optimizer's step and their state, over one process or many.

    A step is `accumulate`, then `part_grad_norms` if wanted, then `step`.
    """

    model: nn.Module
    """The model itself; under ZeRO-3 its tensors are partitioned."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config = config
        self.world = world

    def accumulate(self, batches: Sequence[Batch], step_supervised: int) -> float:
        """Forward and backward over this rank's micro-batches, leaving the step's gradients summed over the ranks.

        Args:
            batches: at least one, and equally many on every rank.
            step_supervised: supervised tokens of the step over all ranks.

        Returns:
            This rank's share of the step's loss; the shares of all ranks add up to it.
        """
        self.model.train()
        shares = [
            self._backward(batch.to(self.world.device), step_supervised, is_last=number == len(batches))
            for number, batch in enumerate(batches, 1)
        ]
        # One look at the device per step; in fp64, so that the sum does not depend on the number of micro-batches.
        return math.fsum(float(share) for share in shares)

    @abc.abstractmethod
    def _backward(self, batch: Batch, step_supervised: int, *, is_last: bool) -> Tensor:
        """One micro-batch; returns its detached share of the loss."""

    @abc.abstractmethod
    def part_grad_norms(self) -> dict[Part, float]:
        """Norm of each trained part's whole gradient before clipping, the same on every rank; after `accumulate`."""

    @abc.abstractmethod
    def step(self) -> None:
        """Clips the total gradient norm to `stage.clip_norm`, updates the weights and the learning rates."""

    @property
    @abc.abstractmethod
    def lrs(self) -> dict[str, float]:
        """Learning rate of each parameter group in the coming step."""

    @abc.abstractmethod
    def values(self) -> dict[str, Tensor]:
        """Name -> what this rank holds of each parameter: the fp32 weights of trained ones, frozen ones as loaded.

        A trained parameter of which this rank holds nothing is left out.
        """

    @abc.abstractmethod
    def gather(self, part: Part) -> dict[str, Tensor] | None:
        """Every tensor of a part under its full name, on the CPU of rank 0; None on other ranks. All ranks call it."""

    @abc.abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Writes trained weights, optimizer and learning rates into an existing folder; all ranks call it.

        Returns:
            The files that this rank wrote; every file has one writer.
        """

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, into an engine that has not stepped yet; all ranks call it."""


def squared_norms(gradients: Iterable[tuple[Part, Tensor]], parts: Iterable[Part]) -> dict[Part, float]:
    """Sum of squares per part, in fp64, with one look at the device per part."""
    norms: dict[Part, list[Tensor]] = {part: [] for part in parts}
    for part, gradient in gradients:
        norms[part].append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
    return {part: float(torch.stack(found).double().square().sum()) if found else 0.0 for part, found in norms.items()}


def total_norm(norms: dict[Part, float]) -> float:
    """Norm of the whole gradient from the norms of its parts."""
    return math.sqrt(math.fsum(norm * norm for norm in norms.values()))
