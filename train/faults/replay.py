"""Recorded steps taken once more, from the newest checkpoint before them and on the same samples, and compared."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from train.faults.guards import TrainingHalted
from train.observe.journal import read_lines
from train.run.folder import RunFolder, write_atomically
from train.trainer import Loop, Run

log = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Of the loss, relative. On one CPU machine the bits are equal; on CUDA that takes `repro=strict` in the run itself."""
ORDER = "replay.json"


@dataclass(frozen=True)
class Order:
    """What ranks that are started on a replay's folder are to do.

    Attributes:
        run: the folder of the run that is replayed.
        step: the step whose loss is compared.
    """

    run: str
    step: int

    @classmethod
    def read(cls, folder: RunFolder) -> Order | None:
        """The order in a folder; None where it is an ordinary run's."""
        path = folder.path / ORDER
        return cls(**json.loads(path.read_text())) if path.is_file() else None

    def write(self, folder: RunFolder) -> None:
        write_atomically(folder.path / ORDER, json.dumps(asdict(self)) + "\n")

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The step's line in the run's records; None where the run did not get over it."""
        return recorded_steps(RunFolder(Path(self.run))).get(self.step)


def recorded_steps(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl by step."""
    lines = [json.loads(line) for line in read_lines(folder.metrics)]
    return {line["step"]: line for line in lines}


def replay(run: Run, order: Order) -> None:
    """Takes the steps up to the one that is asked for, saves nothing, and compares.

    Raises:
        UserError: the step has other samples or another loss than it had, or does not halt the run as it did.
        TrainingHalted: a step on the way halts the run, and did not.
    """
    expected = order.recorded
    with Loop(run) as loop:
        for step in range(run.first + 1, order.step + 1):
            try:
                loop.advance(step)
            except TrainingHalted as halt:
                if step < order.step or expected is not None:
                    raise
                log.info("step %d halts the run again: %s", step, halt)
                return
    verdict: UserError | None = None
    if run.world.is_main:
        verdict = _difference(recorded_steps(run.folder)[order.step], expected, order)
    verdict = run.world.broadcast(verdict)
    if verdict is not None:
        raise verdict


def _difference(found: dict[str, Any], expected: dict[str, Any] | None, order: Order) -> UserError | None:
    what = f"step {order.step} of {order.run} is not reproduced"
    remedy = "compare versions and machine with environment.json; on CUDA a run has to be started with repro=strict"
    if expected is None:
        return UserError(
            what, found=f"loss {found['loss']!r}", expected="the failure that ended the run in this step",
            remedy=f"look at {RunFolder(Path(order.run)).black_boxes}: what failed does not lie in the step's numbers",
        )  # fmt: skip
    if found["sample_ids"] != expected["sample_ids"]:
        return UserError(
            what, found=f"samples {', '.join(found['sample_ids'])}",
            expected=f"samples {', '.join(expected['sample_ids'])}", remedy="restore the data as they were",
        )  # fmt: skip
    if not math.isclose(found["loss"], expected["loss"], rel_tol=TOLERANCE):
        return UserError(
            what, found=f"loss {found['loss']!r}", expected=f"loss {expected['loss']!r} within {TOLERANCE:g}",
            remedy=remedy,
        )  # fmt: skip
    same = "to the bit" if found["loss"] == expected["loss"] else f"within {TOLERANCE:g}"
    log.info("step %d is reproduced %s: loss %r, samples %s", order.step, same, found["loss"],
             ", ".join(found["sample_ids"]))  # fmt: skip
    return None
