"""What the data room asks of a processor, and the hash of everything in one that decides ids and labels."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data.record import Record

if TYPE_CHECKING:  # for the annotations alone: sources are opened, and their mistakes named, before torch is loaded
    from PIL import Image

    from anchorformer.contracts import Example

Turns = Sequence[tuple[str, str]]


class Encoder(Protocol):
    """The part of `AnchorFormerProcessor` that is used here; tests may hand in something smaller."""

    @property
    def needs_sizes(self) -> bool:
        """Whether a record's length depends on the sizes of its images."""
        ...

    @property
    def needs_token_counts(self) -> bool:
        """Whether a record's length depends on what its images show."""
        ...

    def encode(
        self,
        turns: Turns,
        images: Sequence[Image.Image],
        *,
        sample_id: str,
        max_length: int | None = None,
        overlength: str = "error",
        token_counts: Sequence[Sequence[int]] | None = None,
    ) -> Example:
        """Ids, labels and tiles of one record."""
        ...

    def measure(
        self,
        turns: Turns,
        num_images: int,
        *,
        sizes: Sequence[tuple[int, int] | None] = (),
        sample_id: str = "record",
        max_length: int | None = None,
        overlength: str = "error",
        token_counts: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int]:
        """Length in positions, anchors counted, and number of supervised tokens that `encode` gives, without pixels.

        A record that `encode` would refuse as too long keeps its full length.

        Args:
            sizes: (width, height) of each image, where `needs_sizes`; None of one that cannot be read.
            token_counts: of each image the embeddings of each tile, where `needs_token_counts`.
        """
        ...

    def save_pretrained(self, save_directory: str) -> Any:
        """Writes everything that decides ids and labels."""
        ...


def turns_of(record: Record) -> list[tuple[str, str]]:
    """The record's turns as a processor takes them."""
    return [(turn.role.value, turn.text) for turn in record.turns]


def measured(
    encoder: Encoder, record: Record, *, max_length: int | None = None, overlength: str = "error"
) -> tuple[int, int]:
    """`Encoder.measure` of a record; its images are touched only where their sizes matter, and then their headers."""
    sizes: list[tuple[int, int] | None] = []
    if encoder.needs_sizes:
        from data.images import size  # loads torch

        sizes = [size(ref) for ref in record.images]
    return encoder.measure(
        turns_of(record), len(record.images), sizes=sizes, max_length=max_length, overlength=overlength,
        token_counts=record.token_counts,
    )  # fmt: skip


def fingerprint(encoder: Encoder) -> str:
    """Hash of the processor as it is saved, and of the versions of the libraries that split text."""
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]
