"""The same questions with the right image, with a wrong one, and with none."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anchorformer.errors import UserError
from data.images import locate
from data.record import ImageRef
from evals.config import Condition
from evals.questions import Question

_PLACEHOLDER = re.compile(r"<image>\n?|\n?<image>")


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
    source = locate(ref)
    if isinstance(source, Path) and not source.is_file():
        raise UserError(
            f"{source}: no such image",
            found="no file",
            expected="an image",
            remedy="fetch the images of this task; `python -m data scan` lists all missing ones",
        )
    return hashlib.blake2b(source.read_bytes() if isinstance(source, Path) else source, digest_size=16).hexdigest()
