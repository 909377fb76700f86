"""One evaluation from its config to its files: every task under every condition."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from evals import results
from evals.config import EvalConfig
from evals.questions import Question, under
from evals.tasks.base import PACKAGE, Respondent, TaskConfig


def prepare(config: EvalConfig) -> dict[str, tuple[TaskConfig, list[Question]]]:
    """Everything that can be wrong with the tasks and their files, before any weights are loaded.

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


def evaluate(
    config: EvalConfig,
    prepared: Mapping[str, tuple[TaskConfig, list[Question]]],
    respondent: Respondent,
    facts: Mapping[str, Any],
    out: Path,
) -> list[dict[str, Any]]:
    """Runs every task under every condition and writes predictions and results as they come.

    Args:
        facts: what decided the scores beside the task (model, template, versions), written into every result.

    Returns:
        The results, as written.
    """
    written = []
    for name, (task, questions) in prepared.items():
        groups = [task.group(item) for item in questions]
        for condition in config.conditions:
            asked = under(condition, questions, config.seed)
            start = time.perf_counter()
            outcomes = task.answer(asked, respondent)
            seconds = time.perf_counter() - start
            settings = {
                **task.describe(),
                **facts,
                "source": dict(task.source),
                "limit": config.limit,
                "seed": config.seed,
                "time": {"seconds": round(seconds, 3), "questions_per_second": round(len(asked) / seconds, 2)},
            }
            result = results.write(out, name, condition, asked, outcomes, settings, groups)
            written.append(result)
    return written


def line(result: Mapping[str, Any]) -> str:
    """One result in one line."""
    score = "no published answers" if result["score"] is None else f"{result['score']:.4f}"
    parts = [(name, part["score"]) for name, part in result.get("groups", {}).items() if part["n_scored"]]
    groups = "".join(f", {name} {value:.4f}" for name, value in parts)
    return (
        f"{result['task']} ({result['condition']} image): {result['metric']} {score}{groups}, "
        f"n={result['n']}, {result['time']['seconds']:.1f} s"
    )
