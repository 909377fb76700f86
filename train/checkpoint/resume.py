"""From a checkpoint back into a run: found by one rank, checked by all, loaded, and proven to the bit."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from train.checkpoint import reshape, retention, seal, state
from train.checkpoint.state import TrainerState, layout
from train.config import RunConfig
from train.distributed import World, alone
from train.engine import Engine
from train.engine.saved import Saved
from train.run.fingerprint import fingerprint, join
from train.run.folder import RunFolder
from train.run.identity import check_same_data, differences, numbers_digest

log = logging.getLogger(__name__)

PRINTS = "fingerprints.json"
"""File of a checkpoint: the fingerprint of every parameter, frozen ones too, and of AdamW's moments, by name."""


def find(root: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; None for a fresh start.

    Args:
        resume: `never`, `auto` (the newest complete one, None where there is none) or a checkpoint folder.

    Raises:
        UserError: the named folder is not a complete checkpoint; or there are checkpoints and none of them is: to
            start again from nothing is never what was meant.
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
    problems = []
    for folder in world.broadcast(sorted(root.glob("step-*"), reverse=True) if world.is_main else []):
        problem = damage(folder, world)
        if problem is None:
            return folder
        log.warning("checkpoint %s is left aside: %s", folder, problem)
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise UserError(
            f"no checkpoint in {root} can be resumed from", found="; ".join(problems), expected="one that is complete",
            remedy="restore one of them, or delete them all to start again from the first step",
        )  # fmt: skip
    return None


def has_saved(folder: RunFolder, resume: str) -> bool:
    """Whether the newest launch of a run, which was told to resume from `resume`, has left a checkpoint already."""
    there = retention.complete(folder.state)
    # A launch that resumes from nothing was refused where there was anything: what is there is its own.
    return bool(there) if resume == "never" else any(state.launch_of(position) == folder.launch for position in there)


def fit(root: Path, config: RunConfig) -> None:
    """Converts, before the ranks start, the checkpoint that they will resume from, where they could not read it.

    Raises:
        UserError: what `find` and `reshape.ensure` raise.
    """
    ranks, zero_stage = config.world_size, config.zero.stage
    candidates = retention.complete(root) if config.resume == "auto" else [Path(config.resume)]

    def is_fit(folder: Path) -> bool:
        try:
            seal.read(folder)
        except seal.Broken:
            return False  # `find` says what is wrong
        return Saved.read(folder).fits(ranks, zero_stage)

    # Reading everything there is takes its time, and only a conversion needs it; the newest may turn out damaged.
    if not all(is_fit(folder) for folder in candidates):
        position = find(root, config.resume, alone())
        if position is not None and not is_fit(position):
            reshape.ensure(position)


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint; None where it is complete and every file has its listed hash. All ranks call."""
    return seal.damage(folder, world)


def read_state(position: Path, world: World, config: RunConfig) -> TrainerState:
    """Where a complete checkpoint stands, before anything heavy is loaded.

    Raises:
        UserError: it was written under another configuration; or by another number of ranks, and has not been
            converted; with the command that does it.
    """
    facts = state.read(position)
    found = state.parse(facts)
    expected = numbers_digest(config)
    if found.identity.config != expected:
        raise UserError(
            f"checkpoint {position} belongs to another configuration",
            found=f"configuration {found.identity.config[:12]}", expected=f"configuration {expected[:12]}",
            remedy="resume with the configuration of the run, or start a new run with init_from",
        )  # fmt: skip
    if not Saved.read(position).fits(world.size, config.zero.stage):
        reshape.converted(position)
    for key, was, is_now in differences(facts["layout"], layout(config)):
        log.warning("%s was %s and is now %s: the same samples and steps, rounded otherwise", key, was, is_now)
    return found


def check_data(resumed: TrainerState, data: Mapping[str, str]) -> None:
    """Compares the data of the checkpoint with those of now.

    Raises:
        UserError: what `check_same_data` raises.
    """
    check_same_data(resumed.identity, data, f"the checkpoint of step {resumed.step}")


def check_metrics(position: Path, folder: RunFolder) -> None:
    """Compares the record of the steps before a checkpoint with what it was when that was written.

    Raises:
        UserError: metrics.jsonl is there and is another.
    """
    described: dict[str, Any] = state.read(position)["metrics"]
    if not folder.metrics.is_file():
        log.warning("%s is gone: the record begins with the next step", folder.metrics)
        return
    with folder.metrics.open("rb") as file:
        begin = file.read(described["bytes"])
    if described["bytes"] and hashlib.sha256(begin).hexdigest() != described["sha256"]:
        raise UserError(
            f"{folder.metrics} has been changed since {position.name} was written",
            found=f"other contents in its first {described['bytes']} bytes", expected=f"sha256 {described['sha256']}",
            remedy="restore it, or move it away to go on without the record of the earlier steps",
        )  # fmt: skip


def restore_tracker_ids(position: Path, folder: RunFolder) -> None:
    """Has trackers whose own notes are gone know the run again, by a checkpoint of this folder."""
    folder.restore_tracker_ids(state.read(position).get("trackers", {}))


def restore(position: Path, engine: Engine, world: World) -> None:
    """Loads a complete checkpoint, converted where the ranks are others, and proves its bits.

    Raises:
        UserError: what `prove` raises; or a file holds something else than weights.
    """
    fits = Saved.read(position).fits(world.size, engine.config.zero.stage)
    engine.load(position, None if fits else reshape.converted(position))
    prove(position, engine, world)


def prove(position: Path, engine: Engine, world: World) -> None:
    """Compares every parameter and moment with the fingerprint that was saved with it; on any number of ranks.

    Raises:
        UserError: the loaded weights are not the saved ones (frozen parameters: the run's start folder has changed).
    """
    saved = json.loads((position / PRINTS).read_text())
    loaded = join(world.gather(fingerprint(engine.values() | engine.moments())))
    wrong = sorted({name for name in saved.keys() | loaded.keys() if saved.get(name) != loaded.get(name)})
    if wrong:
        raise UserError(
            f"weights loaded from {position} are not those that were saved",
            found=f"{len(wrong)} differing tensors, among them {', '.join(wrong[:3])}",
            expected="the same bits", remedy="restore the run's start folder as it was when the run began",
        )  # fmt: skip
