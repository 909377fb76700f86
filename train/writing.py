"""Work of one rank that fails on all of them or on none; what a disk refuses, in words that name place and room."""

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
    """A block that every rank enters; where it fails for one of them, all of them raise.

    A rank that left alone would keep the others waiting in their next collective.

    Args:
        path: what is written in it.

    Raises:
        UserError: the one that was raised, or `cannot_write` where the disk has refused something.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    except (OSError, SafetensorError) as error:
        problem = cannot_write(path, error)
    world.settle(problem)


def cannot_write(path: Path, error: Exception, then: str = "resume=auto") -> UserError:
    """What a full or read-only disk has answered, and what to do `then`."""
    place = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return UserError(
        f"{path} cannot be written", found=f"{str(error).splitlines()[0]}; {shutil.disk_usage(place).free} bytes free",
        expected="room, and permission to write", remedy=f"free disk space or mend {place}, then {then}",
    )  # fmt: skip
