"""Everything that can be wrong with the questions of an evaluation, found before torch and the weights are loaded."""

from __future__ import annotations

from pathlib import Path

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from evals.config import QuestionsConfig
from evals.questions import Question
from evals.tasks.base import PACKAGE, TaskConfig


def prepare(config: QuestionsConfig) -> dict[str, tuple[TaskConfig, list[Question]]]:
    """The tasks and what each of them asks.

    Raises:
        UserError: a task that does not fit its class, files missing or not in their layout, a task without records.
    """
    prepared = {}
    for name, spec in config.tasks.items():
        place = f"tasks.{name}"
        task = parse_plugin(
            TaskConfig, spec, PACKAGE, place, f"correct {place} on the command line or in conf/eval/{name}.yaml"
        )
        questions = task.questions(name, Path(config.data.root), Path(config.data.cache_dir), config.limit)
        if not questions:
            raise UserError(
                f"task {name} has no questions",
                found="0 records",
                expected="1 or more",
                remedy=f"check the files that tasks.{name}.source names under {config.data.root}",
            )
        prepared[name] = (task, questions)
    return prepared
