"""What is asked: records turned into questions."""

from __future__ import annotations

from dataclasses import dataclass

from anchorformer.errors import UserError
from data.record import ImageRef, Record, Role


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
