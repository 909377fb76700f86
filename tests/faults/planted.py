"""A rank with a fault in it: `planted.py FAULT RANK STEP RUN_FOLDER`, started by the agent in place of `train.rank`.

The product has no switch for any of this: the faults are patched into the process before it begins.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train import rank, trainer
from train.distributed import World
from train.engine.base import Engine
from train.observe.pace import Stopwatch
from train.run.folder import RunFolder

FOREVER = 3600.0


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep() -> None:
    time.sleep(FOREVER)


def crashed() -> None:
    raise RuntimeError("planted")


FAULTS: dict[str, Callable[[], None]] = {fault.__name__: fault for fault in (killed, stopped, asleep, crashed)}


def run_whole(world: World, folder: str) -> None:
    """A run without a fault, on ranks that are there already; a job for `tests.train.ranks`."""
    run = RunFolder(Path(folder))
    config = run.read_config()
    rank.prepare_process(config)
    rank.run_rank(config, run, world)


def plant(fault: str, on_rank: int, at_step: int) -> None:
    """Puts the fault into every way that a step takes through `Engine.accumulate`, the middle of a step."""
    whole, seed_step = Engine.accumulate, trainer.seed_step
    now = {"step": 0}
    is_first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def seeded(seed: int, step: int, number: int) -> None:
        now["step"] = step
        seed_step(seed, step, number)

    def accumulate(engine: Engine, *arguments: Any) -> float:
        is_due = engine.world.rank == on_rank and now["step"] == at_step and is_first_attempt
        if is_due and fault in FAULTS:
            FAULTS[fault]()
        share = whole(engine, *arguments)
        return float("nan") if is_due and fault == "nan" else share

    def stopwatch(model: nn.Module, device: torch.device) -> Stopwatch:
        watch = Stopwatch(model, device)
        if fault == "slow" and int(os.environ["RANK"]) == on_rank:
            model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
        return watch

    trainer.seed_step = seeded  # type: ignore[assignment]
    trainer.Stopwatch = stopwatch  # type: ignore[misc,assignment]
    Engine.accumulate = accumulate  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    fault, on_rank, at_step, folder = sys.argv[1:]
    plant(fault, int(on_rank), int(at_step))
    rank.run([folder])
