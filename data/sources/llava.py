"""LLaVA's conversation JSON, as LLaVA-558k and LLaVA-665k are published (haotian-liu/LLaVA, docs/Data.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, RecordError, id_of, image_path, text_of
from data.arrow import ArrowSource
from data.record import ImageRef, Record, Role, Turn
from data.sources.local import LocalSourceConfig

ROLES = {"human": Role.user, "gpt": Role.assistant, "system": Role.system}


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(LocalSourceConfig):
    """A JSON list of `{id, image, conversations: [{from, value}]}`; `image` is a path, a list of paths or absent."""

    annotations: str
    """The JSON file."""
    images: str = "."
    """Folder that the image paths start from."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        files = [AnnotationFile(root / self.annotations, _parse)]
        return self._open(name, files, root / self.images, root, cache_dir)


def _parse(raw: dict[str, Any], position: int) -> Record:
    images = raw.get("image")
    paths = [] if images is None else images if isinstance(images, list) else [images]
    conversations = raw.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise RecordError(f"'conversations' is {str(conversations)[:80]!r}, not a list of turns")
    turns = [Turn(Role.system, text_of(raw, "system_prompt"))] if raw.get("system_prompt") else []
    for turn in conversations:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None:
            raise RecordError(f"a turn's 'from' is none of {', '.join(ROLES)}: {str(turn)[:80]}")
        turns.append(Turn(role, text_of(turn, "value")))
    return Record(
        id=id_of(raw, "id", position),
        images=tuple(ImageRef(path=Path(image_path(path))) for path in paths),
        turns=tuple(turns),
    )
