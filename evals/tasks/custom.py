"""Changes when one's own questions are scored otherwise: several metrics at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.metrics import METRICS, MetricName
from evals.metrics.base import Definition
from evals.questions import Question
from evals.submission import Outcome
from evals.tasks.base import AnswerTask


@dataclass(frozen=True, kw_only=True)
class CustomTask(AnswerTask):
    """Short answers to questions about images, from a file of one's own; the score is that of `metric`."""

    metric: MetricName = MetricName.exact_match
    max_new_tokens: int = 32
    further: tuple[MetricName, ...] = ()
    """Metrics whose means are in `aggregate`, beside that of `metric`."""

    @property
    def scored_by(self) -> dict[MetricName, Definition]:
        return {**{name: METRICS[name].named(None)[1] for name in self.further}, **super().scored_by}

    def aggregate(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> dict[str, Any]:
        pairs = [
            (outcome.prediction or "", item.references)
            for item, outcome in zip(questions, outcomes, strict=True)
            if item.references
        ]
        if not pairs:
            return {}
        scores = {name: METRICS[name].named(None)[1].score for name in self.further}
        return {name.value: sum(score(*pair) for pair in pairs) / len(pairs) for name, score in scores.items()}
