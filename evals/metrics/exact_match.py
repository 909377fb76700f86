"""Changes when equality of short answers does: same text but for case and ASCII punctuation."""

from __future__ import annotations

import string
from collections.abc import Sequence

from evals.metrics.base import Definition

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction equals any of its references after both are normalised, else 0."""
    return float(_normalise(prediction) in {_normalise(reference) for reference in references})


def exact_match_llava(prediction: str, references: Sequence[str]) -> float:
    """1 where the lower-cased prediction without full stops at its end equals a reference as it is written.

    What LLaVA's conversion for GQA does before the official script, of which equality is assumed.
    """
    return float(prediction.rstrip(".").lower() in references)


def _normalise(text: str) -> str:
    return text.lower().translate(_DELETE_PUNCTUATION)


DEFINITIONS = {
    "lmms_eval": Definition(
        exact_match, "exact match (lmms-eval): case and ASCII punctuation ignored, white space not"
    ),
    "llava": Definition(exact_match_llava, "exact match (LLaVA, GQA): prediction lower-cased, final full stops gone"),
}
