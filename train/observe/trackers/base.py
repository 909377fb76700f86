"""What every tracker is: a config that names project, group and run, and a place that takes step after step."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from anchorformer.errors import UserError
from anchorformer.schema import Schema, parse_plugin
from train.run.folder import write_atomically

PACKAGE = "train.observe.trackers"


@dataclass(frozen=True)
class Picture:
    """A picture of a step, and what was asked and answered about it.

    Attributes:
        name: the same for the same picture at every step.
        path: a PNG in the run's folder.
    """

    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Subject:
    """The run that is shown.

    Attributes:
        name: under `output_root`, which is unique there.
        config: every value that decides the run.
        folder: where the tracker keeps what it has to know the next time, one folder for all trackers of the run.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path


class Tracker(Protocol):
    """One run in a tracker.

    Attributes:
        shown: the last step that it has for good; later ones are logged, in ascending order and each once.
    """

    shown: int

    def log(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        """Adds a step."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(Schema):
    """Base of all tracker configs; a new tracker subclasses it in its own file and adds one YAML to conf/tracker."""

    project: str = "anchorformer"
    """What runs are shown together."""
    group: str | None = None
    """Runs that belong together within a project; a sweep's trials have the name of their sweep."""
    name: str | None = None
    """How the run is called there; null is the name it has here."""

    package: ClassVar[str | None] = None
    """What has to be installed."""
    extra: ClassVar[str] = "train"
    """The extra of this project that installs it."""

    @property
    def is_on(self) -> bool:
        return True

    def check(self) -> None:
        """Finds out, before the run starts, what would keep the tracker from working.

        Raises:
            UserError: its package is not installed.
        """
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"tracker={self.package} is not installed", found=f"no package {self.package}",
                expected="the package, in the environment that trains",
                remedy=f"pip install -e '.[{self.extra}]', or tracker=none",
            )  # fmt: skip

    def open(self, subject: Subject) -> AbstractContextManager[Tracker]:
        """The run in the tracker, from where it was left; everything logged is there for good when the block ends."""
        raise NotImplementedError


def parse_tracker(spec: Mapping[str, Any]) -> TrackerConfig:
    """The typed tracker of a plug-in mapping.

    Raises:
        UserError: unknown plug-in, unknown key or wrong type.
    """
    return parse_plugin(TrackerConfig, spec, PACKAGE, "tracker")


def read_notes(path: Path) -> dict[str, Any]:
    """What a tracker has written down about the run; empty the first time."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_notes(path: Path, notes: Mapping[str, Any]) -> None:
    """Replaces what a tracker has written down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(notes, indent=2) + "\n")
