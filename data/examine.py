"""Looks at one image or one record for what `data.verdicts` lists."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from anchorformer.errors import UserError
from anchorformer.images import DECODING_ERRORS, FORMATS, MAX_PIXELS, open_image, read_image
from data.images import locate
from data.record import ImageRef, Record, Role
from data.sources.local import IMAGE
from data.verdicts import Defect

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

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Characters that no text needs; tab and line ends are none of them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A defect and what was seen, in a few words."""

    defect: Defect
    detail: str


def examine_image(ref: ImageRef) -> tuple[list[Finding], str | None]:
    """Opens and decodes an image.

    Returns:
        What is wrong with it, and a hash of its bytes (None where there are none) for finding duplicates.

    Raises:
        UserError: it lies in a shard that cannot be read.
    """
    try:
        place = locate(ref)
    except UserError as error:
        if ref.stored is not None:  # what cannot be fetched has not been looked at
            raise
        return [Finding(Defect.outside, error.found)], None
    try:
        content = read_image(place) if isinstance(place, Path) else place
    except OSError as error:
        defect = Defect.missing if isinstance(error, FileNotFoundError) else Defect.unreadable
        return [Finding(defect, error.strerror or str(error))], None
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
    if placeholders != len(record.images):
        defect = Defect.mismatch if record.images else Defect.imageless
        findings.append(Finding(defect, f"{placeholders} {IMAGE}, {len(record.images)} image(s)"))
    if any(turn.role is Role.assistant and not turn.text.strip() for turn in record.turns):
        findings.append(Finding(Defect.empty_answer, "only its stop is supervised"))
    controls = [character for turn in record.turns for character in CONTROL.findall(turn.text)]
    if controls:
        findings.append(Finding(Defect.control, f"{len(controls)}, the first {controls[0]!r}"))
    findings += [Finding(Defect.duplicate_id, value) for key, value in record.meta if key == "duplicate_of"]
    return findings


def _oddities(image: Image.Image, path: Path | None) -> Iterator[Finding]:
    suffix = path.suffix.lower() if path is not None else ""
    if suffix in SUFFIXES and image.format not in SUFFIXES[suffix]:
        yield Finding(Defect.mislabelled, f"{image.format} under {suffix}")
    orientation = _told(lambda: image.getexif().get(ORIENTATION))
    if orientation != 1:
        yield Finding(Defect.rotated, f"orientation {orientation}")
    frames = _told(lambda: getattr(image, "n_frames", 1))
    if frames > 1:
        yield Finding(Defect.animated, f"{frames} frames")
    if image.mode not in PLAIN_MODES:
        yield Finding(Defect.mode, image.mode)
    if min(image.size) < TINY:
        yield Finding(Defect.tiny, f"{image.width} x {image.height}")


def _told(fact: Callable[[], int | None]) -> int:
    """What a part of the file says that training does not read; 1 where it says nothing, or is damaged there."""
    try:
        return fact() or 1
    except DECODING_ERRORS:
        return 1


def _is_oversized(content: bytes) -> bool:
    """Whether the header alone already says more pixels than are opened."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            return max(header.size) ** 2 > MAX_PIXELS
    except Image.DecompressionBombError:
        return True
    except DECODING_ERRORS:
        return False
