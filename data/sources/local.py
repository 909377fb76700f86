"""Base of the sources that read annotation files and image files below `data.root`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchorformer.schema import to_plain
from data.annotations import AnnotationFile
from data.arrow import ArrowSource, open_source
from data.record import Role, Turn
from data.sources.base import SourceConfig

IMAGE = "<image>"
"""Stands in a user's turn for the next image of the record."""


def asked(text: str, answer: str | None = None) -> tuple[Turn, ...]:
    """A question about the record's one image, and the answer that is trained, where there is one."""
    question = Turn(Role.user, f"{IMAGE}\n{text}")
    return (question,) if answer is None else (question, Turn(Role.assistant, answer))


@dataclass(frozen=True, kw_only=True)
class LocalSourceConfig(SourceConfig):
    """What all of them share; paths may be absolute or start from `data.root`."""

    linked_roots: tuple[str, ...] = ()
    """Folders outside the image folder that symbolic links inside it may lead to; any other way out is refused."""

    def _open(
        self, name: str, files: list[AnnotationFile], image_root: Path, root: Path, cache_dir: Path,
        decisive: Sequence[str] = (),
    ) -> ArrowSource:  # fmt: skip
        """
        Args:
            decisive: what makes the records beside the files' content and the config, names of files for instance.
        """
        # Weight and link targets change no row; everything else a source is configured with may.
        options = {
            field.name: to_plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("weight", "linked_roots")
        }
        options["reader"] = type(self).__qualname__
        if decisive:
            options["decisive"] = list(decisive)
        linked = [root / folder for folder in self.linked_roots]
        return open_source(name, files, image_root, options, cache_dir, linked)
