"""The door to checkpoints: written complete or not at all, found, proven and loaded again, on any number of ranks."""

from train.checkpoint.resume import (
    check_data,
    check_metrics,
    damage,
    find,
    fit,
    has_saved,
    read_state,
    restore,
    restore_tracker_ids,
)
from train.checkpoint.retention import abandon_newer
from train.checkpoint.save import rehearse, save
from train.checkpoint.seal import COMPLETE
from train.checkpoint.state import TrainerState

__all__ = [
    "COMPLETE", "TrainerState", "abandon_newer", "check_data", "check_metrics", "damage", "find", "fit", "has_saved",
    "read_state", "rehearse", "restore", "restore_tracker_ids", "save",
]  # fmt: skip
