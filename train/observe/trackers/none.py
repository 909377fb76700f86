"""No tracker: the run shows itself in its folder only, from which `python -m train sync` feeds any tracker later."""

from __future__ import annotations

from dataclasses import dataclass

from train.observe.trackers.base import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class NoTracker(TrackerConfig):
    """Keeps the names under which the run is shown once it is fed to a tracker."""

    @property
    def is_on(self) -> bool:
        return False
