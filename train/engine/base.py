"""What the trainer asks of an engine, whatever is underneath."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anchorformer.contracts import Batch
from train.choices import EngineName, Part
from train.config import RunConfig
from train.distributed import World
from train.engine import whole
from train.engine.saved import Form, Saved
from train.engine.universal import Universal
from train.optim import full_shape
from train.run.fingerprint import Piece
from train.writing import together


class Engine(abc.ABC):
    """Gradients, the optimizer's step and their state, over one process or many.

    A step is `accumulate`, `agree`, `step`.
    """

    model: nn.Module
    """The model itself; under ZeRO-3 its tensors are partitioned."""
    scheduler: LambdaLR

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

    def agree(self, share: float) -> tuple[float, dict[Part, float]]:
        """What the step has come to, the same on every rank, in one message between them; after `accumulate`.

        Args:
            share: of the loss, as `accumulate` returned it.

        Returns:
            The step's loss, and the norm of each trained part's whole gradient before clipping.
        """
        squares = squared_norms(self._gradients(), self.config.stage.trains)
        # Where nothing is parted every rank holds the whole gradient; else a part of its own.
        parted = list(squares.values()) if self._is_parted else []
        loss, *totals = self.world.sum([share, *parted])
        whole_squares = dict(zip(squares, totals, strict=True)) if self._is_parted else squares
        return loss, {part: square**0.5 for part, square in whole_squares.items()}

    @abc.abstractmethod
    def _gradients(self) -> Iterable[tuple[Part, Tensor]]:
        """This rank's part of the reduced gradients."""

    @abc.abstractmethod
    def step(self) -> None:
        """Clips the total gradient norm to `stage.clip_norm`, updates the weights and the learning rates."""

    @property
    @abc.abstractmethod
    def _param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""

    @property
    def lrs(self) -> dict[str, float]:
        """Learning rate of each parameter group in the coming step."""
        return {group["name"]: float(group["lr"]) for group in self._param_groups}

    def values(self) -> dict[str, Piece]:
        """Name -> what this rank holds of each parameter: the fp32 weights of trained ones, frozen ones as loaded.

        A parameter of which this rank holds nothing is left out.
        """
        return self._pieces(dict(self.model.named_parameters()))

    def moments(self) -> dict[str, Piece]:
        """`<kind>.<name>` -> what this rank holds of AdamW's moments of each trained parameter."""
        trained = self._trained()
        return {f"{kind}.{name}": part for kind in whole.MOMENTS for name, part in self._pieces(trained, kind).items()}

    @abc.abstractmethod
    def _pieces(self, parameters: Mapping[str, nn.Parameter], moment: str | None = None) -> dict[str, Piece]:
        """What this rank holds of each of these parameters, or of one of AdamW's moments of trained ones."""

    @abc.abstractmethod
    def _keep(self, pieces: Mapping[str, Piece], moment: str | None) -> None:
        """Writes pieces that were changed back where `_pieces` could only give copies."""

    @abc.abstractmethod
    def gather(self, part: Part) -> dict[str, Tensor] | None:
        """Every tensor of a part, or of its adapter where only that is trained, under its full name on the CPU of
        rank 0; None on other ranks. All ranks call it."""

    @property
    def form(self) -> Form:
        """How the state is written: whole where it is small or every process has it all anyway, else rank by rank."""
        is_small = set(self.config.stage.whole_parts) <= {Part.connector, Part.integration}
        # What DeepSpeed swaps it would save as files of its own beside the shards.
        return Form.whole if is_small or not self._is_parted or self.config.zero.uses_nvme else Form.shards

    @property
    def _is_parted(self) -> bool:
        """Whether ranks hold different pieces of the trained weights."""
        return self.config.engine is EngineName.deepspeed and self.config.zero.stage > 0

    def save(self, folder: Path) -> list[Path]:
        """Writes trained weights, optimizer and learning rates into an existing folder; all ranks call it.

        Returns:
            The files that this rank wrote; every file has one writer.

        Raises:
            UserError: a rank could not write; on all ranks.
        """
        written = self._save_whole(folder) if self.form is Form.whole else self._save_shards(folder)
        saved = Saved(
            form=self.form, ranks=self.world.size, zero_stage=self.config.zero.stage,
            optimizer_steps=int(self._step_counts()[0]), scheduler=self.scheduler.state_dict(),
        )  # fmt: skip
        with together(self.world, folder):
            if self.world.is_main:
                written.append(saved.write(folder))
        return written

    def load(self, folder: Path, converted: Path | None = None) -> None:
        """Reads what `save` wrote, into an engine that has not stepped yet; all ranks call it.

        Args:
            converted: what `train.engine.universal` made of the folder, where its shards do not fit this engine.
        """
        saved = Saved.read(folder)
        if saved.form is Form.shards and converted is None:
            self._load_shards(folder)
            return
        trained = self._trained()
        weights, moments = self._pieces(trained), {kind: self._pieces(trained, kind) for kind in whole.MOMENTS}
        source = whole.WholeFiles(folder) if converted is None else Universal(converted)
        whole.read(source, weights, moments)
        self._keep(weights, None)
        for kind, pieces in moments.items():
            self._keep(pieces, kind)
        for count in self._step_counts():
            count.fill_(saved.optimizer_steps)
        self._publish()
        self.scheduler.load_state_dict(saved.scheduler)
        for group, lr in zip(self._param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    def _save_whole(self, folder: Path) -> list[Path]:
        trained = self._trained()
        shapes = {name: full_shape(parameter) for name, parameter in trained.items()}

        def gather(moment: str | None = None) -> dict[str, Tensor]:
            return whole.gather(self.world, self._pieces(trained, moment), shapes, is_parted=self._is_parted)

        weights, moments = gather(), {kind: gather(kind) for kind in whole.MOMENTS}
        written: list[Path] = []
        with together(self.world, folder):
            written += whole.write(folder, weights, moments) if self.world.is_main else []
        return written

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @abc.abstractmethod
    def _save_shards(self, folder: Path) -> list[Path]:
        """Each rank writes its share."""

    @abc.abstractmethod
    def _load_shards(self, folder: Path) -> None:
        """Each rank reads the share that it wrote."""

    @abc.abstractmethod
    def _step_counts(self) -> list[Tensor]:
        """AdamW's counters of its steps, all equal; writing into them writes into the optimizer."""

    @abc.abstractmethod
    def _publish(self) -> None:
        """Copies the fp32 weights into the model's own parameters, on all ranks."""


def squared_norms(gradients: Iterable[tuple[Part, Tensor]], parts: Iterable[Part]) -> dict[Part, float]:
    """Sum of squares per part, in fp64, with one look at the device per part."""
    norms: dict[Part, list[Tensor]] = {part: [] for part in parts}
    for part, gradient in gradients:
        norms[part].append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
    return {part: float(torch.stack(found).double().square().sum()) if found else 0.0 for part, found in norms.items()}


def total_norm(norms: dict[Part, float]) -> float:
    """Norm of the whole gradient from the norms of its parts."""
    return math.sqrt(math.fsum(norm * norm for norm in norms.values()))
