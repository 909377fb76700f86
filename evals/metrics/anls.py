"""Changes when the DocVQA score does: average normalised Levenshtein similarity of one answer."""

from __future__ import annotations

from collections.abc import Sequence

VARIANT = "anls (lmms-eval, VLMEvalKit): threshold 0.5 inclusive, lengths of the raw upper-cased strings"
THRESHOLD = 0.5


def anls(prediction: str, references: Sequence[str]) -> float:
    """Similarity of a prediction to the nearest of its references, 0 below the threshold.

    The distance is taken between lower-cased texts with runs of white space collapsed, the length it is divided by
    between the texts as they came; both follow lmms-eval, whose values the field quotes (metric after Biten et al.
    2019, "Scene Text Visual Question Answering").

    Returns:
        0, or a value in [0.5, 1].
    """
    score = 1.0 - min(_normalised_distance(prediction, reference) for reference in references)
    return score if score >= THRESHOLD else 0.0


def _normalised_distance(prediction: str, reference: str) -> float:
    distance = edit_distance(" ".join(prediction.lower().split()), " ".join(reference.lower().split()))
    # upper() because it can lengthen a text ("ß" becomes "SS"), and the quoted values contain that.
    length = max(len(reference.upper()), len(prediction.upper()))
    return distance / length if length else 0.0


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance over code points (insert, delete, replace; each costs 1)."""
    if len(left) < len(right):
        left, right = right, left
    row = list(range(len(right) + 1))
    for i, char in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            replaced = diagonal + (char != other)
            diagonal = row[j]
            row[j] = min(replaced, diagonal + 1, row[j - 1] + 1)
    return row[-1]
