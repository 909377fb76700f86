"""Which steps of a run are traced, as `profile=step:10-12` says it; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from anchorformer.errors import UserError

FORM = re.compile(r"step:([0-9]+)(?:-([0-9]+))?")


@dataclass(frozen=True)
class Span:
    """Optimizer steps from `first` to `last`, both among them; the first step of a run is 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """
        Raises:
            UserError: no span of steps, or one that ends before it begins.
        """
        match = FORM.fullmatch(text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(
                "profile names no steps", found=f"profile={text}",
                expected="step:N or step:N-M, with 1 <= N <= M", remedy="e.g. profile=step:10-12",
            )  # fmt: skip
        return cls(first, last)

    def check(self, total_steps: int) -> None:
        """
        Raises:
            UserError: a run of so many steps does not have them all.
        """
        if self.last > total_steps:
            raise UserError(
                "profile names steps that the run does not have", found=f"profile=step:{self}",
                expected=f"steps from 1 to {total_steps}",
                remedy=f"e.g. profile=step:{min(10, total_steps)}",
            )  # fmt: skip

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
