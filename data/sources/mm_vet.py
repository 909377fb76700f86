"""MM-Vet as published: `mm-vet.json` by question id, beside `images/` (Yu et al. 2023)."""

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
class MmVetConfig(LocalSourceConfig):
    """Questions whose free answers a judge scores; its reference answers are not answers to be equal to."""

    folder: str = "mm-vet"
    """Folder with the JSON file and `images/`."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        file = AnnotationFile(folder / "mm-vet.json", self._parse, json_mapping)
        return self._open(name, [file], folder / "images", root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        return Record(
            id=id_of(raw, "id", position),
            images=(ImageRef(path=Path(image_path(raw.get("imagename")))),),
            turns=asked(text_of(raw, "question")),
        )
