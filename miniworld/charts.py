"""Charts: bars, pies and lines with named colours instead of a legend, stand-ins for ChartQA."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from miniworld.pictures import COLORS, SIZE, Question, jitter

TRENDS = ("rising", "falling", "flat")
WEAK = 0.35
"""Share of charts asked for the largest, the smallest or a comparison, which models this small hardly learn."""

_BASE, _LEFT, _UNIT = 87, 17, 9
_FONT = ImageFont.load_default_imagefont()


@dataclass(frozen=True, slots=True)
class Bars:
    """Two to five bars of different whole heights from 1 to 9."""

    values: tuple[tuple[str, int], ...]

    @property
    def caption(self) -> str:
        return "a bar chart: " + ", ".join(f"{color} {value}" for color, value in self.values) + "."

    def draw(self, rng: random.Random) -> Image.Image:
        image, pen = _paper(rng)
        for tick in (3, 6, 9):
            y = _BASE - tick * _UNIT
            pen.line((_LEFT, y, SIZE, y), fill=(205, 205, 205))
            pen.text((6, y - 6), str(tick), fill=(40, 40, 40), font=_FONT)
        pitch = (SIZE - _LEFT - 4) / len(self.values)
        for index, (color, value) in enumerate(self.values):
            x = _LEFT + 4 + index * pitch
            box = (round(x), _BASE - value * _UNIT, round(x + pitch * 0.7), _BASE)
            pen.rectangle(box, fill=jitter(COLORS[color], rng))
        pen.line((_LEFT, 4, _LEFT, _BASE, SIZE, _BASE), fill=(40, 40, 40))
        return image

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [Question("chart/value", f"what is the value of {color}?", str(value)) for color, value in self.values]
        asked.append(Question("chart/count", "how many bars are there?", str(len(self.values)), reasoning=True))
        if rng.random() < WEAK:
            tallest = max(self.values, key=lambda pair: pair[1])[0]
            shortest = min(self.values, key=lambda pair: pair[1])[0]
            (first, height), (second, other) = rng.sample(self.values, 2)
            asked.append(
                rng.choice(
                    [
                        Question("chart/most", "which bar is the tallest?", tallest, reasoning=True),
                        Question("chart/least", "which bar is the shortest?", shortest, reasoning=True),
                        Question(
                            "chart/compare",
                            f"is {first} taller than {second}?",
                            "yes" if height > other else "no",
                            reasoning=True,
                        ),
                    ]
                )
            )
        return _shuffled(asked, "bar", rng)


@dataclass(frozen=True, slots=True)
class Pie:
    """Two to five slices in multiples of ten per cent, clockwise from the top, largest and smallest unique."""

    shares: tuple[tuple[str, int], ...]

    @property
    def caption(self) -> str:
        return "a pie chart: " + ", ".join(f"{color} {share}" for color, share in self.shares) + "."

    def draw(self, rng: random.Random) -> Image.Image:
        image, pen = _paper(rng)
        x, y, radius = 48 + rng.randint(-4, 4), 48 + rng.randint(-4, 4), rng.randint(36, 40)
        start = -90.0
        for color, share in self.shares:
            end = start + share * 3.6
            box = (x - radius, y - radius, x + radius, y + radius)
            pen.pieslice(box, start, end, fill=jitter(COLORS[color], rng), outline=(250, 250, 250))
            start = end
        return image

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [Question("chart/percent", f"what percent is {color}?", str(share)) for color, share in self.shares]
        asked.append(Question("chart/count", "how many slices are there?", str(len(self.shares)), reasoning=True))
        if rng.random() < WEAK:
            largest = max(self.shares, key=lambda pair: pair[1])[0]
            smallest = min(self.shares, key=lambda pair: pair[1])[0]
            asked.append(
                rng.choice(
                    [
                        Question("chart/most", "which slice is the largest?", largest, reasoning=True),
                        Question("chart/least", "which slice is the smallest?", smallest, reasoning=True),
                    ]
                )
            )
        return _shuffled(asked, "pie", rng)


@dataclass(frozen=True, slots=True)
class Lines:
    """One to three lines that rise, fall or stay flat."""

    trends: tuple[tuple[str, str], ...]

    @property
    def caption(self) -> str:
        return "a line chart: " + ", ".join(f"{color} {trend}" for color, trend in self.trends) + "."

    def draw(self, rng: random.Random) -> Image.Image:
        image, pen = _paper(rng)
        for y in (15, 39, 63):
            pen.line((6, y, SIZE, y), fill=(215, 215, 215))
        pen.line((6, 4, 6, _BASE, SIZE, _BASE), fill=(40, 40, 40))
        for color, trend in self.trends:
            low, high = rng.randint(58, 80), rng.randint(10, 32)
            middle = rng.randint(20, 70)
            first, last = {"rising": (low, high), "falling": (high, low), "flat": (middle, middle)}[trend]
            wobble = 1 if trend == "flat" else 4
            points = [
                (10 + step * 20, first + (last - first) * step / 4 + rng.randint(-wobble, wobble)) for step in range(5)
            ]
            pen.line(points, fill=jitter(COLORS[color], rng), width=3)
        return image

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [Question("chart/trend", f"what is the trend of {color}?", trend) for color, trend in self.trends]
        asked.append(Question("chart/count", "how many lines are there?", str(len(self.trends)), reasoning=True))
        return _shuffled(asked, "line", rng)


def sample(rng: random.Random) -> Bars | Pie | Lines:
    """Half bars, 30 % pies, 20 % lines."""
    kind = rng.random()
    if kind < 0.5:
        count = rng.randint(2, 5)
        return Bars(tuple(zip(rng.sample(tuple(COLORS), count), rng.sample(range(1, 10), count), strict=True)))
    if kind < 0.8:
        shares = _shares(rng)
        return Pie(tuple(zip(rng.sample(tuple(COLORS), len(shares)), shares, strict=True)))
    count = rng.randint(1, 3)
    return Lines(tuple((color, rng.choice(TRENDS)) for color in rng.sample(tuple(COLORS), count)))


def _shares(rng: random.Random) -> list[int]:
    while True:
        cuts = sorted(rng.sample(range(10, 100, 10), rng.randint(1, 4)))
        shares = [right - left for left, right in zip([0, *cuts], [*cuts, 100], strict=True)]
        if shares.count(max(shares)) == 1 and shares.count(min(shares)) == 1:
            return shares


def _paper(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    shade = rng.randint(238, 255)
    image = Image.new("RGB", (SIZE, SIZE), (shade, shade, shade))
    return image, ImageDraw.Draw(image)


def _shuffled(asked: list[Question], kind: str, rng: random.Random) -> list[Question]:
    if rng.random() < 0.3:
        asked.append(Question("chart/kind", "what kind of chart is this?", kind))
    rng.shuffle(asked)
    return asked
