"""GQA as published: `{split}_balanced_questions.json` by question id, beside `images/` (Hudson and Manning 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, id_of, image_path, text_of
from data.arrow import ArrowSource
from data.readers import json_mapping
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked


@dataclass(frozen=True, kw_only=True)
class GqaConfig(LocalSourceConfig):
    """One balanced split; the test and challenge splits have no answers."""

    split: str
    """`train`, `val`, `testdev`, `test` or `challenge`."""
    folder: str = "gqa"
    """Folder with the JSON files and `images/`."""
    prompt_suffix: str = "\nAnswer the question using a single word or phrase."
    """Put after each question; the default is what published scores were measured with (LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        file = AnnotationFile(folder / f"{self.split}_balanced_questions.json", self._parse, json_mapping)
        return self._open(name, [file], folder / "images", root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        answer = text_of(raw, "answer") if "answer" in raw else None
        return Record(
            id=id_of(raw, "id", position),
            images=(ImageRef(path=Path(image_path(f"{text_of(raw, 'imageId')}.jpg"))),),
            turns=asked(text_of(raw, "question") + self.prompt_suffix, answer),
        )
