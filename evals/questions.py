"""What is asked: records turned into questions, and the same questions with a wrong image or with none."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from anchorformer.errors import UserError
from data.record import ImageRef, Record, Role
from evals.config import Condition

_PLACEHOLDER = re.compile(r"<image>\n?|\n?<image>")


@dataclass(frozen=True, slots=True)
class Question:
    """One question to the model.

    Attributes:
        id: of the record.
        turns: (role, text) up to the turn that is to be answered, placeholders included.
        images: in the order of the placeholders.
        references: accepted answers; empty where the split is published without them.
        meta: facts of the record that results are grouped by.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[ImageRef, ...]
    references: tuple[str, ...]
    meta: dict[str, str]


def question(record: Record) -> Question:
    """The record as a question for its last answer; earlier turns stay as the conversation so far.

    Raises:
        UserError: nobody asks anything in the record.
    """
    turns = tuple((turn.role.value, turn.text) for turn in record.turns)
    answer = turns[-1][1] if turns and turns[-1][0] == Role.assistant.value else None
    asked = turns if answer is None else turns[:-1]
    if not asked or asked[-1][0] != Role.user.value:
        raise UserError(
            f"record {record.id} asks nothing",
            found=[role for role, _ in turns],
            expected="a turn of the user, then at most one answer",
            remedy="correct the record or leave it out of the task",
        )
    references = record.references or (() if answer is None else (answer,))
    return Question(record.id, asked, record.images, references, dict(record.meta))


def under(condition: Condition, questions: Sequence[Question], seed: int) -> list[Question]:
    """The same questions with the image that the condition gives them.

    `shuffled` passes the task's distinct images (compared by content) round one random cycle, so that no question
    keeps its own and every image is still shown; questions about one image all get the same other one.

    Raises:
        UserError: `shuffled` with fewer than two distinct images.
    """
    if condition is Condition.right:
        return list(questions)
    if condition is Condition.none:
        return [replace(item, images=(), turns=_without_placeholders(item.turns)) for item in questions]
    digests = {ref: _digest(ref) for item in questions for ref in item.images}
    distinct = {digest: ref for ref, digest in digests.items()}
    if len(distinct) < 2:
        raise UserError(
            "there is no other image to show",
            found=f"{len(distinct)} distinct image(s) in the task",
            expected="2 or more for conditions=shuffled",
            remedy="raise limit, or leave `shuffled` out",
        )
    order = sorted(distinct)
    random.Random(seed).shuffle(order)
    other = {digest: distinct[order[(i + 1) % len(order)]] for i, digest in enumerate(order)}
    return [replace(item, images=tuple(other[digests[ref]] for ref in item.images)) for item in questions]


def _without_placeholders(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((role, _PLACEHOLDER.sub("", text)) for role, text in turns)


def _digest(ref: ImageRef) -> str:
    content = ref.data if ref.data is not None else ref.path.read_bytes() if ref.path is not None else b""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
