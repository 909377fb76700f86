"""Checkpoints that are complete or absent: written under a temporary name, listed, sealed, then renamed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
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
from train.optim import full_shape
from train.stage import fingerprint

log = logging.getLogger(__name__)

MANIFEST, COMPLETE, LATEST, TRAINER = "MANIFEST.json", "COMPLETE", "latest", "trainer.json"
FORMAT = 2
"""Of the manifest; a checkpoint of another format is not read."""
BYTES_PER_TRAINED = 16
"""Disk per trained parameter where no checkpoint tells: fp32 weight, two moments, the model's own copy."""


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run needs beside the engine's own state.

    Random numbers are drawn from (seed, step, rank) anew in every step, so `step` is the state of every generator.

    Attributes:
        step: optimizer steps taken.
        loader: the sampler's position.
        config: hash of everything in the configuration that the numbers depend on.
        data: fingerprints of what the samples are made of, by name.
    """

    step: int
    loader: dict[str, Any]
    config: str
    data: dict[str, str]


def numbers_digest(config: RunConfig) -> str:
    """Hash of the configuration without what may change between a run and its resumption.

    That is logging, saving, names, and what happens to bad images: who meets one on the way must be able to go on.
    """
    plain = to_plain(config)
    for key in ("run", "log", "checkpoint", "watchdog", "repro", "resume", "output_root"):
        del plain[key]
    for key in ("num_workers", "cache_dir", "on_bad_image", "max_dropped_share"):
        del plain["data"][key]
    for key in ("threads", "max_restarts"):
        del plain["hardware"][key]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def save(root: Path, engine: Engine, world: World, state: TrainerState, frozen: dict[str, int], keep: int) -> Path:
    """Writes `root/step-XXXXXXXX`; a kill at any moment leaves the older checkpoints and their `latest` intact.

    Each rank makes durable and hashes what it wrote itself; rank 0 seals the list.

    Args:
        frozen: fingerprints of the frozen parameters; their weights are not written, only proven on resumption.
        keep: complete checkpoints that stay, this one counted.

    Raises:
        UserError: the disk has too little room; on all ranks, before anything is written.
    """
    name = f"step-{state.step:08d}"
    partial = root / f".tmp-{name}"
    problem: UserError | None = None
    if world.is_main:
        root.mkdir(parents=True, exist_ok=True)
        for rest in (*root.glob(".tmp-step-*"), *root.glob(".trash-*")):
            shutil.rmtree(rest)
        problem = _lack_of_room(root, engine)
        if problem is None:
            partial.mkdir()
    problem = world.broadcast(problem)
    if problem is not None:
        raise problem
    written = engine.save(partial)
    trained = {name: value for name, value in engine.values().items() if name not in frozen}
    prints = frozen | fingerprint(trained)
    written.append(_write(partial / f"rank_{world.rank}.json", json.dumps({"fingerprints": prints})))
    if world.is_main:
        facts = {"world_size": world.size, **asdict(state)}
        written.append(_write(partial / TRAINER, json.dumps(facts, indent=2)))
    entries = world.gather({path.name: _entry(path, world.rank) for path in sorted(written)})
    if world.is_main:
        _seal(partial, entries)
        final = root / name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(root)
        write_atomically(root / LATEST, name + "\n")
        _prune(root, keep, final)
    world.barrier()
    return root / name


def _lack_of_room(root: Path, engine: Engine) -> UserError | None:
    older = [manifest for folder in sorted(root.glob("step-*")) if (manifest := _manifest(folder)) is not None]
    trained = sum(math.prod(full_shape(value)) for value in engine.model.parameters() if value.requires_grad)
    needed = sum(entry["bytes"] for entry in older[-1].values()) if older else trained * BYTES_PER_TRAINED
    free = shutil.disk_usage(root).free
    if free >= needed:
        return None
    return UserError(
        f"there is no room for a checkpoint in {root}", found=f"{free / 1e9:.1f} GB free",
        expected=f"{needed / 1e9:.1f} GB needed", remedy="free disk space and start again with resume=auto",
    )  # fmt: skip


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


def check_data(state: TrainerState, data: dict[str, str]) -> None:
    """Compares the data of the checkpoint with those of now; a position means the same samples only if they are equal.

    Raises:
        UserError: something that the samples are made of is not as it was, or not there; all of it is named.
    """
    changed = [name for name in sorted(state.data.keys() | data.keys()) if state.data.get(name) != data.get(name)]
    if changed:
        raise UserError(
            f"the data have changed since the checkpoint of step {state.step}: {', '.join(changed)}",
            found="; ".join(f"{name}: {data.get(name, 'absent')}" for name in changed),
            expected="; ".join(f"{name}: {state.data.get(name, 'absent')}" for name in changed),
            remedy="restore the data and the libraries, or start a new run with init_from",
        )  # fmt: skip


def abandon_newer(root: Path, world: World, step: int) -> None:
    """Sets aside, as `.abandoned-*`, every checkpoint beyond the step that the run goes on from; after a restoration.

    They belong to a course that this run has left, and would otherwise be the newest at the next resumption.
    """
    if world.is_main:
        newer = [folder for folder in sorted(root.glob("step-*")) if folder.name > f"step-{step:08d}"]
        for folder in newer:
            aside = folder.with_name(f".abandoned-{folder.name}")
            number = 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f".abandoned-{folder.name}-{number}")
            folder.rename(aside)
            log.warning("the run goes on from step %d: %s is now %s; delete it if it is not needed",
                        step, folder.name, aside)  # fmt: skip
        if newer:
            current = root / f"step-{step:08d}"
            if current.is_dir():
                write_atomically(root / LATEST, current.name + "\n")
            else:
                (root / LATEST).unlink(missing_ok=True)
            sync_folder(root)
    world.barrier()


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
    """The checkpoint to resume from, the same on all ranks; None for a fresh start.

    Args:
        resume: `never`, `auto` (the newest complete one, None where there is none) or a checkpoint folder.

    Raises:
        UserError: the named folder is not a complete checkpoint.
    """
    if resume == "never":
        return None
    if resume != "auto":
        folder = Path(resume)
        problem = damage(folder, world)
        if problem is not None:
            raise UserError(
                f"{folder} cannot be resumed from", found=problem, expected="a complete checkpoint",
                remedy="resume=auto takes the newest complete one",
            )  # fmt: skip
        return folder
    # Listed by one rank: the others might see another state of a shared folder.
    for folder in world.broadcast(sorted(root.glob("step-*"), reverse=True) if world.is_main else []):
        problem = damage(folder, world)
        if problem is None:
            return folder
        log.warning("checkpoint %s is left aside: %s", folder, problem)
    return None


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint folder, None where it is complete and every file has its listed hash.

    Each rank reads the files it wrote, which are also those it would load; all ranks call it and get the same answer.
    """
    return next((problem for problem in world.gather(_own_damage(folder, world)) if problem is not None), None)


