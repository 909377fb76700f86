"""What can be wrong with one image or one record; the list of defects that scan knows."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from PIL import Image

from anchorformer.errors import UserError
from anchorformer.images import FORMATS, MAX_PIXELS, open_image
from data.images import locate
from data.record import ImageRef, Record, Role
from data.sources.local import IMAGE

SUFFIXES = {
    ".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".png": ("PNG",), ".gif": ("GIF",), ".webp": ("WEBP",),
    ".bmp": ("BMP",), ".tif": ("TIFF",), ".tiff": ("TIFF",),
}  # fmt: skip
"""File name suffix -> formats that may hide behind it."""

PLAIN_MODES = ("RGB", "RGBA", "L", "P", "1", "LA")
"""Pixel formats that convert to RGB without surprises."""

TINY = 8
"""Pixels of a side below which an image says next to nothing."""

ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""


class Defect(str, Enum):
    """Kinds of findings; the first group makes a record unusable as it is, the second is only reported."""

    missing = "image missing"
    outside = "image outside its root"
    unreadable = "image unreadable"
    oversized = "image oversized"
    mismatch = "<image> count mismatch"
    refused = "refused by the processor"
    no_targets = "nothing supervised"
    too_long = "too long"

    shortened = "answer shortened"
    mislabelled = "suffix and format differ"
    duplicate_id = "duplicate id"
    duplicate_image = "duplicate image"
    empty_answer = "empty answer"
    rotated = "EXIF rotation (not applied)"
    animated = "several frames (first is used)"
    mode = "unusual pixel format"
    tiny = "tiny image"

    @property
    def is_bad(self) -> bool:
        """Whether training would refuse the record, leave it out, or train on text that speaks of a lost image."""
        return self in _BAD


_BAD = {
    Defect.missing, Defect.outside, Defect.unreadable, Defect.oversized, Defect.mismatch, Defect.refused,
    Defect.no_targets, Defect.too_long,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """A defect and what was seen, in a few words."""

    defect: Defect
    detail: str


def examine_image(ref: ImageRef) -> tuple[list[Finding], str | None]:
    """Opens and decodes an image.

    Returns:
        What is wrong with it, and a hash of its bytes (None where there are none) for finding duplicates.
    """
    try:
        place = locate(ref)
    except UserError as error:
        return [Finding(Defect.outside, error.found)], None
    try:
        content = place.read_bytes() if isinstance(place, Path) else place
    except OSError as error:
        return [Finding(Defect.missing, error.strerror or str(error))], None
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        image = open_image(content)
    except UserError as error:
        return [Finding(Defect.oversized if _is_oversized(content) else Defect.unreadable, error.found)], digest
    return list(_oddities(image, ref.path)), digest


def examine_record(record: Record) -> list[Finding]:
    """What can be told from a record without a processor and without opening its images."""
    findings = []
    placeholders = sum(turn.text.count(IMAGE) for turn in record.turns if turn.role is Role.user)
    # A record without any image is counted too: training reads its `<image>` as text, as the published code does, but
    # an image that was lost looks the same.
    if placeholders != len(record.images):
        findings.append(Finding(Defect.mismatch, f"{placeholders} {IMAGE}, {len(record.images)} image(s)"))
    if any(turn.role is Role.assistant and not turn.text.strip() for turn in record.turns):
        findings.append(Finding(Defect.empty_answer, "only its stop is supervised"))
    findings += [Finding(Defect.duplicate_id, value) for key, value in record.meta if key == "duplicate_of"]
    return findings


def _oddities(image: Image.Image, path: Path | None) -> Iterator[Finding]:
    suffix = path.suffix.lower() if path is not None else ""
    if suffix in SUFFIXES and image.format not in SUFFIXES[suffix]:
        yield Finding(Defect.mislabelled, f"{image.format} under {suffix}")
    orientation = image.getexif().get(ORIENTATION, 1)
    if orientation != 1:
        yield Finding(Defect.rotated, f"orientation {orientation}")
    if getattr(image, "n_frames", 1) > 1:
        yield Finding(Defect.animated, f"{getattr(image, 'n_frames', 1)} frames")
    if image.mode not in PLAIN_MODES:
        yield Finding(Defect.mode, image.mode)
    if min(image.size) < TINY:
        yield Finding(Defect.tiny, f"{image.width} x {image.height}")


def _is_oversized(content: bytes) -> bool:
    """Whether the header alone already says more pixels than are opened."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            return max(header.size) ** 2 > MAX_PIXELS
    except Image.DecompressionBombError:
        return True
    except (OSError, SyntaxError, ValueError):
        return False
