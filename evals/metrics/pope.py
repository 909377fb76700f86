"""Changes when the POPE scores do: yes or no, and how often which of them is right (Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable

from evals.metrics.base import Definition, equal_label
from evals.metrics.vqa_accuracy import without_punctuation

NEGATIONS = {"No", "not", "no"}


def yes_or_no(prediction: str) -> str:
    """`no` where a word of the first sentence is No, no or not as written, else `yes` (LLaVA).

    So "NO", "nope" and the empty answer are a yes; values that the field quotes are made this way.
    """
    words = prediction.split(".", 1)[0].replace(",", "").split(" ")
    return "yes" if NEGATIONS.isdisjoint(words) else "no"


def yes_or_no_as_written(prediction: str) -> str:
    """The whole answer, lower-cased and stripped: "yes." is neither (lmms-eval)."""
    return prediction.lower().strip()


def yes_or_no_among_words(prediction: str) -> str | None:
    """The one of the words yes and no that occurs; None for both or neither (VLMEvalKit)."""
    found = {"yes", "no"}.intersection(without_punctuation(prediction.lower()).split())
    return found.pop() if len(found) == 1 else None


def pope_scores(pairs: Iterable[tuple[str, str | None]]) -> dict[str, float]:
    """Counts and rates over (label, what was read from the prediction), `yes` being positive.

    Anything else than yes and no is wrong, and neither positive nor negative.

    Returns:
        TP, FP, TN, FN; accuracy, precision, recall, f1 and the share of predictions that are yes. A rate of nothing
        is 0, where LLaVA's script divides by zero.
    """
    pairs = list(pairs)
    counts = {
        name: sum(pair == wanted for pair in pairs)
        for name, wanted in {
            "TP": ("yes", "yes"), "FP": ("no", "yes"), "TN": ("no", "no"), "FN": ("yes", "no"),
        }.items()
    }  # fmt: skip
    hits, said_yes = counts["TP"], counts["TP"] + counts["FP"]
    precision, recall = _rate(hits, said_yes), _rate(hits, counts["TP"] + counts["FN"])
    return counts | {
        "accuracy": _rate(hits + counts["TN"], len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _rate(2 * precision * recall, precision + recall),
        "yes_ratio": _rate(said_yes, len(pairs)),
    }


def _rate(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


READERS = {"llava": yes_or_no, "lmms_eval": yes_or_no_as_written, "vlmevalkit": yes_or_no_among_words}
DEFINITIONS = {
    "llava": Definition(equal_label(yes_or_no), "POPE (LLaVA): no, No or not in the first sentence, else yes"),
    "lmms_eval": Definition(equal_label(yes_or_no_as_written), "POPE (lmms-eval): the whole answer, case ignored"),
    "vlmevalkit": Definition(equal_label(yes_or_no_among_words), "POPE (VLMEvalKit): exactly one of the words yes, no"),
}
