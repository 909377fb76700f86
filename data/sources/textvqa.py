"""TextVQA as published: `TextVQA_0.5.1_{split}.json` beside its images (Singh et al. 2019, textvqa.org)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, RecordError, id_of, image_path, read_entries, strings_of, text_of
from data.arrow import ArrowSource
from data.readers import json_lines
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked

OCR_LINE = "Reference OCR token:"
"""How the line begins in which LLaVA's prompts list what an OCR system has read."""


@dataclass(frozen=True, kw_only=True)
class TextvqaConfig(LocalSourceConfig):
    """One split; ten answers per question, none in the test split."""

    split: str
    """`train`, `val` (its images are among those of train) or `test`."""
    folder: str = "textvqa"
    """Folder with the JSON files, `train_images/` and `test_images/`."""
    ocr: str | None = None
    """Prompts with OCR tokens (LLaVA's llava_textvqa_val_v051_ocr.jsonl); null asks without. Scores differ by far."""
    prompt_suffix: str = "\nAnswer the question using a single word or phrase."
    """Put after each question; the default is what published scores were measured with (LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        ocr = None if self.ocr is None else folder / self.ocr
        file = AnnotationFile(
            folder / f"TextVQA_0.5.1_{self.split}.json", self._parse, partial(_with_ocr, ocr=ocr),
            beside=() if ocr is None else (ocr,),
        )  # fmt: skip
        images = folder / ("test_images" if self.split == "test" else "train_images")
        return self._open(name, [file], images, root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        answers = strings_of(raw, "answers")
        ocr = raw.get("ocr_line")
        if self.ocr is not None and ocr is None:
            raise RecordError(f"no prompt with OCR tokens in {self.ocr}")
        question = text_of(raw, "question") + ("" if ocr is None else f"\n{ocr}")
        return Record(
            id=id_of(raw, "question_id", position),
            images=(ImageRef(path=Path(image_path(f"{text_of(raw, 'image_id')}.jpg"))),),
            turns=asked(question + self.prompt_suffix, answers[0] if answers else None),
            references=tuple(answers),
        )


def _with_ocr(path: Path, ocr: Path | None) -> Iterator[Any]:
    """The questions, each with the line of OCR tokens that the prompts hold for the same image and question."""
    lines = {} if ocr is None else dict(_ocr_lines(ocr))
    for entry in read_entries(path):
        if isinstance(entry, dict):
            entry = {**entry, "ocr_line": lines.get(_key(entry.get("image_id"), entry.get("question")))}
        yield entry


def _ocr_lines(path: Path) -> Iterator[tuple[tuple[str, str], str]]:
    for prompt in json_lines(path):
        first, *rest = str(prompt.get("text", "") if isinstance(prompt, dict) else "").split("\n")
        line = next((line for line in rest if line.startswith(OCR_LINE)), None)
        if line is not None:
            yield _key(prompt.get("question_id"), first), line


def _key(image_id: object, question: object) -> tuple[str, str]:
    # Of one image there are several questions, and the two files differ in their capitals.
    return str(image_id), str(question).strip().lower()
