"""Which entries are repetitions of one another, and how far they spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.report.entry import Entry, short_names, spoken
from evals.run_keys import NOT_DECISIVE, is_within

NOT_COMPARED = (*NOT_DECISIVE, "seed", "init_from")
"""Config keys that repetitions may have otherwise. Beside what decides nothing: the seed, and where it started, because
every seed has a stage before of its own, which is compared itself."""
MAX_VALUES = 4
"""Config values that a label names at most."""


@dataclass(frozen=True)
class Group:
    """Entries that differ in nothing but seeds.

    Attributes:
        label: what tells it from the other groups.
    """

    label: str
    entries: tuple[Entry, ...]

    @property
    def seeds(self) -> list[Any]:
        """The seed of each entry, as far as configs tell."""
        return [seed_of(entry) for entry in self.entries]


@dataclass(frozen=True)
class Spread:
    """n values: their mean, and the standard deviation of a sample (None for a single one)."""

    n: int
    mean: float
    deviation: float | None


def group(entries: Sequence[Entry]) -> list[Group]:
    """Entries by what they have in common, in the order of the first of each.

    Entries without a configuration are alone: nothing says what they are repetitions of.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(_essence(entry), []).append(entry)
    firsts = [members[0] for members in found.values()]
    varying = _varying([essential(entry.last.config) for entry in firsts if entry.last and entry.last.config])
    axes = _varying([essential(entry.point) for entry in firsts if entry.point])
    labels = [_label(members, axes, varying) for members in found.values()]
    return [
        Group(label if labels.count(label) == 1 else f"{label} ({members[0].label})", tuple(members))
        for label, members in zip(labels, found.values(), strict=True)
    ]


def spread(values: Sequence[float | None]) -> Spread | None:
    """Of those values that are there; None where none is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Spread(len(there), statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None)


def seed_of(entry: Entry) -> Any:
    """The seed of the outcome's stage."""
    return entry.last.config.get("seed") if entry.last else None


def essential(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config, or a point, without names, places and seeds."""
    return {key: value for key, value in values.items() if not is_within(key.rpartition(":")[2], NOT_COMPARED)}


def _essence(entry: Entry) -> str:
    if not entry.stages or not all(stage.config for stage in entry.stages):
        return str(entry.path)
    # Of all stages: a trial that is half way is no repetition of one that ended.
    return json.dumps([essential(stage.config) for stage in entry.stages], default=str)


def _varying(values: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for mapping in values for key in mapping)
    return [key for key in keys if len({str(mapping.get(key)) for mapping in values}) > 1]


def _label(members: Sequence[Entry], axes: Sequence[str], varying: Sequence[str]) -> str:
    first = members[0]
    if len(members) == 1:
        return first.label
    config = first.last.config if first.last else {}
    values = {axis: first.point[axis] for axis in axes if axis in first.point} or {
        name: config[key] for key, name in short_names(varying).items() if key in config
    }
    told = [f"{name}={spoken(value)}" for name, value in values.items()]
    return ", ".join(told[:MAX_VALUES] + ["…"] * (len(told) > MAX_VALUES)) or f"{first.label} and its repetitions"
