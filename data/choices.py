"""How the options of a multiple-choice question are lettered, where it is asked and where it is scored."""

from __future__ import annotations

from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"


def lettered(options: Sequence[str]) -> list[str]:
    """One line per option: "A. cat"; at most as many as there are letters."""
    return [f"{LETTERS[place]}. {option}" for place, option in enumerate(options)]
