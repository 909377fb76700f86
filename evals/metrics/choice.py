"""Changes when a letter is told from an answer to a multiple-choice question otherwise: ScienceQA, MMBench."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data.choices import LETTERS
from evals.metrics.base import Definition, equal_label

SENTENCE = re.compile(r"The answer is ([A-Z]).")


def letter_lmms(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer is a reference's letter in any case, or begins with it and a full stop (lmms-eval)."""
    text = prediction.strip()
    return float(any(text.lower() == letter.lower() or text[:2] == f"{letter}." for letter in references))


def letter_of(prediction: str) -> str | None:
    """The letter of LLaVA's evaluation: alone, before ". ", or in "The answer is X."; None for anything else."""
    if len(prediction) == 1 and prediction in LETTERS:
        return prediction
    if prediction[:1] in LETTERS and prediction[1:3] == ". ":
        return prediction[:1]
    found = SENTENCE.findall(prediction)
    return found[0] if len(found) == 1 else None


DEFINITIONS = {
    "lmms_eval": Definition(letter_lmms, "choice (lmms-eval, ScienceQA): the letter, or the capital and a full stop"),
    "llava": Definition(equal_label(letter_of), "choice (LLaVA, ScienceQA): 'A', 'A. ...', 'The answer is A.'"),
}
