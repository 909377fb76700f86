"""What a disk that is full or may not be written to has answered, in words that name place and room."""

from __future__ import annotations

import shutil
from pathlib import Path

from anchorformer.errors import UserError


def free_bytes(path: Path) -> int:
    """Room where `path` is, or will be."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def cannot_write(path: Path, error: OSError, then: str) -> UserError:
    """The refusal of a disk.

    Args:
        then: what goes on where this has stopped.
    """
    return UserError(
        f"{path} cannot be written", found=f"{error.strerror or error}; {size(free_bytes(path))} free",
        expected="room, and permission to write", remedy=f"free disk space or choose another place, then {then}",
    )  # fmt: skip


def size(count: float) -> str:
    """Bytes for people, in units of a thousand."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
