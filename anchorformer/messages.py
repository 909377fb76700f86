"""Reads conversations in the form that other libraries pass around: messages whose content lists texts and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError
from anchorformer.images import open_image

Messages = Sequence[Mapping[str, Any]]
"""{"role": ..., "content": text, or a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}}."""


def read_messages(messages: Messages) -> tuple[list[tuple[str, str]], list[Image.Image]]:
    """Turns and images of a conversation; the items of one message stand on lines of their own.

    An image is an opened one, or names a file of this machine (as `image`, `path` or `url`), which is opened within the
    usual limits. Nothing is fetched.

    Raises:
        UserError: a message without role or content, an item that is neither text nor image, an image outside the
            user's turns, an address instead of a file, or a file that `open_image` refuses.
    """
    turns: list[tuple[str, str]] = []
    images: list[Image.Image] = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise _unreadable(f"{message!r:.80}", "a message with role and content")
        content = message["content"]
        lines = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            match item:
                case {"type": "text", "text": str(text)}:
                    lines.append(text)
                case (
                    {"type": "image", "image": source}
                    | {"type": "image", "path": source}
                    | {"type": "image", "url": source}
                ):
                    if message["role"] != "user":
                        raise _unreadable(f"an image in the turn of {message['role']!r}", "images in the user's turns")
                    images.append(_open(source))
                    lines.append(PLACEHOLDER)
                case _:
                    raise _unreadable(f"{item!r:.80}", "text, or an image with its `image` or `path`")
        turns.append((message["role"], "\n".join(lines)))
    return turns, images


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | Path):
        raise _unreadable(f"an image given as {type(source).__name__}", "an opened image, or the path of one")
    name = str(source)
    if "://" in name or name.startswith("data:"):
        raise UserError(
            "images are not fetched", found=name[:80], expected="an opened image, or a file of this machine",
            remedy="download the image and pass its path, or open it and pass that",
        )  # fmt: skip
    return open_image(Path(name))


def _unreadable(found: str, expected: str) -> UserError:
    return UserError(
        "a conversation cannot be read", found=found, expected=expected,
        remedy='pass messages like {"role": "user", "content": [{"type": "image", "image": image}, '
        '{"type": "text", "text": "What is this?"}]}',
    )  # fmt: skip
