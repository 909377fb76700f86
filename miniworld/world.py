"""The endless world: picture number i of a domain and a split, the same for everybody who asks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from PIL import Image

from miniworld import charts, documents, scenes
from miniworld.pictures import Picture, Question

DOMAINS: dict[str, Callable[[random.Random], Picture]] = {
    "scene": scenes.sample,
    "chart": charts.sample,
    "doc": documents.sample,
}
HELD_OUT_SHARE = 10
"""One in this many contents belongs to the held-out split."""


class Split(str, Enum):
    train = "train"
    val = "val"


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture of the world; `key` alone decides everything about it."""

    domain: str
    key: str
    picture: Picture

    @property
    def caption(self) -> str:
        return self.picture.caption

    def draw(self) -> Image.Image:
        return self.picture.draw(random.Random(f"{self.key}:pixels"))

    def questions(self) -> list[Question]:
        return self.picture.questions(random.Random(f"{self.key}:questions"))


def entry(domain: str, split: Split, stream: str, index: int, seed: int = 0) -> Entry:
    """Picture `index` of an independent stream of pictures of one domain.

    Args:
        stream: name of the user of the pictures; two streams of one split share contents only by chance.
    """
    key = f"{seed}:{split.value}:{stream}:{domain}:{index}"
    rng = random.Random(key)
    while True:
        picture = DOMAINS[domain](rng)
        if belongs_to(picture.caption) is split:
            return Entry(domain, key, picture)


def belongs_to(caption: str) -> Split:
    """The split of a content. It depends on what is shown and on nothing else, so no held-out picture can have been
    trained on, whatever the streams and seeds: not by the connector, not by the tiny backbones."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
    return Split.val if int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0 else Split.train
