"""Writing to disk that fails on all ranks or on none, in words that name the place and the room it has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from anchorformer.errors import UserError
from train.distributed import World


@contextmanager
def together(world: World, path: Path) -> Iterator[None]:
    """A block that every rank enters; where the disk refuses what one of them writes in it, all of them raise.

    A rank that left alone would keep the others waiting in their next collective.

    Raises:
        UserError: what `cannot_write` says.
    """
    problem: UserError | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = cannot_write(path, error)
    world.settle(problem)


def cannot_write(path: Path, error: Exception) -> UserError:
    """What a full or read-only disk has answered."""
    place = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return UserError(
        f"{path} cannot be written", found=f"{str(error).splitlines()[0]}; {shutil.disk_usage(place).free} bytes free",
        expected="room, and permission to write", remedy=f"free disk space or mend {place}, then resume=auto",
    )  # fmt: skip
