"""Everything that can be wrong with an evaluation, found before torch and the weights are loaded."""

from __future__ import annotations

from pathlib import Path

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from evals.config import EvalConfig
from evals.questions import Question
from evals.tasks.base import PACKAGE, TaskConfig


def prepare(config: EvalConfig) -> dict[str, tuple[TaskConfig, list[Question]]]:
    """The tasks and what each of them asks.

    Raises:
        UserError: a task that does not fit its class, files missing or not in their layout, a task without records.
    """
    prepared = {}
    for name, spec in config.tasks.items():
        task = parse_plugin(TaskConfig, spec, PACKAGE, f"tasks.{name}")
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


def model_folder(name: str) -> Path:
    """The model folder of a run, or the folder itself where it is one.

    Raises:
        UserError: there is no model in it.
    """
    folder = Path(name)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise UserError(
        f"no model in {name}",
        found=there or "an empty folder",
        expected="a finished run (with model/ in it) or a model folder (with config.json)",
        remedy="finish the run, or pass the folder that `python -m anchorformer.assemble` wrote",
    )
