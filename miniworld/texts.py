"""What the tiny Llama reads: the world in words, as conversations in which a caption stands where an image will."""

from __future__ import annotations

import random
from collections.abc import Sequence

from miniworld.world import DOMAINS, Entry, Split, entry

DESCRIBE = "describe the image."
"""The instruction of every caption record."""

MAX_TURNS = 6


def looking_up(item: Entry) -> str:
    """A caption and questions about it, rendered as the chat template renders them."""
    asked = item.questions()[:MAX_TURNS]
    return converse([(question.text, question.answer) for question in asked], opening=item.caption)


def repeating(item: Entry) -> str:
    """A caption to be described, that is, repeated."""
    return converse([(DESCRIBE, item.caption)], opening=item.caption)


def captioning(item: Entry) -> str:
    """A caption twice with nothing between, as the `plain` template shows an image and its caption."""
    return f"<bos>{item.caption}{item.caption}\n"


def babbling(words: Sequence[str], rng: random.Random) -> str:
    """Random words to be repeated; nothing but copying predicts them."""
    babble = " ".join(rng.sample(words, rng.randint(5, 20)))
    return f"<bos><user> {babble}<asst> {babble}<eos>"


def converse(turns: Sequence[tuple[str, str]], opening: str = "") -> str:
    """Question and answer pairs; `opening` precedes the first question on a line of its own."""
    first = f"{opening}\n" if opening else ""
    rendered = "".join(
        f"<user>{first if index == 0 else ''}{question}<asst> {answer}<eos>"
        for index, (question, answer) in enumerate(turns)
    )
    return f"<bos>{rendered}"


def training_item(index: int, seed: int) -> Entry:
    """Entry `index` of the text stream: the domains take turns."""
    domain = tuple(DOMAINS)[index % len(DOMAINS)]
    return entry(domain, Split.train, "llama", index, seed)