def _own_damage(folder: Path, world: World) -> str | None:
    files = _manifest(folder)
    if files is None:
        return f"it was never completed, or its {MANIFEST} or a file is missing, cut or of another format"
    for name, entry in files.items():
        # By remainder, so that a checkpoint of more ranks is read whole as well.
        if entry["rank"] % world.size == world.rank and sha256(folder / name) != entry["sha256"]:
            return f"{name} is damaged"
    return None


def _manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The sealed list of files; None where it, or a file of the listed size, is missing. Reads only the list."""
    if not (folder / COMPLETE).is_file() or not (folder / MANIFEST).is_file():
        return None
    if (folder / COMPLETE).read_text().strip() != sha256(folder / MANIFEST):
        return None
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        return None
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
            return None
    return files


def _entry(path: Path, rank: int) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path), "rank": rank}


def _seal(folder: Path, entries: list[dict[str, dict[str, Any]]]) -> None:
    files = {name: entry for part in entries for name, entry in sorted(part.items())}
    unlisted = {path.name for path in folder.iterdir()} - files.keys()
    if unlisted or len(files) != sum(len(part) for part in entries):
        raise AssertionError(
            f"files of the checkpoint without exactly one writer: {sorted(unlisted) or 'listed twice'}"
        )
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")
    write_atomically(folder / COMPLETE, sha256(folder / MANIFEST) + "\n")


def _prune(root: Path, keep: int, written: Path) -> None:
    """Leaves the newest `keep` complete checkpoints, `written` always among them; damaged ones are not counted."""
    others = [folder for folder in sorted(root.glob("step-*")) if folder != written and _manifest(folder) is not None]
    for folder in others[: max(0, len(others) - (max(keep, 1) - 1))]:
        # Renamed first, so that a kill while deleting does not leave half a checkpoint under a good name.
        trash = folder.with_name(f".trash-{folder.name}")
        folder.rename(trash)
        shutil.rmtree(trash)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
