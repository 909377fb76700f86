"""Scenes: one to four coloured shapes on a light ground, stand-ins for photographs."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from miniworld.pictures import COLORS, RGB, SIZE, Question, jitter

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 8, "large": 13}
"""Half the width of a shape, in pixels."""
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))


@dataclass(frozen=True, slots=True)
class Thing:
    shape: str
    color: str
    size: str
    place: str


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in reading order; neither a shape nor a colour occurs twice, so each names one thing."""

    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        # The shape comes first: every attribute then follows its key, the direction in which a small causal language
        # model looks things up well.
        return "a scene: " + ", ".join(f"{t.shape} {t.color} {t.size} {t.place}" for t in self.things) + "."

    def draw(self, rng: random.Random) -> Image.Image:
        ground = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(215, 255))
        image = Image.new("RGB", (SIZE, SIZE), ground)
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            row, column = divmod(PLACES.index(thing.place), 3)
            radius = SIZES[thing.size]
            x = column * 32 + 16 + rng.randint(-2, 2)
            y = row * 32 + 16 + rng.randint(-2, 2)
            _draw_shape(pen, thing.shape, x, y, radius, jitter(COLORS[thing.color], rng))
        return image

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [Question("scene/count", "how many objects are there?", str(len(self.things)), reasoning=True)]
        for t in self.things:
            asked.append(Question("scene/color", f"what color is the {t.shape}?", t.color))
            asked.append(Question("scene/shape", f"what shape is {t.color}?", t.shape))
            asked.append(Question("scene/where", f"where is the {t.shape}?", t.place))
            asked.append(Question("scene/size", f"what size is the {t.shape}?", t.size))
        asked.append(self._existence(rng))
        rng.shuffle(asked)
        return asked

    def _existence(self, rng: random.Random) -> Question:
        thing = rng.choice(self.things)
        color, answer = thing.color, "yes"
        if rng.random() < 0.5:
            # Half of the negatives use a colour that is in the picture, on another thing: seeing the colour alone
            # must not be enough.
            present = [t.color for t in self.things if t is not thing]
            absent = [name for name in COLORS if name not in {t.color for t in self.things}]
            color = rng.choice(present if present and rng.random() < 0.5 else absent)
            answer = "no"
        return Question("scene/exists", f"is there a {color} {thing.shape}?", answer, reasoning=True)


def sample(rng: random.Random) -> Scene:
    count = rng.randint(1, 4)
    places = sorted(rng.sample(range(len(PLACES)), count))
    return Scene(
        tuple(
            Thing(shape, color, rng.choice(tuple(SIZES)), PLACES[place])
            for shape, color, place in zip(
                rng.sample(SHAPES, count), rng.sample(tuple(COLORS), count), places, strict=True
            )
        )
    )


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, color: RGB) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=color)
    elif shape == "star":
        points = [
            (x + math.sin(i * math.pi / 5) * length, y - math.cos(i * math.pi / 5) * length)
            for i in range(10)
            for length in [radius * (1.15 if i % 2 == 0 else 0.45)]
        ]
        pen.polygon(points, fill=color)
    elif shape == "cross":
        arm = max(2, radius // 3)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
    else:
        pen.ellipse(box, outline=color, width=max(3, radius // 3))
