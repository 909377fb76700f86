"""Changes when the MME scores do: two questions per image, per subtask accuracy of both kinds (Fu et al. 2023)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from evals.metrics.base import Definition, equal_label

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
BEGINNING = 4
"""Characters in which a yes or no is looked for, where the answer is more than that word."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One question of MME: its subtask, its image, and whether it was answered rightly."""

    subtask: str
    image: str
    is_right: bool


def yes_or_no(prediction: str) -> str | None:
    """Of the lower-cased answer without full stops: yes, no, y, n, or the word in its beginning; else None.

    "know" is a no, and "The answer is yes" is neither (lmms-eval).
    """
    text = prediction.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _in_beginning(text)


def yes_or_no_official(prediction: str) -> str | None:
    """Of the lower-cased answer as it is (the benchmark's own calculation)."""
    return _in_beginning(prediction.lower())


def _in_beginning(text: str) -> str | None:
    return next((word for word in ("yes", "no") if word in text[:BEGINNING]), None)


def mme_scores(judged: Iterable[Judged]) -> dict[str, float]:
    """Per subtask 100 x (share of questions + share of images with both right), and their sums.

    Returns:
        subtask -> value in [0, 200], and `perception` (at most 2000), `cognition` (at most 800) and `total` over the
        subtasks that occur. Published totals are of one or of both kinds: compare like with like.
    """
    answers: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for item in judged:
        answers[item.subtask][item.image].append(item.is_right)
    scores = {subtask: _both_accuracies(images) for subtask, images in answers.items()}
    sums = {
        kind: sum(scores[name] for name in names if name in scores)
        for kind, names in {"perception": PERCEPTION, "cognition": COGNITION}.items()
        if any(name in scores for name in names)
    }
    return scores | sums | {"total": sum(sums.values())}


def _both_accuracies(images: dict[str, list[bool]]) -> float:
    questions = [is_right for rights in images.values() for is_right in rights]
    return 100 * sum(questions) / len(questions) + 100 * sum(map(all, images.values())) / len(images)


DEFINITIONS = {
    "lmms_eval": Definition(equal_label(yes_or_no), "MME (lmms-eval): y and n count, full stops and margins do not"),
    "official": Definition(equal_label(yes_or_no_official), "MME (its calculation): yes or no in 4 characters"),
}
