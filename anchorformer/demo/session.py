"""What one question shows: the answer as it comes, then pictures, figures and what to keep in mind about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from anchorformer.answering import Answer
from anchorformer.demo.choices import choices, follows_anchors, nearest, trained_with
from anchorformer.demo.overlay import draw_anchors, draw_attention
from anchorformer.demo.seeing import Sight, see
from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError
from anchorformer.images import open_image
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.opening import Opened
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.reselect import with_selector

MAX_PIXELS = 2**24
"""Largest square that an image from the browser is padded to."""
KEPT = 4
"""Selectors that stay built; each holds buffers only, the weights are shared."""

HEADERS = ["selector", "T", "image tokens", "first, ms", "all, ms", "tokens", "image, %", "answer"]
"""Of the figures, one line per question: milliseconds to the first token and to the last; tokens of the answer; share
of its attention that went to the image."""
Row = list[str | int | float]


@dataclass(frozen=True)
class Shown:
    """The state of an answer; pictures, figures and note come with its last piece."""

    text: str
    anchors: Image.Image | None = None
    attention: Image.Image | None = None
    row: Row | None = None
    note: str = ""


class Session:
    """A model, and what may stand before its connector."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.choices = choices(opened.model)
        self.trained_with = trained_with(opened.model)
        self._built = lru_cache(KEPT)(self._build)

    def ask(
        self, path: str | None, question: str, selector: str, count: int, *, max_new_tokens: int = 128
    ) -> Iterator[Shown]:
        """
        Args:
            path: of the image.
            selector: one of `choices`.
            count: T; the nearest one that the selector can give is taken.

        Raises:
            UserError: no image or a bad one, no question, no such selector, or what `Answer` raises.
        """
        if not path or not question.strip():
            raise UserError(
                "there is nothing to answer", found="no image" if not path else "no question",
                expected="an image and a question about it", remedy="choose or upload one, and ask",
            )  # fmt: skip
        if selector not in self.choices:
            raise UserError(
                "no such selector", found=selector, expected=", ".join(self.choices), remedy="choose one of these"
            )
        count = nearest(self.choices[selector], count)
        image = open_image(Path(path), name="the image", max_pixels=MAX_PIXELS)
        model, processor = self._built(selector, count)
        turns = [("user", f"{PLACEHOLDER}\n{question.strip()}")]
        answer = Answer(model, processor, turns, [image], max_new_tokens=max_new_tokens)
        for _ in answer:
            yield Shown(answer.text)
        sight = see(model, answer)
        yield Shown(
            answer.text, draw_anchors(sight), draw_attention(sight), self._row(selector, count, model, answer, sight),
            self.note(selector, count, sight),
        )  # fmt: skip

    def note(self, selector: str, count: int, sight: Sight) -> str:
        """What has to be known to read the pictures."""
        name, trained = self.trained_with
        told = []
        if (selector, count) != (name, trained):
            told.append(f"The connector was trained with `{name}`, T = {trained}, and meets `{selector}`, T = {count}, "
                        "for the first time.")  # fmt: skip
        if self.choices[selector][count].ragged:
            told.append(f"`{selector}` gives every image as many anchors as it shows something, at most T.")
        if sight.heads_BP is None:
            told.append(f"`{selector}` merges patches: none is an anchor.")
        elif sight.num_heads == 1:
            told.append(f"`{selector}` does not choose head by head: all anchors have one colour.")
        if not follows_anchors(self._opened.model):
            told.append("This connector has queries of its own: its embeddings stand for no anchors, so the answer's "
                        "attention to them has no place in the image, and T and selector change nothing.")  # fmt: skip
        if self._opened.model.integration is not None:
            told.append("What layers see of all visual tokens beside the embeddings (the integration) is in neither "
                        "picture.")  # fmt: skip
        if sight.cls_share is not None:
            told.append(
                f"Of the answer's attention {sight.cls_share:.1%} went to [CLS], which has no place in the image."
            )
        return " ".join(told)

    def _build(self, selector: str, count: int) -> tuple[AnchorFormerForConditionalGeneration, AnchorFormerProcessor]:
        return with_selector(self._opened.model, self._opened.processor, self.choices[selector][count])

    @staticmethod
    def _row(
        selector: str, count: int, model: AnchorFormerForConditionalGeneration, answer: Answer, sight: Sight
    ) -> Row:  # fmt: skip
        image_tokens = int((answer.inputs["input_ids"] == model.image_token_id).sum())
        first = answer.first_token_s or 0.0
        return [
            selector, count, image_tokens, round(1000 * first, 1), round(1000 * answer.seconds, 1), len(answer.ids),
            round(100 * sight.image_share, 1), answer.text,
        ]  # fmt: skip
