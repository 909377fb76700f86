"""The scores of single answers, by the name a config gives them."""

from __future__ import annotations

from enum import Enum

from evals.metrics import anls, choice, exact_match, mme, pope, relaxed_accuracy, vqa_accuracy
from evals.metrics.base import Metric


class MetricName(str, Enum):
    anls = "anls"
    relaxed_accuracy = "relaxed_accuracy"
    exact_match = "exact_match"
    vqa_accuracy = "vqa_accuracy"
    choice = "choice"
    pope = "pope"
    mme = "mme"

    @classmethod
    def _missing_(cls, value: object) -> MetricName | None:
        """The names that people type."""
        return {"exact": cls.exact_match, "relaxed": cls.relaxed_accuracy}.get(str(value))


METRICS = {
    MetricName.anls: Metric(anls.DEFINITIONS),
    MetricName.relaxed_accuracy: Metric(relaxed_accuracy.DEFINITIONS),
    MetricName.exact_match: Metric(exact_match.DEFINITIONS),
    MetricName.vqa_accuracy: Metric(vqa_accuracy.DEFINITIONS),
    MetricName.choice: Metric(choice.DEFINITIONS),
    MetricName.pope: Metric(pope.DEFINITIONS),
    MetricName.mme: Metric(mme.DEFINITIONS),
}
