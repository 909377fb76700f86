"""The one shape that every source yields: who said what, over which images."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Role(str, Enum):
    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `<image>` in the text of a user's turn stands for the next image of the record."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that has not been opened: a file, or encoded bytes from a parquet column.

    Attributes:
        path: the file, as the annotations name it under its image root.
        data: the encoded bytes, where there is no file.
        roots: the folders that the file, symbolic links followed, has to lie in; `data.images.locate` checks it.
    """

    path: Path | None = None
    data: bytes | None = None
    roots: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One training or evaluation record.

    Attributes:
        id: unique within its source (a duplicate in the file gets a suffix, and scan reports it).
        images: in the order of the `<image>` placeholders.
        turns: alternating user and assistant, after an optional system turn.
        references: accepted answers where the format holds several (DocVQA); the trained one is in `turns`.
        meta: format-specific facts that evaluation reports by (for example ChartQA's human or augmented).
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    meta: tuple[tuple[str, str], ...] = ()
