"""The loop: fetch, forward and backward, check, step, log, save."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import ProcessorMixin

from anchorformer.contracts import Batch
from anchorformer.weights import derive_folder
from train import checkpoint
from train.checkpoint import TrainerState
from train.config import RunConfig
from train.distributed import World
from train.engine import Engine
from train.engine.base import total_norm
from train.folder import RunFolder, write_atomically
from train.guards import FrozenGuard, check_numbers
from train.metrics import Console, MetricsFile, gather_facts, step_record, time_record

log = logging.getLogger(__name__)


class Steps(Protocol):
    """What the trainer needs of a loader: one list of micro-batches per optimizer step, from the step it was told."""

    def __iter__(self) -> Iterator[list[Batch]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    @property
    def data_fingerprint(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Run:
    """Everything a run is made of, on this rank.

    Attributes:
        folder: where records, checkpoints and the trained model go.
        processor: with the stage's template; goes into the trained model's folder.
        steps: micro-batches of step `resumed.step + 1` first.
        resumed: what the engine was restored from; None at a fresh start.
    """

    config: RunConfig
    folder: RunFolder
    world: World
    engine: Engine
    processor: ProcessorMixin
    steps: Steps
    total_steps: int
    resumed: TrainerState | None = None


def train(run: Run) -> None:
    """Runs the stage to its end and leaves the trained model in `<run>/model`.

    Raises:
        UserError: there is no room for the next checkpoint.
        TrainingHalted: numbers that cannot be trained on; on all ranks together.
    """
    config, engine, world = run.config, run.engine, run.world
    first = run.resumed.step if run.resumed else 0
    if config.resume != "never":
        checkpoint.abandon_newer(run.folder.state, world, first)
    frozen = FrozenGuard(engine, world)
    metrics = MetricsFile(run.folder.metrics, first) if world.is_main else None
    console = Console(run.total_steps, first)
    batches_of_steps = iter(run.steps)

    for step in range(first + 1, run.total_steps + 1):
        started = time.perf_counter()
        batches = next(batches_of_steps)
        data_wait = time.perf_counter() - started

        seed_step(config.seed, step, world.rank)
        facts = gather_facts(world, batches)
        (loss,) = world.sum([engine.accumulate(batches, facts.supervised)])
        norms, lrs = engine.part_grad_norms(), engine.lrs
        check_numbers(step, loss, norms, facts)
        engine.step()
        frozen.observe(facts)

        is_logged = step % config.log.every == 0 or step == run.total_steps
        if metrics is not None:
            times = time_record(time.perf_counter() - started, data_wait, facts, world.device)
            record = step_record(step, loss, lrs, total_norm(norms), norms if is_logged else None, facts, times)
            metrics.write(record)
            console.count(times["seconds"])
            if is_logged:
                console.show(record)
        if _is_save_due(config, step, run.total_steps):
            digest = checkpoint.numbers_digest(config)
            state = TrainerState(step, run.steps.state_dict(), digest, run.steps.data_fingerprint)
            saved = checkpoint.save(run.folder.state, engine, world, state, frozen.frozen, config.checkpoint.keep)
            log.info("saved %s", saved)

    if metrics is not None:
        metrics.close()
    frozen.finish()
    export(run)
    if world.is_main:
        write_atomically(run.folder.done, f"{run.total_steps} steps\n")
    world.barrier()


def _is_save_due(config: RunConfig, step: int, total_steps: int) -> bool:
    return step == total_steps or (config.checkpoint.every is not None and step % config.checkpoint.every == 0)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Draws every generator anew from (seed, step, rank).

    So a step's random numbers do not depend on what ran before it, and a resumed run needs no generator's state.
    """
    numbers = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    random.seed(int(numbers[0]))
    np.random.seed(int(numbers[0]))
    torch.manual_seed(int(numbers[1]))


def export(run: Run) -> None:
    """Writes the trained model as a folder like the start's; files of parts that were not trained are linked."""
    gathered = {part.value: run.engine.gather(part) for part in run.config.stage.trains}
    trained = {part: tensors for part, tensors in gathered.items() if tensors is not None}
    if run.world.is_main:
        out = derive_folder(run.folder.start, trained, run.folder.model, run.processor)
        log.info("wrote %s", out)
    run.world.barrier()
