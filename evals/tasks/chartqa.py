"""Changes when ChartQA is scored otherwise: relaxed accuracy, by who wrote the question (Masry et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from evals.metrics import MetricName
from evals.tasks.base import AnswerTask


@dataclass(frozen=True, kw_only=True)
class ChartqaTask(AnswerTask):
    """ChartQA by relaxed accuracy: over all questions, and by the kind of question (human, augmented) apart."""

    metric: MetricName = MetricName.relaxed_accuracy
    max_new_tokens: int = 16
