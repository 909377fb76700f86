"""VizWiz-VQA as published: `Annotations/{split}.json` beside a folder of images per split (Gurari et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, image_path, text_of, votes_of
from data.arrow import ArrowSource
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked


@dataclass(frozen=True, kw_only=True)
class VizwizConfig(LocalSourceConfig):
    """One split; ten answers per question, none in the test split."""

    split: str
    """`train`, `val` or `test`."""
    folder: str = "vizwiz"
    """Folder with `Annotations/` and the folders of images."""
    prompt_suffix: str = (
        "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    """Put after each question; the default is what published scores were measured with (LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        file = AnnotationFile(folder / "Annotations" / f"{self.split}.json", self._parse)
        return self._open(name, [file], folder / self.split, root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        image = image_path(raw.get("image"))
        answers = votes_of(raw)
        return Record(
            id=image,
            images=(ImageRef(path=Path(image)),),
            turns=asked(text_of(raw, "question") + self.prompt_suffix, answers[0] if answers else None),
            references=tuple(answers),
        )
