"""What can be wrong with tracker, validation and fixed images, found before the ranks start."""

from __future__ import annotations

from anchorformer.errors import UserError
from train.config import RunConfig
from train.observe.trackers.base import parse_tracker


def check_shown(config: RunConfig) -> None:
    """Opens everything that the run will show something with.

    Raises:
        UserError: a tracker that is unknown, not installed or without its key; a validation without files or questions;
            data without an image to look at.
    """
    parse_tracker(config.tracker).check()
    if config.eval.every is not None:
        from train.observe.validation import open_tasks  # imports torch

        for name, (_, questions) in open_tasks(config).items():
            if not any(item.references for item in questions):
                raise UserError(
                    f"eval.tasks.{name} has no answers to compare with", found=f"{len(questions)} questions",
                    expected="a split whose answers are published", remedy="choose another task or split",
                )  # fmt: skip
    if config.health.every is not None:
        from train.observe.health import fixed_questions  # imports torch

        fixed_questions(config)
