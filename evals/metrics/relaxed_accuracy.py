"""Changes when the ChartQA score does: numbers may be off by five per cent, anything else must match."""

from __future__ import annotations

from collections.abc import Sequence

from evals.metrics.base import Definition

TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction matches any of its references, else 0 (Methani et al. 2020, "PlotQA"; Masry et al. 2022).

    Two numbers match within 5 % of the reference; a reference of zero, or anything that is not a number, must be equal
    but for case.
    """
    return float(any(_matches(prediction, reference) for reference in references))


def relaxed_accuracy_stripped(prediction: str, references: Sequence[str]) -> float:
    """The same without white space around the prediction (VLMEvalKit)."""
    return relaxed_accuracy(prediction.strip(), references)


def relaxed_accuracy_strict_years(prediction: str, references: Sequence[str]) -> float:
    """The same, but a reference that reads as a year (four digits, 1000 to 2999) must be hit exactly."""
    return float(any(_matches(prediction, text) for text in references if not _is_year(text) or prediction == text))


def _matches(prediction: str, reference: str) -> bool:
    predicted, expected = _number(prediction), _number(reference)
    if predicted is not None and expected:
        # Relative error, then the comparison: the other order rounds differently at exactly 5 %.
        return abs(predicted - expected) / abs(expected) <= TOLERANCE
    return prediction.lower() == reference.lower()


def _is_year(text: str) -> bool:
    return len(text) == 4 and text.isascii() and text.isdigit() and text[0] in "12"


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


DEFINITIONS = {
    "lmms_eval": Definition(
        relaxed_accuracy, "relaxed accuracy (lmms-eval, pix2struct): 5 %, years included, no stripping"
    ),
    "vlmevalkit": Definition(relaxed_accuracy_stripped, "relaxed accuracy (VLMEvalKit): 5 %, prediction stripped"),
    "strict_years": Definition(
        relaxed_accuracy_strict_years, "relaxed accuracy, ours and not published: 5 %, but years must be equal"
    ),
}
