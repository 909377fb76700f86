"""Changes when the ChartQA score does: numbers may be off by five per cent, anything else must match."""

from __future__ import annotations

from collections.abc import Sequence

VARIANT = "relaxed accuracy (lmms-eval, pix2struct): 5 %, years included, no stripping"
TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction matches any of its references, else 0 (Methani et al. 2020, "PlotQA"; Masry et al. 2022).

    Two numbers match within 5 % of the reference; a reference of zero, or anything that is not a number, must be equal
    but for case.
    """
    return float(any(_matches(prediction, reference) for reference in references))


def _matches(prediction: str, reference: str) -> bool:
    predicted, expected = _number(prediction), _number(reference)
    if predicted is not None and expected:
        # Relative error, then the comparison: the other order rounds differently at exactly 5 %.
        return abs(predicted - expected) / abs(expected) <= TOLERANCE
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
