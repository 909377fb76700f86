"""What a metric is: a score of single answers under one or several published definitions, the first of them ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from anchorformer.errors import UserError


@dataclass(frozen=True, slots=True)
class Definition:
    """One published way to compute a score.

    Attributes:
        score: prediction and accepted references (at least one) to a value in [0, 1].
        text: what tells it from the others, for the result file.
        least: references that a question needs, if it has any: with fewer no answer could be worth a full point.
    """

    score: Callable[[str, Sequence[str]], float]
    text: str
    least: int = 1


@dataclass(frozen=True, slots=True)
class Metric:
    """A score by the definitions that exist of it; quoted values are only comparable under one and the same."""

    definitions: Mapping[str, Definition]

    @property
    def default(self) -> str:
        return next(iter(self.definitions))

    def named(self, variant: str | None) -> tuple[str, Definition]:
        """The definition of that name, or the default one.

        Raises:
            UserError: there is none of that name.
        """
        name = self.default if variant is None else variant
        if name not in self.definitions:
            raise UserError(
                "no such definition of this metric",
                found=f"variant={variant!r}",
                expected=f"one of {list(self.definitions)}, the first is the default",
                remedy="leave it out, or name another one",
            )
        return name, self.definitions[name]


def equal_label(read: Callable[[str], str | None]) -> Callable[[str, Sequence[str]], float]:
    """The score of answers that are first read as a label (yes, no, a letter): 1 where it is one of the references."""
    return lambda prediction, references: float(read(prediction) in references)
