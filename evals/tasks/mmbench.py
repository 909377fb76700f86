"""Changes when MMBench is scored otherwise: a question counts where every turn of its options is answered rightly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.metrics import MetricName
from evals.questions import Question
from evals.submission import Outcome
from evals.tasks.base import AnswerTask


@dataclass(frozen=True, kw_only=True)
class MmbenchTask(AnswerTask):
    """MMBench dev (Liu et al. 2023): the score is the share of all asked turns; `aggregate.circular` is what is quoted.

    Letters are read by rule (`choice`), where the published toolkit asks a judge about answers that are none.
    """

    metric: MetricName = MetricName.choice
    max_new_tokens: int = 8

    def aggregate(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> dict[str, Any]:
        turns: dict[str, list[bool]] = defaultdict(list)
        for item, outcome in zip(questions, outcomes, strict=True):
            if outcome.score is not None:
                turns[item.meta["index"]].append(outcome.score == 1.0)
        if not turns:
            return {}
        first = sum(rights[0] for rights in turns.values())
        circular = sum(map(all, turns.values()))
        return {"questions": len(turns), "vanilla": first / len(turns), "circular": circular / len(turns)}
