"""Checkpoints that are complete or absent: written under a temporary name, listed, sealed, then renamed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from anchorformer.weights import sha256
from train.config import RunConfig
from train.distributed import World
from train.engine import Engine
from train.folder import sync_folder, write_atomically
from train.stage import fingerprint

log = logging.getLogger(__name__)

MANIFEST, COMPLETE, LATEST, TRAINER = "MANIFEST.json", "COMPLETE", "latest", "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run needs beside the engine's own state.

    Random numbers are drawn from (seed, step, rank) anew in every step, so `step` is the state of every generator.

    Attributes:
        step: optimizer steps taken.
        loader: the sampler's position.
        config: hash of everything in the configuration that the numbers depend on.
    """

    step: int
    loader: dict[str, Any]
    config: str


def numbers_digest(config: RunConfig) -> str:
    """Hash of the configuration without what may change between a run and its resumption (logging, saving, name)."""
    plain = to_plain(config)
    for key in ("run", "log", "checkpoint", "resume", "output_root"):
        del plain[key]
    for group, key in (("data", "num_workers"), ("data", "cache_dir"), ("hardware", "threads")):
        del plain[group][key]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def save(root: Path, engine: Engine, world: World, state: TrainerState, frozen: dict[str, int], keep: int) -> Path:
    """Writes `root/step-XXXXXXXX`; a kill at any moment leaves the older checkpoints and their `latest` intact.

    Args:
        frozen: fingerprints of the frozen parameters; their weights are not written, only proven on resumption.
        keep: complete checkpoints that stay, this one counted.
    """
    name = f"step-{state.step:08d}"
    partial = root / f".tmp-{name}"
    if world.is_main:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    world.barrier()
    engine.save(partial)
    trained = {name: value for name, value in engine.values().items() if name not in frozen}
    prints = frozen | fingerprint(trained)
    _write(partial / f"rank_{world.rank}.json", json.dumps({"fingerprints": prints}))
    if world.is_main:
        _write(partial / TRAINER, json.dumps({"world_size": world.size, **asdict(state)}, indent=2))
    world.barrier()
    if world.is_main:
        _seal(partial)
        final = root / name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(root)
        write_atomically(root / LATEST, name + "\n")
        _prune(root, keep)
    world.barrier()
    return root / name


def read_state(folder: Path, world: World, config: RunConfig) -> TrainerState:
    """Where a complete checkpoint stands, before anything heavy is loaded.

    Raises:
        UserError: it was written under another configuration or number of ranks.
    """
    raw = json.loads((folder / TRAINER).read_text())
    size = raw.pop("world_size")
    state = TrainerState(**raw)
    if size != world.size:
        raise UserError(
            f"checkpoint {folder} was written by another number of ranks", found=f"{size} ranks",
            expected=f"{world.size} ranks", remedy=f"resume on {size} rank(s)",
        )  # fmt: skip
    if state.config != numbers_digest(config):
        raise UserError(
            f"checkpoint {folder} belongs to another configuration", found=f"configuration {state.config[:12]}",
            expected=f"configuration {numbers_digest(config)[:12]}",
            remedy="resume with the configuration of the run, or start a new run with init_from",
        )  # fmt: skip
    return state


def restore(folder: Path, engine: Engine, world: World) -> None:
    """Loads a complete checkpoint and proves that every parameter has the bits it was saved with.

    Raises:
        UserError: the loaded weights are not the saved ones (frozen parameters: the run's start folder has changed).
    """
    engine.load(folder)
    saved = json.loads((folder / f"rank_{world.rank}.json").read_text())["fingerprints"]
    loaded = fingerprint(engine.values())
    wrong = sorted({name for name in saved.keys() | loaded.keys() if saved.get(name) != loaded.get(name)})
    if wrong:
        raise UserError(
            f"weights loaded from {folder} are not those that were saved",
            found=f"{len(wrong)} differing parameters, among them {', '.join(wrong[:3])}",
            expected="the same bits", remedy="restore the run's start folder as it was when the run began",
        )  # fmt: skip


def find(root: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to resume from, chosen by rank 0 for all; None for a fresh start.

    Args:
        resume: `never`, `auto` (the newest complete one, None where there is none) or a checkpoint folder.

    Raises:
        UserError: the named folder is not a complete checkpoint.
    """
    if resume == "never":
        return None
    choice: Path | UserError | None = None
    if world.is_main:
        choice = _newest(root) if resume == "auto" else _named(Path(resume))
    choice = world.broadcast(choice)
    if isinstance(choice, UserError):
        raise choice
    return choice


def _newest(root: Path) -> Path | None:
    for folder in sorted(root.glob("step-*"), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is left aside: %s", folder, problem)
    return None


def _named(folder: Path) -> Path | UserError:
    problem = damage(folder)
    if problem is None:
        return folder
    return UserError(
        f"{folder} cannot be resumed from", found=problem, expected="a complete checkpoint",
        remedy="resume=auto takes the newest complete one",
    )  # fmt: skip


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, None where it is complete and every file has its listed hash."""
    if not (folder / COMPLETE).is_file() or not (folder / MANIFEST).is_file():
        return "it was never completed"
    if (folder / COMPLETE).read_text().strip() != sha256(folder / MANIFEST):
        return f"{MANIFEST} is not the one that was sealed"
    for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            return f"{name} is missing or damaged"
    return None


def _seal(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_atomically(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=2) + "\n")
    write_atomically(folder / COMPLETE, sha256(folder / MANIFEST) + "\n")


def _prune(root: Path, keep: int) -> None:
    complete = [folder for folder in sorted(root.glob("step-*")) if (folder / COMPLETE).is_file()]
    for folder in complete[: max(0, len(complete) - max(keep, 1))]:
        # Renamed first, so that a kill while deleting does not leave half a checkpoint under a good name.
        trash = folder.with_name(f".trash-{folder.name}")
        folder.rename(trash)
        shutil.rmtree(trash)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
