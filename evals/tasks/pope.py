"""Changes when POPE is scored otherwise: hallucinated objects as yes-or-no questions (Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.metrics import MetricName
from evals.metrics.pope import READERS, pope_scores
from evals.questions import Question
from evals.submission import Outcome
from evals.tasks.base import AnswerTask


@dataclass(frozen=True, kw_only=True)
class PopeTask(AnswerTask):
    """POPE: accuracy, precision, recall and F1 of "yes" in each category, and their means over the categories."""

    metric: MetricName = MetricName.pope
    max_new_tokens: int = 16

    def aggregate(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> dict[str, Any]:
        read = READERS[self._definition[0]]
        by_category: dict[str, list[tuple[str, str | None]]] = {}
        for item, outcome in zip(questions, outcomes, strict=True):
            pair = (item.references[0], read(outcome.prediction or ""))
            by_category.setdefault(item.meta["kind"], []).append(pair)
        scores = {category: pope_scores(pairs) for category, pairs in by_category.items()}
        rates = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        return scores | {f"mean_{name}": sum(each[name] for each in scores.values()) / len(scores) for name in rates}
