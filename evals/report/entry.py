"""What is compared: one thing that was trained, with what it is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.report.reading import Stage


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that was trained: its stages, in the order they were trained.

    Attributes:
        label: names it among the others.
        sweep: name of the sweep that it is a trial of, or None.
        point: axis -> value, as its grids name them; empty for what is no trial.
        axes: axis -> value for all axes of the sweep: where no grid of the trial names one, what its config has.
        state: of the trial, or of its last stage.
        seconds: how long the trial took by the launcher's clock.
        log: why a trial failed: what the sweep says of it, and the last lines of its log.
        notes: what a reader has to know of its sweep first.
    """

    label: str
    path: Path
    stages: tuple[Stage, ...]
    sweep: str | None = None
    point: Mapping[str, Any]
    axes: Mapping[str, Any]
    state: str
    seconds: float | None = None
    log: str = ""
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> Stage | None:
        """The stage whose model is the outcome."""
        return self.stages[-1] if self.stages else None


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys by their last part, or by as many parts as tell them apart; a class by what it is the class of."""
    names: dict[str, str] = {}
    for key in dict.fromkeys(keys):
        parts = key.removesuffix("._target_").split(".")
        taken = set(names.values())
        names[key] = next(
            (name for count in range(1, len(parts) + 1) if (name := ".".join(parts[-count:])) not in taken), key
        )
    return names


def spoken(value: Any) -> Any:
    """A value as a reader says it: a dataclass of a plugin is called by its module, a list is text."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return text.rsplit(".", 2)[-2] if text.startswith("anchorformer.") and text.endswith("Config") else text
