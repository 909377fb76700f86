"""Changes when DocVQA is scored otherwise: ANLS over the published questions (Mathew et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from evals.metrics import MetricName
from evals.tasks.base import AnswerTask


@dataclass(frozen=True, kw_only=True)
class DocvqaTask(AnswerTask):
    """DocVQA by ANLS; on the test split, whose answers are not published, only predictions are written."""

    metric: MetricName = MetricName.anls
    max_new_tokens: int = 32
