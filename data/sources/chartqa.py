"""ChartQA as published: `{split}/{split}_{human,augmented}.json` beside `{split}/png/` (Masry et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, RecordError, image_path, text_of
from data.arrow import ArrowSource
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked

PUBLISHED_FOLDER = "ChartQA Dataset"
"""Name of the folder inside the published archive; `folder` may name it or the one that holds it."""


class Kind(str, Enum):
    human = "human"
    augmented = "augmented"


@dataclass(frozen=True, kw_only=True)
class ChartqaConfig(LocalSourceConfig):
    """One split: questions written by people, made by a model, or both; `meta` says which."""

    split: str
    """`train`, `val` or `test`."""
    folder: str = "chartqa"
    """Folder with `train/`, `val/` and `test/`, or one holding the published folder of that layout."""
    kinds: tuple[Kind, ...] = (Kind.human, Kind.augmented)
    """Which question files are read, in this order."""
    prompt_suffix: str = "\nAnswer the question with a single word."
    """Put after each question; the default is what published scores were measured with (lmms-eval)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        if not (folder / self.split).is_dir() and (folder / PUBLISHED_FOLDER).is_dir():
            folder = folder / PUBLISHED_FOLDER
        split = folder / self.split
        files = [
            AnnotationFile(split / f"{self.split}_{kind.value}.json", partial(self._parse, kind)) for kind in self.kinds
        ]
        return self._open(name, files, split / "png", root, cache_dir)

    def _parse(self, kind: Kind, raw: dict[str, Any], position: int) -> Record:
        label = raw.get("label")
        # Published labels are strings; a file rewritten by another tool may hold them as numbers.
        if not isinstance(label, (str, int, float)) or isinstance(label, bool):
            raise RecordError(f"'label' is {label!r}, not a string")
        return Record(
            id=f"{self.split}-{kind.value}-{position}",
            images=(ImageRef(path=Path(image_path(raw.get("imgname")))),),
            turns=asked(text_of(raw, "query") + self.prompt_suffix, str(label)),
            references=(str(label),),
            meta=(("kind", kind.value),),
        )
