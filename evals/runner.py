"""Every task under every condition, written as it is done; in one process, or in shares that are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anchorformer.schema import TARGET
from evals import results
from evals.conditions import under
from evals.config import Condition, EvalConfig
from evals.journal import Journal, Remembering, last_settings
from evals.questions import Question
from evals.tasks.base import Respondent, TaskConfig

Prepared = Mapping[str, tuple[TaskConfig, list[Question]]]


def evaluate(
    config: EvalConfig, prepared: Prepared, respondent: Respondent, facts: Mapping[str, Any], out: Path,
    peak_gib: Callable[[], float] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Runs every task under every condition; predictions and result of one are on disk when it is yielded.

    What an evaluation that was killed has answered is not asked again.

    Args:
        facts: what decided the scores beside the task (model, template, versions), written into every result.
        peak_gib: the most memory that this process has held so far.

    Raises:
        UserError: an image that cannot be read, or a condition that the task cannot be put under.
    """
    for name, task, condition, asked in _parts(config, prepared):
        journal = Journal(_stem(out, name, condition, config), _settings(config, task, condition, facts), asked)
        journal.begin()
        yield _result(config, name, task, condition, asked, journal, respondent, out, peak_gib)


def answer_share(
    config: EvalConfig, prepared: Prepared, respondent: Respondent, facts: Mapping[str, Any], out: Path, share: int
) -> None:
    """Answers every `config.ranks`-th question, from `share` on, into the journals; `put_together` makes the results.

    Raises:
        UserError: what `evaluate` raises.
    """
    for name, task, condition, asked in _parts(config, prepared):
        settings = _settings(config, task, condition, facts)
        journal = Journal(_stem(out, name, condition, config), settings, asked, writer=share)
        journal.begin()
        positions = range(share, len(asked), config.ranks)
        own = [asked[position] for position in positions]
        if own:
            task.answer(own, Remembering(respondent, journal, positions, config.batch_size))


def put_together(config: EvalConfig, prepared: Prepared, out: Path) -> Iterator[dict[str, Any]]:
    """The results of what all shares have answered, as `evaluate` gives them.

    Raises:
        UserError: a question was left out.
    """
    for name, task, condition, asked in _parts(config, prepared):
        stem = _stem(out, name, condition, config)
        journal = Journal(stem, last_settings(stem), asked)
        yield _result(config, name, task, condition, asked, journal, None, out, None)


def line(result: Mapping[str, Any]) -> str:
    """One result in one line."""
    score = "no published answers" if result["score"] is None else f"{result['score']:.4f}"
    parts = [(name, part["score"]) for name, part in result.get("groups", {}).items() if part["n_scored"]]
    groups = "".join(f", {name} {value:.4f}" for name, value in parts)
    return (
        f"{result['task']} ({result['condition']} image): {result['metric']} {score}{groups}, "
        f"n={result['n']}, {result['time']['seconds']:.1f} s"
    )


def _parts(config: EvalConfig, prepared: Prepared) -> Iterator[tuple[str, TaskConfig, Condition, list[Question]]]:
    for name, (task, questions) in prepared.items():
        for condition in config.conditions:
            yield name, task, condition, under(condition, questions, config.seed)


def _stem(out: Path, name: str, condition: Condition, config: EvalConfig) -> Path:
    return results.paths(out, name, condition, config.limit)[0].with_suffix("")


def _settings(config: EvalConfig, task: TaskConfig, condition: Condition, facts: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in config.decoding.items() if key != TARGET}
    decoding = {"method": config.method, **values}
    return {
        **task.describe(decoding), **facts, "source": dict(task.source), "seed": config.seed, "ranks": config.ranks,
        "condition": condition.value,
    }  # fmt: skip


def _result(
    config: EvalConfig, name: str, task: TaskConfig, condition: Condition, asked: list[Question], journal: Journal,
    respondent: Respondent | None, out: Path, peak_gib: Callable[[], float] | None,
) -> dict[str, Any]:  # fmt: skip
    outcomes = task.answer(asked, Remembering(respondent, journal, range(len(asked)), config.batch_size))
    seconds, before = journal.spent(config.ranks)
    timing = {
        "seconds": round(seconds, 3),
        "questions_per_second": round((len(asked) - before) / max(seconds, 1e-9), 2),
    }
    if peak_gib is not None:
        timing["peak_memory_gib"] = round(peak_gib(), 3)
    if before:
        timing["answered_before"] = before
    facts = {"aggregate": task.aggregate(asked, outcomes), **journal.settings, "time": timing}
    groups = [task.group(item) for item in asked]
    submission = task.submission(asked, outcomes)
    result = results.write(out, name, condition, asked, outcomes, facts, groups, config.limit, submission)
    journal.remove()
    return result
