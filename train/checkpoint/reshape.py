"""A checkpoint of one number of ranks for another: converted once, before the ranks start, and sealed like any."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from anchorformer.errors import UserError
from anchorformer.model_folder import sha256
from train.checkpoint import seal
from train.checkpoint.retention import TEMPORARY, UNIVERSAL
from train.checkpoint.room import check_room
from train.distributed import alone
from train.engine.saved import Saved
from train.engine.universal import convert
from train.run.folder import sync_folder

log = logging.getLogger(__name__)

SOURCE = "SOURCE"
"""File of a conversion that holds the sha256 of the manifest of what it was made from."""


def converted(position: Path) -> Path:
    """The conversion that belongs to a checkpoint of DeepSpeed's shards.

    Raises:
        UserError: there is none; with the command that makes it.
    """
    folder = position.with_name(f"{UNIVERSAL}{position.name}")
    if not _is_of(folder, position):
        saved = Saved.read(position)
        raise UserError(
            f"checkpoint {position} was written by another number of ranks or ZeRO stage",
            found=f"{saved.ranks} rank(s) under ZeRO-{saved.zero_stage}",
            expected="the same, or a conversion beside it",
            remedy=f"python -m train checkpoint convert {position.parent.parent} (`python -m train ... resume=auto` "
            "does it by itself)",
        )  # fmt: skip
    return folder


def ensure(position: Path) -> Path:
    """Converts a complete checkpoint of shards, or finds the conversion that is there; one process calls it.

    One that is damaged, or was made of another checkpoint of this step, is replaced.

    Raises:
        UserError: the converter has failed, or there is no room.
    """
    final = position.with_name(f"{UNIVERSAL}{position.name}")
    if _is_of(final, position) and seal.damage(final, alone()) is None:
        return final
    # What is cut out of the files, and what is put together from it.
    size = sum(described["bytes"] for described in seal.read(position).values())
    check_room(position.parent, 2 * size, f"the conversion of {position.name}")
    log.info("converting %s, for any number of ranks", position)
    partial = position.with_name(f"{TEMPORARY}{position.name}-universal")
    for rest in (final, partial):
        shutil.rmtree(rest, ignore_errors=True)
    convert(position, partial)
    (partial / SOURCE).write_text(sha256(position / seal.MANIFEST) + "\n")
    files = {path.relative_to(partial).as_posix(): path for path in partial.rglob("*") if path.is_file()}
    seal.seal(partial, [{name: seal.entry(path, 0) for name, path in sorted(files.items())}])
    partial.rename(final)
    sync_folder(position.parent)
    return final


def _is_of(folder: Path, position: Path) -> bool:
    """Whether a conversion, if it is there, was made of this checkpoint."""
    source = folder / SOURCE
    return source.is_file() and source.read_text().strip() == sha256(position / seal.MANIFEST)
