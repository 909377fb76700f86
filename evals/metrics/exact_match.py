"""Changes when equality of short answers does: same text but for case and ASCII punctuation."""

from __future__ import annotations

import string
from collections.abc import Sequence

VARIANT = "exact match (lmms-eval): case and ASCII punctuation ignored, white space not"
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction equals any of its references after both are normalised, else 0."""
    return float(_normalise(prediction) in {_normalise(reference) for reference in references})


def _normalise(text: str) -> str:
    return text.lower().translate(_DELETE_PUNCTUATION)
