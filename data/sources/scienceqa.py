"""ScienceQA as published: `problems.json`, `pid_splits.json` and a folder of images per split (Lu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from data.annotations import AnnotationFile, RecordError, id_of, image_path, text_of
from data.arrow import ArrowSource
from data.choices import LETTERS, lettered
from data.readers import json_mapping, read_json
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked


@dataclass(frozen=True, kw_only=True)
class ScienceqaConfig(LocalSourceConfig):
    """The questions of a split that have an image (the subset that papers call SQA-IMG)."""

    split: str
    """`train`, `val`, `test`, or one of the `mini` splits."""
    folder: str = "scienceqa"
    """Folder with the JSON files, and `images/{split}/{id}/image.png`."""
    prompt_suffix: str = "\nAnswer with the option's letter from the given choices directly."
    """Put after the options; the default is what published scores were measured with (LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        folder = root / self.folder
        splits = folder / "pid_splits.json"
        entries = partial(_of_split, splits=splits, split=self.split)
        file = AnnotationFile(folder / "problems.json", self._parse, entries, beside=(splits,))
        return self._open(name, [file], folder / "images", root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        choices, answer = raw.get("choices"), raw.get("answer")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise RecordError(f"'choices' is {str(choices)[:80]!r}, not 2 to {len(LETTERS)} options")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise RecordError(f"'answer' is {answer!r}, not the position of one of {len(choices)} options")
        hint = raw.get("hint") or ""
        if not all(isinstance(choice, str) for choice in choices):
            raise RecordError(f"'choices' is {str(choices)[:80]!r}, not a list of strings")
        context = [f"Context: {hint}"] if hint else []
        question = "\n".join([*context, text_of(raw, "question"), *lettered(choices)])
        name = id_of(raw, "id", position)
        image = image_path(f"{text_of(raw, 'split')}/{name}/{text_of(raw, 'image')}")
        return Record(
            id=name,
            images=(ImageRef(path=Path(image)),),
            turns=asked(question + self.prompt_suffix, LETTERS[answer]),
            meta=(("kind", str(raw.get("subject", "")) or "no subject"),),
        )


def _of_split(path: Path, splits: Path, split: str) -> Iterator[Any]:
    found = read_json(splits)
    names = found.get(split) if isinstance(found, dict) else None
    if not isinstance(names, list):
        raise UserError(
            f"{splits}: there is no split '{split}'",
            found=sorted(found)[:12] if isinstance(found, dict) else type(found).__name__,
            expected="a list of problem ids under that name",
            remedy="correct the source's split",
        )
    wanted = set(map(str, names))
    for entry in json_mapping(path):
        if not isinstance(entry, dict) or (str(entry["id"]) in wanted and entry.get("image")):
            yield entry
