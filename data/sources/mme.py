"""MME as published: a folder per subtask, two lines "question<TAB>Yes|No" per image (Fu et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from data.annotations import AnnotationFile, RecordError, image_path
from data.arrow import ArrowSource
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked

SUBTASKS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
TEXTS, IMAGES = "questions_answers_YN", "images"
"""Folders of the large subtasks; in the small ones texts and images lie together."""
SUFFIXES = (".jpg", ".png", ".jpeg")
INSTRUCTION = " Please answer yes or no."
"""Ends every published question; published scores ask with `prompt_suffix` in its place."""


@dataclass(frozen=True, kw_only=True)
class MmeConfig(LocalSourceConfig):
    """Both questions of every image of all subtasks; a folder of some subtasks is a part, and reported as one."""

    folder: str = "MME_Benchmark_release_version"
    """Folder with a folder per subtask."""
    prompt_suffix: str = "\nAnswer the question using a single word or phrase."
    """Put after each question; the default is what published scores were measured with (LLaVA-1.5, lmms-eval)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        texts = [
            (subtask, path)
            for subtask in SUBTASKS
            for path in sorted([*(folder / subtask).glob("*.txt"), *(folder / subtask / TEXTS).glob("*.txt")])
        ]
        if not texts:
            raise UserError(
                f"data.sources.{name}: no subtask of MME is there",
                found=f"no {SUBTASKS[0]}/*.txt, {SUBTASKS[0]}/{TEXTS}/*.txt and so on in {folder}",
                expected=f"folders {', '.join(SUBTASKS)} with their texts and images",
                remedy="check data.root and the source's folder",
            )
        images = [_image_of(path, folder) for _, path in texts]
        files = [
            AnnotationFile(path, _Parser(subtask, image, self.prompt_suffix), _lines)
            for (subtask, path), image in zip(texts, images, strict=True)
        ]
        return self._open(name, files, folder, root, cache_dir, decisive=images)


@dataclass(frozen=True, slots=True)
class _Parser:
    subtask: str
    image: str
    prompt_suffix: str

    def __call__(self, raw: dict[str, Any], position: int) -> Record:
        question, tab, label = raw["line"].strip().partition("\t")
        answer = label.strip().lower()
        if not tab or answer not in ("yes", "no"):
            raise RecordError(f"is {raw['line']!r}, not a question, a tab, and Yes or No")
        return Record(
            id=f"{self.image}/{position}",
            images=(ImageRef(path=Path(image_path(self.image))),),
            turns=asked(question.removesuffix(INSTRUCTION) + self.prompt_suffix, answer),
            meta=(("kind", self.subtask), ("image", self.image)),
        )


def _image_of(text: Path, folder: Path) -> str:
    """Path of the text's image below the benchmark's folder.

    Raises:
        UserError: there is none.
    """
    place = text.parent.with_name(IMAGES) if text.parent.name == TEXTS else text.parent
    images = [image for suffix in SUFFIXES if (image := place / f"{text.stem}{suffix}").is_file()]
    if not images:
        raise UserError(
            f"{text}: its image is missing", found=f"no {text.stem} with {', '.join(SUFFIXES)} in {place}",
            expected="one image per text", remedy="fetch the benchmark's images again",
        )  # fmt: skip
    return images[0].relative_to(folder).as_posix()


def _lines(path: Path) -> Iterator[dict[str, str]]:
    for line in path.read_text("utf-8-sig").split("\n"):
        if line.strip():
            yield {"line": line}
