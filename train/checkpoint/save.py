"""Writing a checkpoint: under a temporary name, each rank its own files, listed, sealed, then renamed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anchorformer.errors import UserError
from train.checkpoint import retention, seal, state
from train.checkpoint.resume import PRINTS, prove
from train.checkpoint.room import bytes_of, check_room
from train.checkpoint.state import TrainerState
from train.distributed import World
from train.engine import Engine
from train.run.fingerprint import Print, fingerprint, join
from train.run.folder import RunFolder, sync_folder, write_atomically
from train.writing import together

log = logging.getLogger(__name__)

REHEARSAL = ".tmp-step-rehearsal"


def save(
    folder: RunFolder, engine: Engine, world: World, trainer: TrainerState, frozen: dict[str, Print], keep: int
) -> Path:
    """Writes `state/step-XXXXXXXX`; a kill at any moment leaves the older checkpoints and their `latest` intact.

    Args:
        frozen: fingerprints of what this rank holds of frozen parameters; they are not written, only proven.
        keep: complete checkpoints that stay, this one counted.

    Raises:
        UserError: the disk has too little room, or does not take the files; on all ranks.
    """
    root = folder.state
    name = f"step-{trainer.step:08d}"
    with together(world, root):
        if world.is_main:
            root.mkdir(parents=True, exist_ok=True)
            retention.sweep(root)
            check_room(root, bytes_of(root, engine), "a checkpoint")
    partial = root / f".tmp-{name}"
    with _removed_if_it_fails(partial, world):
        _write(partial, folder, engine, world, trainer, frozen)
    final = root / name
    with together(world, root):
        if world.is_main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync_folder(root)
            write_atomically(root / retention.LATEST, name + "\n")
            with retention.tolerated(root):
                retention.prune(root, keep, final)
    return final


def rehearse(folder: RunFolder, engine: Engine, world: World, trainer: TrainerState, frozen: dict[str, Print]) -> int:
    """Saves the untrained state as it will be saved later, checks it, loads it back and removes it.

    So a disk, a permission or a file system that a checkpoint cannot live with is met before the first step.

    Returns:
        Bytes of one checkpoint.

    Raises:
        UserError: it cannot be written, or what is read is not what was written.
    """
    partial = folder.state / REHEARSAL
    with _removed_if_it_fails(partial, world):
        _write(partial, folder, engine, world, trainer, frozen)
        problem = seal.damage(partial, world)
        if problem is not None:
            raise UserError(
                f"a checkpoint cannot be read back from {folder.state}", found=problem, expected="the bytes as written",
                remedy="choose another disk for output_root",
            )  # fmt: skip
        engine.load(partial)
        prove(partial, engine, world)
    size = sum(described["bytes"] for described in seal.read(partial).values())
    world.barrier()
    if world.is_main:
        shutil.rmtree(partial)
    return size


@contextmanager
def _removed_if_it_fails(partial: Path, world: World) -> Iterator[None]:
    """A half-written folder is not left on the disk that may have been too full for it."""
    try:
        yield
    except UserError:
        # Raised by all ranks together, so that nobody writes there any more.
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    partial: Path, folder: RunFolder, engine: Engine, world: World, trainer: TrainerState, frozen: dict[str, Print]
) -> None:
    """Writes, hashes and seals all files of a checkpoint under a temporary name; all ranks call it."""
    with together(world, partial):
        if world.is_main:
            partial.mkdir(parents=True)
    written = engine.save(partial)
    trained = {name: piece for name, piece in engine.values().items() if name not in frozen}
    prints = join(world.gather(frozen | fingerprint(trained | engine.moments())))
    entries: seal.Entries = {}
    with together(world, partial):
        if world.is_main:
            (partial / PRINTS).write_text(json.dumps(prints))
            metrics = _describe(folder.metrics)
            written += [partial / PRINTS, state.write(partial, trainer, engine.config, folder, metrics)]
        entries = {path.name: seal.entry(path, world.rank) for path in sorted(written)}
    parts = world.gather(entries)
    with together(world, partial):
        if world.is_main:
            seal.seal(partial, parts)


def _describe(metrics: Path) -> dict[str, object]:
    """Size and hash of the record so far, durable with the checkpoint that names them."""
    if not metrics.is_file():
        return {"bytes": 0, "sha256": None}
    described = seal.entry(metrics, 0)
    return {"bytes": described["bytes"], "sha256": described["sha256"]}
