"""Changes when the quality of alignment is measured otherwise: loss per token of the right text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anchorformer.errors import UserError
from evals.questions import Question
from evals.submission import Outcome
from evals.tasks.base import GREEDY, Respondent, TaskConfig


@dataclass(frozen=True, kw_only=True)
class CaptionLossTask(TaskConfig):
    """Mean negative log likelihood per supervised token, in nats; lower is better.

    With the wrong image (`shuffled`) the loss of a model that looks at its image rises.
    """

    def answer(self, questions: Sequence[Question], respondent: Respondent) -> list[Outcome]:
        for item in questions:
            if not item.references:
                raise UserError(
                    f"record {item.id} has no text to be judged by",
                    found="no answer",
                    expected="an answer in every record",
                    remedy="take a split whose answers are published",
                )
        # Weighted by tokens, so that the mean over questions is the mean over tokens.
        return [Outcome(None, loss / max(count, 1), count) for loss, count in respondent.answer_losses(questions)]

    def describe(self, decoding: Mapping[str, Any] = GREEDY) -> dict[str, Any]:
        return {
            "metric": "loss_per_token",
            "metric_variant": "mean negative log likelihood (nats) over supervised tokens; lower is better",
            "decoding": {"method": "teacher forcing"},
        }
