"""Changes when MME is scored otherwise: perception and cognition, two questions per image (Fu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.metrics import MetricName
from evals.metrics.mme import Judged, mme_scores
from evals.questions import Question
from evals.submission import Outcome
from evals.tasks.base import AnswerTask


@dataclass(frozen=True, kw_only=True)
class MmeTask(AnswerTask):
    """MME: per subtask accuracy over questions plus accuracy over images, and their sums.

    The score is the plain share of right answers; papers quote `aggregate.perception` (of 2000) or `aggregate.total`.
    """

    metric: MetricName = MetricName.mme
    max_new_tokens: int = 16

    def aggregate(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> dict[str, Any]:
        return dict(
            mme_scores(
                Judged(item.meta["kind"], item.meta["image"], outcome.score == 1.0)
                for item, outcome in zip(questions, outcomes, strict=True)
            )
        )
