"""What a stage trains: freezes the model by part, shows it, and proves that frozen stays frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anchorformer.errors import UserError
from train.config import Part, StageConfig
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


def freeze(model: nn.Module, stage: StageConfig) -> None:
    """Leaves gradients on for exactly the declared parts.

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
    for part in Part:
        module = getattr(model, part.value)
        known |= {id(parameter) for parameter in module.parameters()}
        if part in stage.trains:
            module.requires_grad_(True)
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
    for part in Part:
        parameters = list(getattr(model, part.value).parameters())
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
    """After the engine's start: each part trains whole or not at all, and the optimizer holds exactly what is trained.

    Args:
        optimized: `id` of every parameter that the engine will update.
    """
    for row in table(model, stage):
        expected = row.total if row.part in stage.trains else 0
        if row.trainable != expected:
            raise AssertionError(f"{row.part.value}: {row.trainable} trainable values after start, {expected} declared")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if trained != optimized:
        raise AssertionError(f"optimizer holds {len(optimized)} tensors, the stage trains {len(trained)}")


_CHUNK = 1 << 22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(values: Mapping[str, Tensor]) -> dict[str, int]:
    """A 64-bit hash of each tensor's bits, computed where the tensor lies.

    Integer sums wrap and commute, so the hash is the same on every device and with every number of threads; position
    weights make it sensitive to order. It guards against accidents, not against an adversary.
    """
    return {name: _hash(tensor) for name, tensor in values.items()}


def _hash(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().view(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK) if flat.numel() else ():
        # Odd multipliers, so that no change of a single value can vanish.
        weights = torch.arange(chunk.numel(), dtype=torch.int64, device=flat.device) * 2654435762 + 1
        total = total * 6364136223846793005 + (chunk.view(_BITS[chunk.element_size()]).long() * weights).sum()
    return int(total)
