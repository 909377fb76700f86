"""Everything a run shows of the steps it takes: its record, the console, validation, anchors, and a tracker."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.choices import Part
from train.engine.base import total_norm
from train.facts import StepFacts
from train.faults.progress import Phase
from train.observe.background import Background
from train.observe.health import Health
from train.observe.journal import Journal, read_lines, take_back_media
from train.observe.metrics import Console, step_record, time_record
from train.observe.mfu import mfu_of
from train.observe.pace import Lag
from train.observe.trackers.base import parse_tracker
from train.observe.validation import SharedRespondent, Validation, is_sharded, looking
from train.run.folder import RunFolder

if TYPE_CHECKING:
    from train.trainer import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """An optimizer step that has been taken.

    Attributes:
        loss: mean over the supervised tokens of all ranks.
        lrs: learning rate of each parameter group in this step.
        norms: of each part's gradient, before clipping.
        seconds, data_wait: of the whole step, and of its wait for data.
    """

    step: int
    loss: float
    lrs: dict[str, float]
    norms: dict[Part, float]
    facts: StepFacts
    seconds: float
    data_wait: float


class Observer:
    """One on every rank, since validation is the work of all; files, console and tracker are rank 0's."""

    def __init__(self, run: Run) -> None:
        self._run = run
        config, folder, world = run.config, run.folder, run.world
        self._validation = Validation(config, world) if config.eval.every is not None else None
        self._health = Health(config, world, folder.media) if config.health.every is not None else None
        self._console = Console(run.total_steps, run.first)
        self._mfu = mfu_of(run.engine.model, config.stage.whole_parts, world)
        self._lag = Lag()
        self._tracker: Background | None = None
        if world.is_main:
            self._metrics, self._healths, self._evals = (
                Journal(path, run.first) for path in (folder.metrics, folder.health, folder.evals)
            )
            take_back_media(folder.media, run.first)
            # Behind the files, which it begins to read.
            self._tracker = _background(folder) if parse_tracker(config.tracker).is_on else None

    def observe(self, taken: Taken) -> None:
        """Validates and looks where that is due, then records the step; all ranks call it.

        The line of metrics.jsonl is the last that is written of a step: who finds it, finds everything of the step.
        """
        run, step = self._run, taken.step
        grad_norm = total_norm(taken.norms)
        is_clipped = 0 < run.config.stage.clip_norm < grad_norm
        self._ask(step)
        if not run.world.is_main:
            return
        is_logged = step % run.config.log.every == 0 or step == run.total_steps
        times = time_record(
            taken.seconds, taken.data_wait, taken.facts, run.world.device, self._mfu, is_logged=is_logged
        )
        norms = taken.norms if is_logged else None
        record = step_record(
            step, taken.loss, taken.lrs, grad_norm, norms, taken.facts, times, is_clipped=is_clipped
        )  # fmt: skip
        self._metrics.write(record)
        self._console.count(times["seconds"])
        if is_logged:
            self._console.show(record)
        for warning in (self._lag.observe(taken.facts.own_seconds, times["seconds"]), self._trouble()):
            if warning:
                log.warning("step %d: %s", step, warning)

    def close(self) -> None:
        """Call after the last step; waits for nothing."""
        if self._run.world.is_main:
            for journal in (self._metrics, self._healths, self._evals):
                journal.close()
            # From the record, which also knows the steps before a resumption.
            clipped = [json.loads(line)["clipped"] for line in read_lines(self._run.folder.metrics)]
            log.info("gradients were clipped in %d of %d step(s), no step was skipped", sum(clipped), len(clipped))
        if self._tracker is not None:
            self._tracker.leave()

    def _ask(self, step: int) -> None:
        run, config = self._run, self._run.config
        validation = self._validation if self._is_due(config.eval.every, step) else None
        health = self._health if self._is_due(config.health.every, step) else None
        if validation is None and health is None:
            return
        run.progress.enter(Phase.show)
        model = run.engine.model
        with looking(model):
            respondent = SharedRespondent(
                model, run.processor, config.eval.batch_size, run.world, run.progress, is_sharded=is_sharded(config)
            )  # fmt: skip
            for record in validation.run(step, respondent) if validation else ():
                if run.world.is_main:
                    self._evals.write(record)
                    log.info("step %d: %s", step, _in_words(record))
            if health is not None:
                seen = health.look(step, model, respondent)
                if run.world.is_main:
                    self._healths.write(seen)

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self._run.total_steps)

    def _trouble(self) -> str | None:
        return self._tracker.trouble() if self._tracker is not None else None


def _background(folder: RunFolder) -> Background | None:
    try:
        return Background(folder)
    except OSError as error:  # no process, no room for its log
        log.warning("the tracker cannot be started, and the run goes on without it: %s; python -m train sync %s shows "
                    "it later", error, folder.path)  # fmt: skip
        return None


def _in_words(record: dict[str, Any]) -> str:
    if "loss" in record:
        return f"{record['dataset']}: loss {record['loss']:.4f}"
    score = "nothing to score" if record["score"] is None else f"{record['score']:.4f}"
    return f"{record['task']}: {record['metric']} {score}, n={record['n']}"
