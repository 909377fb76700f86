"""How an evaluation lies on disk: predictions as JSON lines, the score with everything that decided it as JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.config import Condition
from evals.questions import Question
from evals.submission import Outcome

SUBMISSIONS = "submissions"
"""Folder of the files for servers and judges, which are no results."""


def paths(out: Path, task: str, condition: Condition, limit: int | None = None) -> tuple[Path, Path]:
    """Predictions and result of one task under one condition; those of a part of the task have names of their own."""
    name = f"{task}-{condition.value}" + ("" if limit is None else f"-limit{limit}")
    return out / f"{name}.jsonl", out / f"{name}.json"


def summarise(outcomes: Sequence[Outcome], groups: Sequence[str | None]) -> dict[str, Any]:
    """Weighted mean over everything that has a score, and over each group with the plain mean of the groups.

    Returns:
        n, n_scored, score (None where nothing has one), and where there are groups: groups (name -> n_scored, score)
        and mean_of_groups.
    """
    names = sorted({group for group in groups if group is not None})
    parts = {
        name: _mean([outcome for outcome, group in zip(outcomes, groups, strict=True) if group == name])
        for name in names
    }
    summary = {"n": len(outcomes), **_mean(outcomes)}
    if parts:
        scores = [part["score"] for part in parts.values() if part["score"] is not None]
        summary |= {"groups": parts, "mean_of_groups": sum(scores) / len(scores) if scores else None}
    return summary


def write(
    out: Path,
    task: str,
    condition: Condition,
    questions: Sequence[Question],
    outcomes: Sequence[Outcome],
    facts: Mapping[str, Any],
    groups: Sequence[str | None],
    limit: int | None,
    submission: Any = None,
) -> dict[str, Any]:
    """Writes predictions, then the result that names their hash; each is complete or absent.

    Args:
        submission: the predictions as a server takes them, written beside them unless it is None.
        limit: how many questions were asked at most; a full result is never replaced by one of a part.

    Returns:
        The result, as written.
    """
    out.mkdir(parents=True, exist_ok=True)
    predictions, result = paths(out, task, condition, limit)
    result.unlink(missing_ok=True)  # an old score must not stand beside new predictions
    rows = (
        {
            "id": item.id,
            "prompt_sha256": prompt_digest(item),
            "prediction": outcome.prediction,
            "references": list(item.references),
            "score": outcome.score,
            "weight": outcome.weight,
            "group": group,
        }
        for item, outcome, group in zip(questions, outcomes, groups, strict=True)
    )
    digest = _replace(predictions, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if submission is not None:
        text = json.dumps(submission, indent=1, ensure_ascii=False)
        place = out / SUBMISSIONS / result.name
        place.parent.mkdir(exist_ok=True)
        _replace(place, [text + "\n"])
    content = {
        "task": task,
        "condition": condition.value,
        "limit": limit,
        **summarise(outcomes, groups),
        "predictions": predictions.name,
        "predictions_sha256": digest,
        "first_prompt": [list(turn) for turn in questions[0].turns],
        **facts,
    }
    _replace(result, [json.dumps(content, indent=2, ensure_ascii=False) + "\n"])
    return content


def prompt_digest(item: Question) -> str:
    """Names what was asked: roles and texts, before the template."""
    return hashlib.sha256(json.dumps(item.turns, ensure_ascii=False).encode()).hexdigest()[:16]


def _mean(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    scored = [(outcome.score, outcome.weight) for outcome in outcomes if outcome.score is not None]
    total = sum(weight for _, weight in scored)
    score = sum(score * weight for score, weight in scored) / total if total else None
    return {"n_scored": len(scored), "score": score}


def _replace(path: Path, lines: Iterable[str]) -> str:
    """Writes beside the place and moves into it; returns the SHA-256 of what was written."""
    digest, beside = hashlib.sha256(), path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(line)
            digest.update(line.encode())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return digest.hexdigest()
