"""Which checkpoints stay on disk: deletes only behind a newer complete one, and never half of one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint import seal
from train.distributed import World, alone
from train.run.folder import sync_folder, write_atomically

log = logging.getLogger(__name__)

LATEST = "latest"
ABANDONED, TEMPORARY, TRASH, UNIVERSAL = ".abandoned-", ".tmp-", ".trash-", ".universal-"


@dataclass(frozen=True)
class Found:
    """One folder below `state/`.

    Attributes:
        problem: why it is not a complete checkpoint; None where it is, as far as names and sizes tell.
    """

    folder: Path
    problem: str | None
    bytes: int


def listing(root: Path) -> list[Found]:
    """Everything below `state/`, oldest step first, then what is not a checkpoint."""
    found = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        try:
            seal.read(folder)
            problem = None
        except seal.Broken as broken:
            problem = str(broken)
        found.append(Found(folder, problem, size))
    return sorted(found, key=lambda one: one.folder.name.startswith("."))


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first, as far as names and sizes tell."""
    return [one.folder for one in listing(root) if one.problem is None and one.folder.name.startswith("step-")]


@contextmanager
def tolerated(what: Path) -> Iterator[None]:
    """Clearing away of what is not needed any more: where the disk refuses, it stays until the next save."""
    try:
        yield
    except OSError as error:
        log.warning("%s could not be cleared away and stays for now: %s", what, error)


def sweep(root: Path) -> list[Path]:
    """Removes what a kill has left half written or half deleted; returns what is gone."""
    rests = [path for start in (TEMPORARY, TRASH) for path in root.glob(f"{start}step-*")]
    for rest in rests:
        with tolerated(rest):
            shutil.rmtree(rest)
    return [rest for rest in rests if not rest.exists()]


def prune(root: Path, keep: int, written: Path) -> None:
    """Leaves the newest `keep` complete checkpoints, `written` always among them; damaged ones are not counted.

    Conversions for another number of ranks, and checkpoints of a course that the run has left, go when `written` has
    reached their step. What the disk refuses to delete is left to the next time.
    """
    others = [folder for folder in complete(root) if folder != written]
    old = others[: max(0, len(others) - (max(keep, 1) - 1))]
    for start in (UNIVERSAL, ABANDONED):
        old += [folder for folder in root.glob(f"{start}step-*") if _step(folder, start) <= written.name]
    for folder in old:
        with tolerated(folder):
            delete(folder)


def prune_all(root: Path, keep: int) -> list[Path]:
    """What `prune` leaves, without waiting for a newer checkpoint: nothing stays but the newest `keep` complete ones.

    Returns:
        What was deleted; only what was half written or half deleted where no complete checkpoint is left, by hashes.
    """
    rests = sweep(root)
    there = [folder for folder in complete(root) if seal.damage(folder, alone()) is None]
    if not there:
        return rests
    kept = set(there[-max(keep, 1) :])
    gone = [one.folder for one in listing(root) if one.folder not in kept]
    for folder in gone:
        delete(folder)
    return [*rests, *gone]


def delete(folder: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a kill does not leave half of it under a good name."""
    trash = folder.with_name(TRASH + folder.name[folder.name.index("step-") :])
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash)


def abandon_newer(root: Path, world: World, step: int) -> None:
    """Sets aside, as `.abandoned-*`, every checkpoint beyond the step that the run goes on from; after a restoration.

    They belong to a course that this run has left, and would otherwise be the newest at the next resumption.
    """
    if world.is_main:
        newer = [folder for folder in sorted(root.glob("step-*")) if folder.name > f"step-{step:08d}"]
        for folder in newer:
            aside = folder.with_name(f"{ABANDONED}{folder.name}")
            number = 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"{ABANDONED}{folder.name}-{number}")
            folder.rename(aside)
            log.warning("the run goes on from step %d: %s is now %s, until the run has come as far", step, folder.name,
                        aside)  # fmt: skip
        if newer:
            current = root / f"step-{step:08d}"
            if current.is_dir():
                write_atomically(root / LATEST, current.name + "\n")
            else:
                (root / LATEST).unlink(missing_ok=True)
            sync_folder(root)
    world.barrier()


def _step(folder: Path, start: str) -> str:
    """The name that the checkpoint itself had."""
    return folder.name.removeprefix(start)[: len("step-00000000")]
