"""What came of the questions, and the files that the servers and judges of benchmarks take it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from evals.questions import Question


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one question.

    Attributes:
        prediction: the generated answer, stripped; None where nothing is generated.
        score: None where the split has no published answers.
        weight: what the score counts in the mean.
    """

    prediction: str | None
    score: float | None
    weight: float = 1.0


class Layout(str, Enum):
    """Whose layout: every one is a JSON file."""

    docvqa = "docvqa"
    """A list of questionId and answer (rrc.cvc.uab.es)."""
    vqav2 = "vqav2"
    """A list of question_id and answer (EvalAI)."""
    vizwiz = "vizwiz"
    """A list of image and answer (EvalAI)."""
    mm_vet = "mm_vet"
    """Question id to answer (the judge of MM-Vet)."""


def laid_out(layout: Layout, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> Any:
    """The predictions in that layout, in the order of the questions."""
    pairs = [(item.id, outcome.prediction or "") for item, outcome in zip(questions, outcomes, strict=True)]
    if layout is Layout.mm_vet:
        return dict(pairs)
    key = {Layout.docvqa: "questionId", Layout.vqav2: "question_id", Layout.vizwiz: "image"}[layout]
    # Numbers go back as the numbers that the published questions hold.
    return [{key: int(name) if name.isdecimal() else name, "answer": answer} for name, answer in pairs]
