"""The one shape that every source yields: who said what, over which images."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol


class Role(str, Enum):
    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `<image>` in the text of a user's turn stands for the next image of the record."""

    role: Role
    text: str


class StoredImage(Protocol):
    """An image inside a larger file, whose bytes are fetched when it is opened."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height), known without fetching it; None of one that cannot be read."""
        ...

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            UserError: they cannot be fetched, or are not those that were stored.
        """
        ...


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that has not been opened: a file, encoded bytes from a parquet column, or a part of a shard.

    Attributes:
        path: the file, as the annotations name it under its image root; of a stored image no more than its name.
        data: the encoded bytes, where there is no file.
        roots: the folders that the file, symbolic links followed, has to lie in; `data.images.locate` checks it.
        stored: where the bytes are fetched, for an image in a shard.
    """

    path: Path | None = None
    data: bytes | None = None
    roots: tuple[Path, ...] = ()
    stored: StoredImage | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One training or evaluation record.

    Attributes:
        id: unique within its source (a duplicate in the file gets a suffix, and scan reports it).
        images: in the order of the `<image>` placeholders.
        turns: alternating user and assistant, after an optional system turn.
        references: accepted answers where the format holds several (DocVQA); the trained one is in `turns`.
        meta: format-specific facts that evaluation reports by (for example ChartQA's human or augmented).
        token_counts: of each image the embeddings of each of its tiles, where these depend on what it shows
            (`data.counted`); None where they do not, or nobody has looked.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    meta: tuple[tuple[str, str], ...] = ()
    token_counts: tuple[tuple[int, ...], ...] | None = None
