"""Changes when short-answer questions are scored otherwise: any source, a metric by name."""

from __future__ import annotations

from dataclasses import dataclass

from evals.metrics import MetricName
from evals.tasks.base import AnswerTask


@dataclass(frozen=True, kw_only=True)
class VqaTask(AnswerTask):
    """Short answers to questions about images, from any source of `data.sources`."""

    metric: MetricName = MetricName.exact_match
    max_new_tokens: int = 16
