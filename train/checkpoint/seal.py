"""A folder that is complete or absent: every file listed with its size and hash, the list itself sealed by COMPLETE."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchorformer.model_folder import sha256
from train.distributed import World
from train.run.folder import write_atomically

MANIFEST, COMPLETE = "MANIFEST.json", "COMPLETE"
FORMAT = 4
"""Of the manifest and the files it lists; a checkpoint of another format is not read."""

Entries = dict[str, dict[str, Any]]
"""File name -> `bytes`, `sha256` and the `rank` that wrote it."""


class Broken(Exception):
    """Why a folder is not complete, in words for the user."""


def entry(path: Path, rank: int) -> dict[str, Any]:
    """Makes a file durable and describes it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path), "rank": rank}


def seal(folder: Path, parts: Sequence[Entries]) -> None:
    """Writes the list of all files, and COMPLETE behind it; one process calls it.

    Args:
        parts: entries by writer.

    Raises:
        AssertionError: a file without exactly one writer; a fault of ours.
    """
    files = {name: described for part in parts for name, described in sorted(part.items())}
    unlisted = _present(folder) - files.keys()
    if unlisted or len(files) != sum(len(part) for part in parts):
        raise AssertionError(f"files without exactly one writer: {sorted(unlisted) or 'listed twice'}")
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")
    write_atomically(folder / COMPLETE, _complete(folder).decode())


def read(folder: Path) -> Entries:
    """The sealed list of files, all of which are there in their listed sizes, and none beside them.

    Reads the list only, no contents.

    Raises:
        Broken: any of that is not so; names the file.
    """
    for name in (COMPLETE, MANIFEST):
        if not (folder / name).is_file():
            raise Broken(f"it was never completed: there is no {name}")
    if (folder / COMPLETE).read_bytes() != _complete(folder):
        raise Broken(f"{MANIFEST} is not the one that {COMPLETE} seals")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found, files = manifest["format"], manifest["files"]
    except (ValueError, KeyError, TypeError):
        raise Broken(f"{MANIFEST} is not a list of files") from None
    if found != FORMAT:
        raise Broken(f"it is of format {found}, and this version reads {FORMAT}")
    present = _present(folder)
    if present - files.keys():
        raise Broken(f"{min(present - files.keys())} is not on its list of files")
    for name, described in files.items():
        if name not in present:
            raise Broken(f"{name} is missing")
        if (folder / name).stat().st_size != described["bytes"]:
            raise Broken(f"{name} has {(folder / name).stat().st_size} bytes instead of {described['bytes']}")
    return dict(files)


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with a sealed folder; None where it is complete and every file has its listed hash.

    Each rank reads the files it wrote, which are also those it would load; all ranks call it and get the same answer.
    """
    return next((problem for problem in world.gather(_own_damage(folder, world)) if problem is not None), None)


def _own_damage(folder: Path, world: World) -> str | None:
    try:
        files = read(folder)
    except Broken as problem:
        return str(problem)
    for name, described in files.items():
        # By remainder, so that a checkpoint of more ranks is read whole as well.
        if described["rank"] % world.size == world.rank and sha256(folder / name) != described["sha256"]:
            return f"{name} is damaged"
    return None


def _complete(folder: Path) -> bytes:
    return f"{sha256(folder / MANIFEST)}\n".encode()


def _present(folder: Path) -> set[str]:
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return paths - {MANIFEST, COMPLETE}
