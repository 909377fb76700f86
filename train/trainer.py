"""The loop: fetch, agree, forward and backward, check, step, log, save."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.profiler import record_function
from transformers import ProcessorMixin

from anchorformer.contracts import Batch
from train import checkpoint
from train.checkpoint import TrainerState
from train.config import RunConfig
from train.distributed import World
from train.engine import Engine
from train.export import export
from train.facts import gather_facts
from train.faults.guards import FrozenGuard, check_numbers
from train.faults.interrupt import Interrupted, StopRequest
from train.faults.progress import Phase, Progress
from train.observe.observer import Observer, Taken
from train.observe.pace import Stopwatch
from train.observe.trace import Tracer
from train.preflight import before_first_step
from train.run.folder import RunFolder, write_atomically
from train.run.identity import Identity
from train.writing import together

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
        progress: told where the run is, for the watchdog and the black box.
        stop: asked before every step whether to take it.
        identity: what the run's numbers depend on.
    """

    config: RunConfig
    folder: RunFolder
    world: World
    engine: Engine
    processor: ProcessorMixin
    steps: Steps
    total_steps: int
    resumed: TrainerState | None = None
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = field(default_factory=StopRequest)
    identity: Identity = field(kw_only=True)

    @property
    def first(self) -> int:
        """Steps that lie behind the run at its start."""
        return self.resumed.step if self.resumed else 0


def train(run: Run) -> None:
    """Runs the stage to its end and leaves the trained model in `<run>/model`.

    Raises:
        UserError: there is no room for the next checkpoint.
        TrainingHalted: numbers that cannot be trained on; on all ranks together.
        Interrupted: a signal has asked for it; on all ranks together, behind a checkpoint of the last step taken.
    """
    before_first_step(run)
    checkpoint.abandon_newer(run.folder.state, run.world, run.first)
    with Loop(run) as loop:
        take_steps(run, loop)
    run.progress.enter(Phase.export)
    export(run)
    with together(run.world, run.folder.done):
        if run.world.is_main:
            write_atomically(run.folder.done, f"{run.total_steps} steps\n")


def take_steps(run: Run, loop: Loop) -> None:
    """The steps that lie ahead, with a checkpoint wherever one is due, and behind the last step where a signal asks.

    Raises:
        UserError, TrainingHalted, Interrupted: as `train`.
    """
    saved = run.first
    try:
        for step in range(run.first + 1, run.total_steps + 1):
            position = run.steps.state_dict()
            loop.advance(step)
            if _is_save_due(run.config, step, run.total_steps):
                save(run, loop.frozen, step, run.steps.state_dict())
                saved = step
                if run.folder.rehearsal.is_file() and run.resumed is None and run.world.rank == run.world.size - 1:
                    # What a rehearsal has to survive, behind its first checkpoint.
                    os.kill(os.getpid(), signal.SIGKILL)
    except Interrupted as stop:
        if stop.step > saved:
            # The loader has already handed out the step that is not taken any more.
            save(run, loop.frozen, stop.step, position)
        with together(run.world, run.folder.interrupted):
            if run.world.is_main:
                write_atomically(run.folder.interrupted, f"{stop}\n")
        raise
    loop.finish()


class Loop:
    """Takes one optimizer step after the other, each under its guards and with a line in the records.

    A context manager around all of them, so that none of its tools outlives a step that fails.

    Attributes:
        frozen: proves that frozen parameters stay.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.frozen = FrozenGuard(run.engine, run.world)
        self._observer = Observer(run)
        self._stopwatch = Stopwatch(run.engine.model, run.world.device)
        self._tracer = Tracer(run)
        self._batches_of_steps = iter(run.steps)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tracer.__exit__(*exception)

    def advance(self, step: int) -> None:
        """Takes one step.

        Raises:
            Interrupted: a rank has been asked to stop, and this step is not taken.
            TrainingHalted: the step's numbers cannot be trained on.
        """
        with self._tracer.step(step):
            self._take(step)

    def _take(self, step: int) -> None:
        run = self._run
        config, engine, world, progress = run.config, run.engine, run.world, run.progress
        started = time.perf_counter()
        progress.enter(Phase.data, step)
        with record_function("data"):
            batches = next(self._batches_of_steps)
        data_wait = time.perf_counter() - started

        progress.enter(Phase.exchange, samples=tuple(name for batch in batches for name in batch.sample_ids))
        with record_function("exchange"):
            facts = gather_facts(world, batches, data_wait + self._stopwatch.take(), run.stop.signal)
        if facts.signal:
            raise Interrupted(step - 1, facts.signal)

        progress.enter(Phase.compute)
        seed_step(config.seed, step, world.rank)
        loss, norms = engine.agree(engine.accumulate(batches, facts.supervised))
        lrs = engine.lrs
        check_numbers(step, loss, norms, facts)

        progress.enter(Phase.update)
        with record_function("step"):
            engine.step()
        self.frozen.observe(facts)
        self._observer.observe(Taken(step, loss, lrs, norms, facts, time.perf_counter() - started, data_wait))

    def finish(self) -> None:
        """Call after the last step; raises what `FrozenGuard.finish` does."""
        self._observer.close()
        self.frozen.finish()


def save(run: Run, frozen: FrozenGuard, step: int, position: dict[str, Any]) -> None:
    """Writes the checkpoint of a step that has been taken.

    Args:
        position: of the loader, behind that step.
    """
    run.progress.enter(Phase.save)
    state = TrainerState(step, run.folder.launch, position, run.identity)
    keep = run.config.checkpoint.keep
    saved = checkpoint.save(run.folder, run.engine, run.world, state, frozen.frozen, keep)
    log.info("saved %s", saved)


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
