"""Two runs side by side: what they are made of, and where their records part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anchorformer.schema import to_plain
from train.observe.journal import read_lines
from train.run.folder import RunFolder
from train.run.identity import MEANING, differences, numbers

OF_AN_ATTEMPT = ("command", "started", "before", "host", "variables.JOB_ID", "variables.SLURM_")
"""Beginnings of what every start has of its own."""


@dataclass(frozen=True)
class Difference:
    """One value that two runs do not share.

    Attributes:
        section: where it was found.
        is_of_numbers: whether it can be why the runs' numbers differ, or is such a difference.
    """

    section: str
    key: str
    one: Any
    other: Any
    is_of_numbers: bool = True


def compare(one: RunFolder, other: RunFolder) -> Iterator[Difference]:
    """Configuration, environment, identity and record of two runs.

    Raises:
        UserError: one of them is not a run folder.
    """
    config, others = one.read_config(), other.read_config()
    of_numbers = {key for key, _, _ in differences(numbers(config), numbers(others))}
    for key, a, b in differences(to_plain(config), to_plain(others)):
        yield Difference("config", key, a, b, is_of_numbers=key in of_numbers)
    for key, a, b in differences(_read(one, "environment.json"), _read(other, "environment.json")):
        if not key.startswith(OF_AN_ATTEMPT):
            yield Difference("environment", key, a, b, is_of_numbers=False)
    for key, a, b in differences(_read(one, "identity.json"), _read(other, "identity.json")):
        # Versions are told with the environment; the configuration with its values.
        if not key.startswith(("versions", "config", "code")):
            yield Difference("identity", MEANING.get(key, key), a, b)
    yield from _records(one, other)


def _records(one: RunFolder, other: RunFolder) -> Iterator[Difference]:
    """The first step at which the records differ, and how far losses part at most."""
    lines = [_steps(run) for run in (one, other)]
    if lines[0].keys() != lines[1].keys():
        yield Difference("metrics", "last step", max(lines[0], default=0), max(lines[1], default=0))
    common = sorted(lines[0].keys() & lines[1].keys())
    parted = [step for step in common if lines[0][step] != lines[1][step]]
    for key, a, b in differences(lines[0][parted[0]], lines[1][parted[0]]) if parted else ():
        yield Difference(f"metrics, step {parted[0]} (the first of {len(parted)} that differ)", key, a, b)
    gaps = {step: abs(lines[0][step]["loss"] - lines[1][step]["loss"]) for step in common}
    widest = max(gaps, key=lambda step: gaps[step] if not math.isnan(gaps[step]) else math.inf, default=0)
    if widest and gaps[widest] != 0:
        yield Difference(f"metrics, step {widest} (the widest gap)", "loss", *(line[widest]["loss"] for line in lines))


def _steps(run: RunFolder) -> dict[int, dict[str, Any]]:
    """The record's lines by step, without what the clock has said."""
    lines = map(json.loads, read_lines(run.metrics))
    return {line["step"]: {key: value for key, value in line.items() if key != "time"} for line in lines}


def _read(run: RunFolder, name: str) -> dict[str, Any]:
    path = run.path / name
    return dict(json.loads(path.read_text())) if path.is_file() else {}
