"""VQAv2 as published: questions and annotations apart, images of COCO (Goyal et al. 2017, visualqa.org)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.annotations import AnnotationFile, RecordError, id_of, text_of, votes_of
from data.arrow import ArrowSource
from data.readers import json_list
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked


@dataclass(frozen=True, kw_only=True)
class Vqav2Config(LocalSourceConfig):
    """One split; ten answers per question, none in the test splits. The most common answer is trained."""

    split: str
    """`train2014`, `val2014`, `test-dev2015` or `test2015`, as the files are named."""
    folder: str = "vqav2"
    """Folder with `v2_OpenEnded_mscoco_{split}_questions.json` and `v2_mscoco_{split}_annotations.json`."""
    images: str = "coco"
    """Folder with COCO's `train2014/`, `val2014/` and `test2015/`."""
    prompt_suffix: str = "\nAnswer the question using a single word or phrase."
    """Put after each question; the default is what published scores were measured with (LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        answers = None if self.split.startswith("test") else folder / f"v2_mscoco_{self.split}_annotations.json"
        file = AnnotationFile(
            folder / f"v2_OpenEnded_mscoco_{self.split}_questions.json", self._parse,
            partial(_with_answers, annotations=answers), beside=() if answers is None else (answers,),
        )  # fmt: skip
        return self._open(name, [file], root / self.images, root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        image_id = raw.get("image_id")
        if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
            raise RecordError(f"'image_id' is {image_id!r}, not a number")
        images = self.split.replace("-dev", "")
        answers, trained = _answers(raw.get("annotation"))
        if trained is None and not self.split.startswith("test"):
            raise RecordError("no annotation of this question")
        return Record(
            id=id_of(raw, "question_id", position),
            images=(ImageRef(path=Path(f"{images}/COCO_{images}_{image_id:012d}.jpg")),),
            turns=asked(text_of(raw, "question") + self.prompt_suffix, trained),
            references=answers,
        )


def _with_answers(path: Path, annotations: Path | None) -> Iterator[Any]:
    entries = [] if annotations is None else json_list(annotations, "annotations")
    by_question = {entry.get("question_id"): entry for entry in entries if isinstance(entry, dict)}
    for entry in json_list(path, "questions"):
        yield {**entry, "annotation": by_question.get(entry.get("question_id"))} if isinstance(entry, dict) else entry


def _answers(annotation: Any) -> tuple[tuple[str, ...], str | None]:
    """What people answered, and the one of it that is trained."""
    if annotation is None:
        return (), None
    if not isinstance(annotation, dict):
        raise RecordError(f"its annotation is {str(annotation)[:80]!r}, not an object")
    votes = votes_of(annotation)
    if not votes:
        raise RecordError("its annotation holds no answers")
    return tuple(votes), text_of({"multiple_choice_answer": votes[0], **annotation}, "multiple_choice_answer")
