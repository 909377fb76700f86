"""POPE as published: `coco_pope_{category}.json`, one object per line, images of COCO (Li et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, RecordError, id_of, image_path, text_of
from data.arrow import ArrowSource
from data.readers import json_lines
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked

CATEGORIES = ("adversarial", "popular", "random")


@dataclass(frozen=True, kw_only=True)
class PopeConfig(LocalSourceConfig):
    """Yes-or-no questions about objects, in three categories that the scores are reported by."""

    folder: str = "pope/coco"
    """Folder with the three files."""
    images: str = "coco/val2014"
    """Folder with COCO's validation images of 2014."""
    prompt_suffix: str = "\nAnswer the question using a single word or phrase."
    """Put after each question; the default is what published scores were measured with (LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        files = [
            AnnotationFile(folder / f"coco_pope_{category}.json", _Parser(category, self.prompt_suffix), json_lines)
            for category in CATEGORIES
        ]
        return self._open(name, files, root / self.images, root, cache_dir)


@dataclass(frozen=True, slots=True)
class _Parser:
    category: str
    prompt_suffix: str

    def __call__(self, raw: dict[str, Any], position: int) -> Record:
        label = text_of(raw, "label").strip().lower()
        if label not in ("yes", "no"):
            raise RecordError(f"'label' is {label!r}, neither yes nor no")
        return Record(
            # The categories count their questions apart, each from 1.
            id=f"{self.category}/{id_of(raw, 'question_id', position)}",
            images=(ImageRef(path=Path(image_path(raw.get("image")))),),
            turns=asked(text_of(raw, "text") + self.prompt_suffix, label),
            meta=(("kind", self.category),),
        )
