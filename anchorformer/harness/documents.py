"""What the task files of `python -m evals.harness` call: from a line of its JSON to images and text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from anchorformer.images import open_image


def to_visual(document: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a question, in order.

    Raises:
        UserError: one is missing, damaged or too large.
    """
    return [open_image(Path(path)) for path in document["images"]]


def to_text(document: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> str:
    """The question with everything that the native evaluation puts behind it, and no placeholders.

    Args:
        options: per model in lmms-eval's own tasks; these questions are written out already.
    """
    return str(document["question"])
