"""The scores of single answers, by the name a config gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from evals.metrics import anls as _anls
from evals.metrics import exact_match as _exact_match
from evals.metrics import relaxed_accuracy as _relaxed_accuracy


class MetricName(str, Enum):
    anls = "anls"
    relaxed_accuracy = "relaxed_accuracy"
    exact_match = "exact_match"


@dataclass(frozen=True, slots=True)
class Metric:
    """A score of one answer.

    Attributes:
        score: prediction and accepted references (at least one) to a value in [0, 1].
        variant: which of the published definitions this is, for the result file.
    """

    score: Callable[[str, Sequence[str]], float]
    variant: str


METRICS = {
    MetricName.anls: Metric(_anls.anls, _anls.VARIANT),
    MetricName.relaxed_accuracy: Metric(_relaxed_accuracy.relaxed_accuracy, _relaxed_accuracy.VARIANT),
    MetricName.exact_match: Metric(_exact_match.exact_match, _exact_match.VARIANT),
}
