"""What would waste a run, asked before its first step: do the ranks agree, is it the same run, can it be saved."""

from __future__ import annotations

import json
import logging
import math
import os
from typing import TYPE_CHECKING

from train import checkpoint
from train.checkpoint import TrainerState, retention
from train.checkpoint.room import bytes_of, check_room
from train.export import model_bytes
from train.faults.progress import Phase
from train.run.fingerprint import fingerprint
from train.run.identity import Identity, check_ranks_agree, check_same_run
from train.writing import together

if TYPE_CHECKING:
    from train.trainer import Run

log = logging.getLogger(__name__)


def before_first_step(run: Run) -> None:
    """Refuses, on all ranks together, a run that would not come to its end as what it claims to be.

    A fresh run also saves its untrained state through the real path, and loads it back.

    Raises:
        UserError: ranks that read other configs, code or data; a run that is not the one it was; a record that has been
            changed; a folder that cannot be written, with too little room for all checkpoints, or that does not give
            back what was written.
    """
    world = run.world
    check_ranks_agree(world.gather(run.identity.to_dict()))
    if run.resumed:
        check_same_run(run.resumed.identity, run.identity, f"the checkpoint of step {run.first}")
    with together(world, run.folder.state):
        if world.is_main:
            # What a kill has left may be what fills the disk.
            retention.sweep(run.folder.state)
    _probe(run)
    with together(world, run.folder.path):
        if world.is_main:
            _check_record(run)
            _check_room(run)
    if run.resumed is None:
        run.progress.enter(Phase.save)
        frozen = {name for name, value in run.engine.model.named_parameters() if not value.requires_grad}
        prints = fingerprint({name: piece for name, piece in run.engine.values().items() if name in frozen})
        state = TrainerState(0, run.folder.launch, run.steps.state_dict(), run.identity)
        size = checkpoint.rehearse(run.folder, run.engine, world, state, prints)
        log.info("a checkpoint takes %.1f MB; the untrained state has been saved, read back and removed", size / 1e6)


def _probe(run: Run) -> None:
    """Every rank writes where it will have to write."""
    path = run.folder.state / f".probe-{run.world.rank}"
    with together(run.world, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write("probe")
            file.flush()
            os.fsync(file.fileno())
        path.unlink()


def _check_record(run: Run) -> None:
    """Compares the run with what its folder says it is; one that begins from nothing says it there."""
    folder = run.folder
    if run.resumed and folder.identity.is_file():
        before = Identity(**json.loads(folder.identity.read_text()))
        check_same_run(before, run.identity, f"{folder.identity} was written")
    else:
        folder.write_sealed({folder.identity.name: json.dumps(run.identity.to_dict(), indent=2) + "\n"})
    position = folder.state / f"step-{run.first:08d}"
    if run.resumed and position.is_dir():
        checkpoint.check_metrics(position, folder)
        checkpoint.restore_tracker_ids(position, folder)


def _check_room(run: Run) -> None:
    """Room for the checkpoints that will lie beside those there are, at one time, and for the trained model."""
    config, root = run.config.checkpoint, run.folder.state
    saves = 1 if config.every is None else math.ceil((run.total_steps - run.first) / config.every)
    # A new one is complete before the oldest goes; later ones than the first step's are of a course that is left.
    there = sum(folder.name <= f"step-{run.first:08d}" for folder in retention.complete(root))
    more = min(saves, max(1, config.keep + 1 - there))
    needed = more * bytes_of(root, run.engine) + model_bytes(run.engine.model, folder=run.folder)
    check_room(root, needed, f"{more} more checkpoint(s) and the trained model")
