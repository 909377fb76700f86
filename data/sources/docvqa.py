"""DocVQA as published: `{split}_v1.0.json` beside `documents/` (Mathew et al. 2021, docvqa.org)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from data.annotations import AnnotationFile, RecordError, id_of, image_path, strings_of, text_of
from data.arrow import ArrowSource
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked

FILES = ("{split}_v1.0.json", "{split}_v1.0_withQT.json")
"""Names under which a split was published, without and with question types."""


@dataclass(frozen=True, kw_only=True)
class DocvqaConfig(LocalSourceConfig):
    """One split; trained on the first answer, scored against all. A split without answers serves evaluation only."""

    split: str
    """`train`, `val` or `test`."""
    folder: str = "docvqa"
    """Folder with the JSON files and `documents/`."""
    annotations: str | None = None
    """File name where it is not one of the published ones."""
    prompt_suffix: str = "\nAnswer the question using a single word or phrase."
    """Put after each question; the default is what published scores were measured with (lmms-eval, LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        names = [self.annotations] if self.annotations else [file.format(split=self.split) for file in FILES]
        present = [folder / file for file in names if (folder / file).is_file()]
        if len(present) > 1:
            raise UserError(
                f"data.sources.{name}: split '{self.split}' is there twice",
                found=", ".join(path.name for path in present),
                expected="one file per split",
                remedy=f"set data.sources.{name}.annotations to the one to read",
            )
        file = AnnotationFile(present[0] if present else folder / names[0], self._parse)
        return self._open(name, [file], folder, root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        answers = strings_of(raw, "answers")
        types = raw.get("question_types") or []
        if not isinstance(types, list):
            raise RecordError(f"'question_types' is {types!r}, not a list")
        return Record(
            id=id_of(raw, "questionId", position),
            images=(ImageRef(path=Path(image_path(raw.get("image")))),),
            turns=asked(text_of(raw, "question") + self.prompt_suffix, answers[0] if answers else None),
            references=tuple(answers),
            meta=(("question_types", "|".join(map(str, types))),) if types else (),
        )
