"""MMBench as published: one table per split, its images in base64 in a column (Liu et al. 2023)."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from data.annotations import AnnotationFile, RecordError, id_of, text_of
from data.arrow import ArrowSource, locked, written_whole
from data.choices import LETTERS, lettered
from data.readers import table
from data.record import ImageRef, Record
from data.sources.local import LocalSourceConfig, asked

LONGEST_INDEX = 64
"""Characters; a longer cell of the image column holds an image, a shorter one the index of the row that does."""


@dataclass(frozen=True, kw_only=True)
class MmbenchConfig(LocalSourceConfig):
    """Multiple-choice questions; with `circular` each as often as it has options, turned on by one each time."""

    file: str = "mmbench/mmbench_dev_20230712.tsv"
    """The table; that of a test split holds no answers."""
    circular: bool = True
    """Ask every turn of the options; a question then only counts where all of them are answered rightly."""
    prompt_suffix: str = "\nAnswer with the option's letter from the given choices directly."
    """Put after the options; the default is what published scores were measured with (LLaVA-1.5)."""

    def open(self, name: str, root: Path, cache_dir: Path) -> ArrowSource:
        path = root / self.file
        if not path.is_file():
            raise UserError(
                f"data.sources.{name}: annotation file is missing", found=f"nothing at {path}",
                expected="the published table", remedy="check data.root and the source's file",
            )  # fmt: skip
        images = _unpacked(path, cache_dir)
        entries = partial(_turned, circular=self.circular)
        return self._open(name, [AnnotationFile(path, self._parse, entries)], images, root, cache_dir)

    def _parse(self, raw: dict[str, Any], position: int) -> Record:
        index, turn = id_of(raw, "index", position), raw["turn"]
        options = [raw[letter] for letter in LETTERS if letter in raw]
        if len(options) < 2:
            raise RecordError(f"columns {LETTERS[:4]} hold {len(options)} option(s)")
        options = options[turn:] + options[:turn]
        hint = [raw["hint"]] if "hint" in raw else []
        question = "\n".join([*hint, text_of(raw, "question"), *lettered(options)])
        answer = None
        if "answer" in raw:
            place = LETTERS.find(raw["answer"])
            if not 0 <= place < len(options):
                raise RecordError(f"'answer' is {raw['answer']!r}, none of the options")
            answer = LETTERS[(place - turn) % len(options)]
        return Record(
            id=f"{index}/{turn}",
            images=(ImageRef(path=Path(f"{index}.image")),),
            turns=asked(question + self.prompt_suffix, answer),
            meta=(("kind", raw.get("category", "no category")), ("index", index)),
        )


def _turned(path: Path, circular: bool) -> Iterator[Any]:
    for row in table(path):
        options = sum(letter in row for letter in LETTERS)
        for turn in range(options if circular else 1):
            yield {**{name: cell for name, cell in row.items() if name != "image"}, "turn": turn}


def _unpacked(path: Path, cache_dir: Path) -> Path:
    """A folder with the table's images as files, written once per content of the table.

    Raises:
        UserError: a row without an image that can be read as base64.
    """
    with path.open("rb") as stream:
        folder = cache_dir / f"images-{hashlib.file_digest(stream, 'sha256').hexdigest()[:32]}"
    complete = folder / "COMPLETE"
    with locked(folder):
        if not complete.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            cells = {row.get("index", ""): row.get("image", "") for row in table(path)}
            for index in cells:
                content = _image(index, cells, path)
                with written_whole(folder / f"{index}.image") as draft:
                    draft.write_bytes(content)
            complete.touch()
    return folder


def _image(index: str, cells: Mapping[str, str], path: Path) -> bytes:
    if not index.isdecimal():
        raise UserError(
            f"{path}: a row is not numbered", found=f"{index[:40]!r} in the column 'index'", expected="a number",
            remedy="check which file the source names",
        )  # fmt: skip
    cell = cells[index]
    if len(cell) <= LONGEST_INDEX:
        cell = cells.get(cell, "")
    try:
        content = base64.b64decode(cell, validate=True)
    except binascii.Error:
        content = b""
    if not content:
        raise UserError(
            f"{path}: the row with index {index} has no image", found=f"{cells[index][:40]!r} in the column 'image'",
            expected="an image in base64, or the index of a row with one", remedy="fetch the file again",
        )  # fmt: skip
    return content
