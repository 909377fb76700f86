"""Takes a step once more, from the newest checkpoint before it: `replay RUN step=N`; writes into RUN/replay only."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import yaml

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from train.checkpoint import damage
from train.config import NO_TRACKER, EvalConfig, HealthConfig, LogConfig
from train.distributed import alone
from train.faults.replay import Order, recorded_steps
from train.run.folder import RunFolder, write_atomically
from train.start import Topology, check_devices, start


def main(arguments: list[str]) -> int:
    """Starts as many ranks as the run had; they end with 0 where the step's samples and loss are what they were.

    Raises:
        UserError: no such run or step.
    """
    folder, step = _read(arguments)
    config = folder.read_config()
    _check_reached(folder, step)
    replayed = RunFolder(folder.path / "replay" / f"step-{step:08d}")
    shutil.rmtree(replayed.path, ignore_errors=True)
    replayed.path.mkdir(parents=True)
    for path in (folder.path / "start.txt", folder.metrics):
        if path.is_file():
            shutil.copy(path, replayed.path)
    Order(str(folder.path), step).write(replayed)
    checkpoint = newest_before(folder, step)
    own = replace(
        config, run=f"{config.run}/replay/{replayed.path.name}", resume=str(checkpoint) if checkpoint else "never",
        log=LogConfig(every=1), hardware=replace(config.hardware, max_restarts=0),
        eval=EvalConfig(), health=HealthConfig(), tracker=NO_TRACKER, profile=None,
    )  # fmt: skip
    write_atomically(replayed.config, yaml.safe_dump(to_plain(own), sort_keys=False))
    print(f"replaying step {step} of {folder.path} from {checkpoint or 'its start'}, in {replayed.path}")
    if own.hardware.nodes > 1:
        print(f"on each node: HEAD_ADDR=<host> NODE_RANK=<i> launch/multinode.sh {replayed.path} {own.digest}")
        return 0
    check_devices(own)
    return start(replayed.path, own, Topology())


def newest_before(folder: RunFolder, step: int) -> Path | None:
    """The newest sound checkpoint of a run whose step is smaller; None where there is none."""
    older = [path for path in sorted(folder.state.glob("step-*")) if path.name < f"step-{step:08d}"]
    return next((path for path in reversed(older) if damage(path, alone()) is None), None)


def _read(arguments: list[str]) -> tuple[RunFolder, int]:
    words = [word for word in arguments if "=" not in word]
    values = dict(word.split("=", 1) for word in arguments if "=" in word)
    if len(words) != 1 or values.keys() != {"step"} or not values["step"].isdecimal() or int(values["step"]) == 0:
        raise UserError(
            "replay takes a run and a step", found=" ".join(arguments) or "nothing",
            expected="RUN step=N, with N from 1", remedy="e.g. python -m train replay checkpoints/mine/align step=1207",
        )  # fmt: skip
    return RunFolder(Path(words[0]).resolve()), int(values["step"])


def _check_reached(folder: RunFolder, step: int) -> None:
    """A step is known where it has a line in the records, or a rank failed in it."""
    steps = recorded_steps(folder)
    failed = {json.loads(path.read_text())["step"] for path in folder.black_boxes.glob("*rank_*.json")}
    if step not in steps and step not in failed:
        last = max([*steps, *failed], default=0)
        raise UserError(
            f"the run {folder.path} has not come to step {step}", found=f"steps up to {last}",
            expected="a step with a line in metrics.jsonl, or one in which a rank failed", remedy=f"step={last}",
        )  # fmt: skip
