"""What one picture of the mini world is: a description that can be drawn, captioned and asked about."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

SIZE = 96
"""Width and height of every picture, in pixels: 8 x 8 patches of 12."""

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (220, 30, 30),
    "green": (34, 150, 60),
    "blue": (34, 74, 220),
    "yellow": (235, 210, 20),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "cyan": (40, 205, 220),
    "black": (22, 22, 26),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a picture and its only answer.

    Attributes:
        template: groups questions of one kind in reports.
        reasoning: whether the answer must be worked out (counted, compared) instead of read off.
    """

    template: str
    text: str
    answer: str
    reasoning: bool = False


class Picture(Protocol):
    """A sampled description; the image itself is drawn only where somebody needs the pixels."""

    @property
    def caption(self) -> str:
        """Everything there is to know, in one sentence; two pictures with equal captions show the same thing."""
        ...

    def draw(self, rng: random.Random) -> Image.Image:
        """The (96, 96) RGB image; `rng` varies what the caption does not tell (exact colours, small shifts)."""
        ...

    def questions(self, rng: random.Random) -> list[Question]:
        """Questions in random order; weak kinds are left out at random so that they do not crowd the others."""
        ...


def jitter(color: RGB, rng: random.Random, by: int = 14) -> RGB:
    """The colour moved by at most `by` per channel."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-by, by))) for channel in color)
    return red, green, blue
