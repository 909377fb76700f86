"""From a request of lmms-eval to turns and images, and from its generation_kwargs to `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError
from anchorformer.writer import Turns

MAX_NEW_TOKENS = 1024
"""Of an answer whose task names no limit, as lmms-eval's own models have it."""


class Asked(NamedTuple):
    """One question: turns with placeholders, and their images."""

    turns: Turns
    images: list[Image.Image]


def from_text(text: str, visuals: Sequence[Any] | None) -> Asked:
    """The simple form: images stand in front unless the text says where.

    Raises:
        UserError: visuals that are no images, or some placeholders but not one for each.
    """
    images = [_image(visual) for visual in visuals or ()]
    marked = text.count(PLACEHOLDER)
    if images and not marked:
        text = f"{PLACEHOLDER}\n" * len(images) + text
    elif images and marked != len(images):
        raise UserError(
            "placeholders and images do not match", found=f"{marked} {PLACEHOLDER}, {len(images)} image(s)",
            expected=f"one {PLACEHOLDER} for each image, or none at all", remedy="correct the task's doc_to_text",
        )  # fmt: skip
    return Asked((("user", text),), images)


def _image(visual: Any) -> Image.Image:
    if isinstance(visual, Image.Image):
        return visual
    raise UserError(
        "this model looks at images only", found=f"{type(visual).__name__} {str(visual)[:60]!r}",
        expected="images that the task has opened (PIL)",
        remedy="choose a task of images; video and audio are not read",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is generated.

    Attributes:
        arguments: of `generate`.
        until: texts that end an answer and are cut from it.
    """

    arguments: dict[str, Any]
    until: tuple[str, ...]

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Decoding:
        """Of a task's generation_kwargs; what is none of ours (image_aspect_ratio and the like) is left out.

        Temperature 0, none at all, or `do_sample: false` is greedy. An empty text ends nothing.
        """
        temperature = float(options.get("temperature") or 0)
        arguments: dict[str, Any] = {
            "max_new_tokens": int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
            "num_beams": int(options.get("num_beams") or 1),
            "do_sample": temperature > 0 and bool(options.get("do_sample", True)),
        }
        if arguments["do_sample"]:
            arguments |= {"temperature": temperature, "top_p": options.get("top_p") or 1.0}
        until = options.get("until") or ()
        return cls(arguments, tuple(filter(None, [until] if isinstance(until, str) else until)))

    def cut(self, text: str) -> str:
        """The text up to the first of what ends it, without white space around it."""
        return text[: min(_places(text, self.until), default=len(text))].strip()


def _places(text: str, wanted: Iterable[str]) -> list[int]:
    return [place for end in wanted if (place := text.find(end)) >= 0]
