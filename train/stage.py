"""What a stage trains: freezes the model by part, shows it, and names the trained set by a hash."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anchorformer.errors import UserError
from anchorformer.model_folder import part_state
from train.choices import Part
from train.config import StageConfig
from train.lora import is_adapter
from train.optim import full_shape


@dataclass(frozen=True)
class PartRow:
    """One line of the table: a part and what this stage does with it."""

    part: Part
    trainable: int
    total: int
    lr: float | None
    weight_decay: float | None
    dtype: torch.dtype


def parts_of(model: nn.Module) -> dict[Part, nn.Module]:
    """The parts that the model has."""
    modules = {part: getattr(model, part.value) for part in Part}
    return {part: module for part, module in modules.items() if module is not None}


def freeze(model: nn.Module, stage: StageConfig) -> None:
    """Leaves gradients on for exactly the declared parts, or their adapters, which have been put in before.

    Raises:
        UserError: the stage trains nothing, or the model has parameters outside every known part.
    """
    if not stage.trains:
        raise UserError(
            f"stage {stage.name.value} trains nothing", found="stage.trains={}", expected="at least one part",
            remedy="name a part with its learning rate, e.g. stage.trains.connector.lr=1e-3",
        )  # fmt: skip
    model.requires_grad_(False)
    known: set[int] = set()
    for part, module in parts_of(model).items():
        known |= {id(parameter) for parameter in module.parameters()}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(part in stage.trains and (is_adapter(name) or not stage.adapts(part)))
    stray = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if stray:
        raise UserError(
            "the model has parameters that no stage can name", found=", ".join(stray[:5]),
            expected=f"every parameter inside {', '.join(part.value for part in Part)}",
            remedy="move them into the part they belong to",
        )  # fmt: skip


def table(model: nn.Module, stage: StageConfig) -> list[PartRow]:
    """One row per part, counted from the model as it is now (whole tensors, also under ZeRO-3)."""
    rows = []
    for part, module in parts_of(model).items():
        parameters = list(module.parameters())
        sizes = [(math.prod(full_shape(parameter)), parameter.requires_grad) for parameter in parameters]
        config = stage.trains.get(part)
        rows.append(
            PartRow(
                part=part,
                trainable=sum(size for size, is_trained in sizes if is_trained),
                total=sum(size for size, _ in sizes),
                lr=config.lr if config else None,
                weight_decay=config.weight_decay if config else None,
                dtype=parameters[0].dtype,
            )
        )
    return rows


def render(rows: list[PartRow]) -> str:
    """The table as text."""
    lines = [f"{'part':<16}{'trainable':>16}{'total':>16}{'lr':>10}{'decay':>8}  dtype"]
    for row in rows:
        lr, decay = ("-" if value is None else f"{value:g}" for value in (row.lr, row.weight_decay))
        dtype = str(row.dtype).removeprefix("torch.")
        lines.append(f"{row.part.value:<16}{row.trainable:>16,}{row.total:>16,}{lr:>10}{decay:>8}  {dtype}")
    return "\n".join(lines)


def assert_declared(model: nn.Module, stage: StageConfig, optimized: set[int]) -> None:
    """After the engine's start: each part trains whole, by its adapter or not at all, and the optimizer holds exactly
    what is trained.

    Args:
        optimized: `id` of every parameter that the engine will update.
    """
    for row in table(model, stage):
        expected = row.total if row.part in stage.whole_parts else 0
        if stage.adapts(row.part):
            own = getattr(model, row.part.value).named_parameters()
            expected = sum(math.prod(full_shape(value)) for name, value in own if is_adapter(name))
        if row.trainable != expected:
            raise AssertionError(f"{row.part.value}: {row.trainable} trainable values after start, {expected} declared")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if trained != optimized:
        raise AssertionError(f"optimizer holds {len(optimized)} tensors, the stage trains {len(trained)}")


def trained_state(model: nn.Module, stage: StageConfig, part: Part) -> dict[str, Tensor]:
    """Tensors that a stage changes in a part, under their full names: all of it, or its adapter."""
    state = part_state(model, part.value)
    return {name: value for name, value in state.items() if is_adapter(name)} if stage.adapts(part) else state


def trained_digest(model: nn.Module) -> str:
    """Hash of the names and whole shapes of all trained parameters."""
    trained = sorted((name, full_shape(value)) for name, value in model.named_parameters() if value.requires_grad)
    return hashlib.sha256(repr(trained).encode()).hexdigest()
