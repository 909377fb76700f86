"""Changes when the DocVQA score does: average normalised Levenshtein similarity of one answer."""

from __future__ import annotations

from collections.abc import Sequence

from evals.metrics.base import Definition

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


def anls_pix2struct(prediction: str, references: Sequence[str]) -> float:
    """Texts lower-cased only, and the threshold itself counts as too far (google-research/pix2struct)."""
    distances = [_distance_over_longer(prediction.lower(), reference.lower()) for reference in references]
    return max(1.0 - distance if distance < THRESHOLD else 0.0 for distance in distances)


def anls_llava(prediction: str, references: Sequence[str]) -> float:
    """Texts lower-cased and stripped, white space inside kept (haotian-liu/LLaVA, evaluation of ST-VQA)."""
    scores = [1.0 - _distance_over_longer(prediction.lower().strip(), text.lower().strip()) for text in references]
    return max(score if score >= THRESHOLD else 0.0 for score in scores)


def _normalised_distance(prediction: str, reference: str) -> float:
    distance = edit_distance(" ".join(prediction.lower().split()), " ".join(reference.lower().split()))
    # upper() because it can lengthen a text ("ß" becomes "SS"), and the quoted values contain that.
    length = max(len(reference.upper()), len(prediction.upper()))
    return distance / length if length else 0.0


def _distance_over_longer(left: str, right: str) -> float:
    # Where both are empty the public implementations divide by zero; equal texts are no distance apart.
    return edit_distance(left, right) / max(len(left), len(right), 1)


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


DEFINITIONS = {
    "lmms_eval": Definition(
        anls, "anls (lmms-eval, VLMEvalKit): threshold 0.5 inclusive, lengths of the raw upper-cased strings"
    ),
    "pix2struct": Definition(anls_pix2struct, "anls (pix2struct): lower-cased only, threshold 0.5 exclusive"),
    "llava": Definition(anls_llava, "anls (LLaVA, ST-VQA): lower-cased and stripped, threshold 0.5 inclusive"),
}
