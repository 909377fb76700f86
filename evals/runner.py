"""Every task under every condition, written as it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evals import results
from evals.conditions import under
from evals.config import EvalConfig
from evals.questions import Question
from evals.tasks.base import Respondent, TaskConfig


def evaluate(
    config: EvalConfig,
    prepared: Mapping[str, tuple[TaskConfig, list[Question]]],
    respondent: Respondent,
    facts: Mapping[str, Any],
    out: Path,
) -> Iterator[dict[str, Any]]:
    """Runs every task under every condition; predictions and result of one are on disk when it is yielded.

    Args:
        facts: what decided the scores beside the task (model, template, versions), written into every result.

    Raises:
        UserError: an image that cannot be read, or a condition that the task cannot be put under.
    """
    for name, (task, questions) in prepared.items():
        groups = [task.group(item) for item in questions]
        for condition in config.conditions:
            asked = under(condition, questions, config.seed)
            start = time.perf_counter()
            outcomes = task.answer(asked, respondent)
            seconds = time.perf_counter() - start
            settings = {
                "aggregate": task.aggregate(asked, outcomes),
                **task.describe(),
                **facts,
                "source": dict(task.source),
                "seed": config.seed,
                "time": {"seconds": round(seconds, 3), "questions_per_second": round(len(asked) / seconds, 2)},
            }
            submission = task.submission(asked, outcomes)
            yield results.write(out, name, condition, asked, outcomes, settings, groups, config.limit, submission)


def line(result: Mapping[str, Any]) -> str:
    """One result in one line."""
    score = "no published answers" if result["score"] is None else f"{result['score']:.4f}"
    parts = [(name, part["score"]) for name, part in result.get("groups", {}).items() if part["n_scored"]]
    groups = "".join(f", {name} {value:.4f}" for name, value in parts)
    return (
        f"{result['task']} ({result['condition']} image): {result['metric']} {score}{groups}, "
        f"n={result['n']}, {result['time']['seconds']:.1f} s"
    )
