"""How much room checkpoints take, and whether a disk has it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from anchorformer.errors import UserError
from train.checkpoint import retention, seal
from train.engine import Engine
from train.engine.saved import Form
from train.optim import full_shape

SPARE = 1.05
"""Room beyond the tensors themselves: file headers, positions, lists."""


def bytes_of(root: Path, engine: Engine) -> int:
    """Room that one checkpoint takes: as much as the newest one, or what is reckoned where there is none."""
    complete = retention.complete(root)
    if complete:
        return sum(described["bytes"] for described in seal.read(complete[-1]).values())
    trained = [value for value in engine.model.parameters() if value.requires_grad]
    # fp32 weight and two moments; rank by rank, DeepSpeed adds the model's own copy.
    own = [12 + (value.element_size() if engine.form is Form.shards else 0) for value in trained]
    return round(SPARE * sum(math.prod(full_shape(value)) * size for value, size in zip(trained, own, strict=True)))


def check_room(root: Path, needed: int, what: str) -> None:
    """Compares bytes that will be needed below `root` with those that are free.

    Raises:
        UserError: there are fewer.
    """
    free = shutil.disk_usage(root).free
    if free >= needed:
        return
    raise UserError(
        f"there is no room for {what} in {root}", found=f"{_size(free)} free", expected=f"{_size(needed)} needed",
        remedy="free disk space, lower checkpoint.keep, or set another output_root; then start again with resume=auto",
    )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
