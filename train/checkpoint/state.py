"""What a resumed run needs beside the engine's own state, and how it is written down."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.run.folder import RunFolder
from train.run.identity import Identity

FILE = "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands and what it is made of.

    Random numbers are drawn from (seed, step, rank) anew in every step, so `step` is the state of every generator.

    Attributes:
        step: optimizer steps taken.
        launch: `RunFolder.launch` of the attempt that took them.
        loader: the sampler's position.
        identity: what the numbers depend on.
    """

    step: int
    launch: int
    loader: dict[str, Any]
    identity: Identity


def layout(config: RunConfig) -> dict[str, Any]:
    """How a step is cut and computed: may change between attempts, at the price of another rounding."""
    hardware = config.hardware
    return {
        "ranks": config.world_size, "micro_batch": hardware.micro_batch, "token_budget": config.data.token_budget,
        "zero_stage": config.zero.stage, "kernels": hardware.kernels.value,
        "compile": [part.value for part in hardware.compile],
    }  # fmt: skip


def write(folder: Path, state: TrainerState, config: RunConfig, run: RunFolder, metrics: dict[str, Any]) -> Path:
    """Writes the state into a checkpoint.

    Args:
        run: names the start folder, for a reader (its hash is part of the identity), and its trackers.
        metrics: size and hash of metrics.jsonl as it is now.
    """
    facts = {
        "step": state.step, "launch": state.launch, "loader": state.loader,
        "random": "drawn anew from (seed, step, rank) in every step", "layout": layout(config), "base": str(run.start),
        "metrics": metrics, "trackers": run.tracker_ids, "identity": state.identity.to_dict(),
    }  # fmt: skip
    (folder / FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return folder / FILE


def read(folder: Path) -> dict[str, Any]:
    """The facts that `write` left."""
    return dict(json.loads((folder / FILE).read_text()))


def launch_of(folder: Path) -> int | None:
    """Which launch wrote a checkpoint; None where the file is damaged, as all will find who resume from it."""
    try:
        return int(read(folder)["launch"])
    except (ValueError, KeyError):
        return None


def parse(facts: dict[str, Any]) -> TrainerState:
    """The state among the facts."""
    return TrainerState(facts["step"], facts["launch"], facts["loader"], Identity(**facts["identity"]))
