"""What every task is: a config that says what is asked, and how the answers become a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from anchorformer.errors import UserError
from anchorformer.schema import Schema, parse_plugin
from data.sources.base import PACKAGE as SOURCES
from data.sources.base import SourceConfig
from evals.metrics import METRICS, MetricName
from evals.metrics.base import Definition
from evals.questions import Question, question
from evals.submission import Layout, Outcome, laid_out

PACKAGE = "evals.tasks"
GREEDY = {"method": "greedy"}


class Respondent(Protocol):
    """The model as a task sees it."""

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Answers, in the order of the questions."""
        ...

    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        """Summed negative log likelihood (nats) and number of supervised tokens of each first reference."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Schema):
    """Base of all task configs; a new task subclasses it in its own file and adds one YAML to conf/eval."""

    source: dict[str, Any]
    """Plug-in of `data.sources`: the records, with the prompt's suffix."""

    def questions(self, name: str, root: Path, cache_dir: Path, limit: int | None) -> list[Question]:
        """The records as questions, or `limit` of them spread evenly: neighbours often share an image or a kind.

        Raises:
            UserError: what opening the source raises, and a record that asks nothing.
        """
        place = f"tasks.{name}.source"
        remedy = f"correct {place} on the command line or in conf/eval/{name}.yaml"
        config = parse_plugin(SourceConfig, self.source, SOURCES, place, remedy)
        source = config.open(name, root, cache_dir)
        source.check_records()
        count = len(source) if limit is None else min(limit, len(source))
        return [question(source[index * len(source) // count]) for index in range(count)]

    def answer(self, questions: Sequence[Question], respondent: Respondent) -> list[Outcome]:
        """One outcome per question."""
        raise NotImplementedError

    def group(self, item: Question) -> str | None:
        """Name of the part of the task that this question is also reported under: what its record calls its kind."""
        return item.meta.get("kind")

    def aggregate(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What the answers come to beside their mean, for the result file."""
        return {}

    def submission(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> Any:
        """The predictions as the benchmark's server or judge takes them (a JSON value); None where there is none."""
        return None

    def describe(self, decoding: Mapping[str, Any] = GREEDY) -> dict[str, Any]:
        """Metric, its variant and decoding, for the result file; a metric called `loss...` is better when lower.

        Args:
            decoding: how the evaluation generates answers, where the task lets it.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AnswerTask(TaskConfig):
    """Base of the tasks that let the model answer and score the text."""

    metric: MetricName
    variant: str | None = None
    """Which published definition of the metric; null is the one that this project's scores are quoted in."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    """Longest answer."""
    submit: Layout | None = None
    """Also write the predictions in the layout of this benchmark's server or judge."""

    def __post_init__(self) -> None:
        METRICS[self.metric].named(self.variant)  # a wrong name is an error of the config

    @property
    def _definition(self) -> tuple[str, Definition]:
        return METRICS[self.metric].named(self.variant)

    @property
    def scored_by(self) -> dict[MetricName, Definition]:
        """The definitions that answers are scored by."""
        return {self.metric: self._definition[1]}

    def questions(self, name: str, root: Path, cache_dir: Path, limit: int | None) -> list[Question]:
        """As every task's.

        Raises:
            UserError: also a question with fewer references than a metric needs.
        """
        questions = super().questions(name, root, cache_dir, limit)
        for metric, definition in self.scored_by.items():
            for item in questions:
                if 0 < len(item.references) < definition.least:
                    raise UserError(
                        f"tasks.{name}: record {item.id} has too few answers for {metric.value}",
                        found=f"{len(item.references)} answer(s)",
                        expected=f"{definition.least} or more, with fewer even a right answer is no full point",
                        remedy="name another metric, such as exact_match, or a file with the answers of more people",
                    )
        return questions

    def answer(self, questions: Sequence[Question], respondent: Respondent) -> list[Outcome]:
        score = self._definition[1].score
        texts = respondent.answers(questions, self.max_new_tokens)
        return [
            Outcome(text, score(text, item.references) if item.references else None)
            for text, item in zip(texts, questions, strict=True)
        ]

    def submission(self, questions: Sequence[Question], outcomes: Sequence[Outcome]) -> Any:
        return None if self.submit is None else laid_out(self.submit, questions, outcomes)

    def describe(self, decoding: Mapping[str, Any] = GREEDY) -> dict[str, Any]:
        name, definition = self._definition
        return {
            "metric": self.metric.value,
            "variant": name,
            "metric_variant": definition.text,
            "decoding": {**decoding, "max_new_tokens": self.max_new_tokens},
        }
