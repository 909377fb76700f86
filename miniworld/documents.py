"""Documents: receipts and forms in a fixed-width bitmap font, stand-ins for DocVQA."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from miniworld.pictures import SIZE, Question

SHOPS = (
    "grand", "nova", "kiosk", "happy", "delta", "corner", "metro", "sunny",
    "royal", "harbor", "lucky", "prime", "orbit", "maple", "union", "vista",
)  # fmt: skip
ITEMS = ("tea", "milk", "bread", "corn", "juice", "cake", "eggs", "rice", "salt", "soap", "fish", "nuts")
NAMES = (
    "anna", "bob", "emma", "gina", "hugo", "jack", "kate", "leo",
    "mary", "nina", "oscar", "paul", "rosa", "sam", "tina", "vera",
)  # fmt: skip
CITIES = (
    "berlin", "cairo", "delhi", "lima", "miami", "oslo", "paris", "perth", "quito", "rome", "seoul", "tokyo",
)  # fmt: skip
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

# Characters are 6 x 11 pixels; on a 6 x 12 grid each patch of 12 x 12 pixels holds exactly two of one line.
_COLUMN, _ROW = 6, 12
_FONT = ImageFont.load_default_imagefont()


@dataclass(frozen=True, slots=True)
class Receipt:
    """A shop, two to four items with prices from 1 to 9, and their sum."""

    shop: str
    items: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(price for _, price in self.items)

    @property
    def caption(self) -> str:
        lines = ", ".join(f"{item} {price}" for item, price in self.items)
        return f"a receipt: shop {self.shop}, {lines}, total {self.total}."

    def draw(self, rng: random.Random) -> Image.Image:
        image, pen, ink = _paper(rng)
        left = rng.choice((0, 2, 4))
        top = rng.randint(0, 8 - (len(self.items) + 2))
        _write(pen, left + 2, top, self.shop, ink)
        for row, (item, price) in enumerate(self.items, start=top + 1):
            _write(pen, left, row, f"{item:8}{price}", ink)
        row = top + 1 + len(self.items)
        pen.line((left * _COLUMN, row * _ROW - 1, (left + 12) * _COLUMN, row * _ROW - 1), fill=ink)
        _write(pen, left, row, f"{'total':8}{self.total}", ink)
        return image

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [
            Question("doc/total", "what is the total?", str(self.total)),
            Question("doc/shop", "what is the shop?", self.shop),
            Question("doc/count", "how many items are there?", str(len(self.items)), reasoning=True),
        ]
        asked += [Question("doc/price", f"how much is the {item}?", str(price)) for item, price in self.items]
        rng.shuffle(asked)
        return asked


@dataclass(frozen=True, slots=True)
class Form:
    """Name, city, date and id of a person, in any order."""

    fields: tuple[tuple[str, str], ...]

    @property
    def caption(self) -> str:
        return "a form: " + ", ".join(f"{key} {value}" for key, value in self.fields) + "."

    def draw(self, rng: random.Random) -> Image.Image:
        image, pen, ink = _paper(rng)
        left = rng.choice((0, 2))
        spacing = rng.choice((1, 2))
        top = rng.randint(0, 8 - (spacing * (len(self.fields) - 1) + 1))
        for index, (key, value) in enumerate(self.fields):
            _write(pen, left, top + index * spacing, f"{key + ':':6}{value}", ink)
        return image

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [Question(f"doc/{key}", f"what is the {key}?", value) for key, value in self.fields]
        rng.shuffle(asked)
        return asked


def sample(rng: random.Random) -> Receipt | Form:
    if rng.random() < 0.5:
        items = rng.sample(ITEMS, rng.randint(2, 4))
        return Receipt(rng.choice(SHOPS), tuple((item, rng.randint(1, 9)) for item in items))
    fields = [
        ("name", rng.choice(NAMES)),
        ("city", rng.choice(CITIES)),
        ("date", f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"),
        ("id", str(rng.randint(10, 99))),
    ]
    rng.shuffle(fields)
    return Form(tuple(fields))


def _paper(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int, int]]:
    shade, dark = rng.randint(236, 255), rng.randint(10, 60)
    image = Image.new("RGB", (SIZE, SIZE), (shade, shade, shade))
    return image, ImageDraw.Draw(image), (dark, dark, dark)


def _write(pen: ImageDraw.ImageDraw, column: int, row: int, text: str, ink: tuple[int, int, int]) -> None:
    pen.text((column * _COLUMN, row * _ROW), text, fill=ink, font=_FONT)
