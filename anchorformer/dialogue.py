"""Turns as a record has them, and the dialogue that they are for every template: who asks what, over which images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchorformer.errors import UserError

PLACEHOLDER = "<image>"
"""What stands for an image in a record's text, whatever the image token is called."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A user's turn, cut at its placeholders (n images make n + 1 pieces), and the answer to it (None: not yet)."""

    pieces: tuple[str, ...]
    answer: str | None

    @property
    def num_images(self) -> int:
        return len(self.pieces) - 1


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A record's turns after the rules that hold for every template."""

    system: str | None
    exchanges: tuple[Exchange, ...]

    @property
    def num_images(self) -> int:
        return sum(exchange.num_images for exchange in self.exchanges)


def read_turns(turns: Sequence[tuple[str, str]], num_images: int, sample_id: str) -> Dialogue:
    """Pairs user's and assistant's turns: an assistant who speaks first is not heard (LLaVA's published rule).

    Placeholders count in users' turns only. A record without images has none: there `<image>` is ordinary text, as it
    always is in an answer.

    Raises:
        UserError: unknown role, no user's turn, two turns of one speaker in a row, or other than `num_images`
            placeholders.
    """
    speech = [(str(getattr(role, "value", role)), text) for role, text in turns]
    system = speech.pop(0)[1] if speech and speech[0][0] == "system" else None
    if speech and speech[0][0] == "assistant":
        speech.pop(0)
    roles = [role for role, _ in speech]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise UserError(
            f"{sample_id}: the turns do not alternate", found=", ".join(roles) or "no user's turn",
            expected="user, assistant, user, assistant, ... after an optional system turn",
            remedy="correct the record",
        )  # fmt: skip
    texts = [text for _, text in speech]
    users, answers = texts[::2], [*texts[1::2], *[None] * (len(texts) % 2)]
    exchanges = tuple(
        Exchange(tuple(user.split(PLACEHOLDER)) if num_images else (user,), answer)
        for user, answer in zip(users, answers, strict=True)
    )
    dialogue = Dialogue(system, exchanges)
    if dialogue.num_images != num_images:
        raise UserError(
            f"{sample_id}: placeholders and images do not match",
            found=f"{dialogue.num_images} {PLACEHOLDER} in the user's turns, {num_images} image(s)",
            expected="one placeholder for each image", remedy="correct the record, or leave it out",
        )  # fmt: skip
    return dialogue
