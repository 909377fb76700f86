"""An engine's state as whole fp32 tensors by name: the form that depends neither on ranks nor on ZeRO's stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.distributed import World
from train.run.fingerprint import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter beside its weights."""


class Whole(Protocol):
    """Whole tensors on disk, read one at a time; fp32, flattened."""

    def weight(self, name: str) -> Tensor: ...

    def moment(self, name: str, kind: str) -> Tensor: ...


class WholeFiles:
    """What `write` left in a folder."""

    def __init__(self, folder: Path) -> None:
        self._shards: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            shard = safe_open(path, framework="pt")
            self._shards |= dict.fromkeys(shard.keys(), shard)

    def weight(self, name: str) -> Tensor:
        tensor: Tensor = self._shards[name].get_tensor(name)
        return tensor.view(-1)

    def moment(self, name: str, kind: str) -> Tensor:
        return self.weight(f"{kind}.{name}")


def gather(
    world: World, pieces: Mapping[str, Piece], shapes: Mapping[str, tuple[int, ...]], *, is_parted: bool
) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, nothing elsewhere; all ranks call it.

    The pieces travel as they are: DeepSpeed's `safe_get_full_*` adds them to zeros, which turns -0.0 into 0.0.

    Args:
        pieces: this rank's, fp32.
        shapes: of all tensors, in the same order on all ranks.
        is_parted: whether ranks hold different pieces; else rank 0 has all that there is.
    """
    gathered: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        held = pieces.get(name)
        mine = None if held is None else (held.start, held.values.cpu())
        parts = world.collect(mine) if is_parted else [mine]
        if world.is_main and parts is not None:
            flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
            for start, values in filter(None, parts):
                flat[start : start + values.numel()] = values
            gathered[name] = flat.view(shape)
    return gathered


def write(folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Writes `<part>.safetensors` for every part of the model among `weights`, and the moments beside them.

    Args:
        weights: under their full names, the part in front.
        moments: kind -> tensors under the same names.

    Raises:
        OSError, safetensors.SafetensorError: the disk does not take them.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        files.setdefault(name.split(".", 1)[0], {})[name] = tensor
    files["optimizer"] = {f"{kind}.{name}": tensor for kind, part in moments.items() for name, tensor in part.items()}
    for stem, tensors in files.items():
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    return [folder / f"{stem}.safetensors" for stem in files]


@torch.no_grad()
def read(whole: Whole, weights: Mapping[str, Piece], moments: Mapping[str, Mapping[str, Piece]]) -> None:
    """Fills this rank's pieces from whole tensors.

    Raises:
        ValueError: a tensor on disk has another size than the parameter.
    """
    for name, piece in weights.items():
        _fill(piece, whole.weight(name), name)
    for kind, pieces in moments.items():
        for name, piece in pieces.items():
            _fill(piece, whole.moment(name, kind), f"{kind} of {name}")


def _fill(piece: Piece, flat: Tensor, what: str) -> None:
    if flat.numel() != piece.total:
        raise ValueError(f"{what}: {flat.numel()} values on disk, {piece.total} in the model")
    piece.values.copy_(flat[piece.start : piece.start + piece.values.numel()])
