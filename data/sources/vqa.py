"""Short-answer questions `{question_id, image, question, answer}` in a JSON list, or one per line of a .jsonl file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, RecordError, id_of, image_path, read_entries, text_of
from data.arrow import ArrowSource
from data.readers import json_lines
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked


@dataclass(frozen=True, kw_only=True)
class VqaConfig(LocalSourceConfig):
    """`answer` may be one string or a list (the first is trained, all are accepted) and may be absent."""

    annotations: str
    """The JSON or JSON Lines file."""
    images: str = "."
    """Folder that the image paths start from."""
    prompt_suffix: str = ""
    """Put after each question."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        entries = json_lines if self.annotations.endswith(".jsonl") else read_entries
        files = [AnnotationFile(root / self.annotations, self._parse, entries)]
        return self._open(name, files, root / self.images, root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        answer = raw.get("answer", [])
        answers = answer if isinstance(answer, list) else [answer]
        if not all(isinstance(item, str) for item in answers):
            raise RecordError(f"'answer' is {answer!r}, not a string or a list of strings")
        kind = raw.get("kind")
        return Record(
            id=id_of(raw, "question_id", position),
            images=(ImageRef(path=Path(image_path(raw.get("image")))),),
            turns=asked(text_of(raw, "question") + self.prompt_suffix, answers[0] if answers else None),
            references=tuple(answers),
            meta=() if kind is None else (("kind", str(kind)),),
        )
