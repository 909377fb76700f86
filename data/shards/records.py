"""The records of a copy: rows as the native source has them, and which images they show, each counted once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from anchorformer.errors import UserError
from anchorformer.images import BAD_FILE
from data.arrow import ROWS_PER_BATCH, written_whole
from data.config import DataConfig, OnBad
from data.images import locate
from data.record import ImageRef
from data.shards.layout import RECORD_SCHEMA, RECORDS, ShardFacts
from data.sources.base import Source


@dataclass
class Pictures:
    """The images of one source.

    Attributes:
        first: record and place in it where each is first shown.
        bytes: of all of them.
        missing: how many are not there.
        shards: those that are finished.
    """

    first: list[tuple[int, int]] = field(default_factory=list)
    bytes: int = 0
    missing: int = 0
    shards: list[ShardFacts] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Images that are in finished shards: the first ones."""
        return sum(shard.images for shard in self.shards)


def write_records(source: Source, config: DataConfig, folder: Path) -> Pictures:
    """Writes RECORDS of a source into `folder`, each image numbered by its first appearance.

    Raises:
        UserError: under `on_bad_image=error`, an image that is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, numbers, missing = Pictures(), dict[str, int](), list[str]()
    with (
        written_whole(folder / RECORDS) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, RECORD_SCHEMA) as writer,
        tqdm(desc=f"reading {source.name}", total=len(source), unit=" records", delay=2, mininterval=0.5) as progress,
    ):
        for start in range(0, len(source), ROWS_PER_BATCH):
            rows = []
            for index in range(start, min(start + ROWS_PER_BATCH, len(source))):
                row, refs = _row(source, index)
                for place, ref in enumerate(refs):
                    key = str(ref.path) if ref.path is not None else f"#{index}.{place}"
                    if key not in numbers:
                        numbers[key] = len(numbers)
                        pictures.first.append((index, place))
                        length = _length(ref)
                        pictures.bytes += length or 0
                        missing += [key] if length is None else []
                    row["images"].append(_name(ref, key, Path(config.root)))
                    row["stored"].append(numbers[key])
                rows.append(row)
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=RECORD_SCHEMA))
            progress.update(len(rows))
    if missing and config.on_bad_image is OnBad.error:
        raise UserError(
            f"{len(missing)} image(s) of {source.name} are not there", found=", ".join(missing[:5]),
            expected="every image",
            remedy="fetch them; with data.on_bad_image=skip they stay missing in the copy, and training skips them",
        )  # fmt: skip
    pictures.missing = len(missing)
    return pictures


def _row(source: Source, index: int) -> tuple[dict[str, Any], tuple[ImageRef, ...]]:
    """The record's columns with no image in them yet, and its images; one that is not understood keeps its row."""
    row: dict[str, Any] = {"id": source.record_id(index), "images": [], "stored": [], "turns": [], "references": [],
                           "meta": [], "malformed": None}  # fmt: skip
    try:
        record = source[index]
    except UserError as error:
        return row | {"malformed": {"file": 0, "position": index, "why": error.found}}, ()
    row["turns"] = [{"role": turn.role.value, "text": turn.text} for turn in record.turns]
    row["references"] = list(record.references)
    row["meta"] = [{"key": key, "value": value} for key, value in record.meta]
    return row, record.images


def _name(ref: ImageRef, key: str, root: Path) -> str:
    """What messages call the image: its path below `data.root`, where it lies there."""
    for folder in (root, root.resolve()):
        if ref.path is not None and ref.path.is_relative_to(folder):
            return str(ref.path.relative_to(folder))
    return key


def _length(ref: ImageRef) -> int | None:
    """Bytes of the image; None of one that is not there. Other defects are copied: they are the reader's to judge."""
    place = locate(ref)
    if isinstance(place, bytes):
        return len(place)
    try:
        return place.stat().st_size
    except OSError as error:
        if error.errno not in BAD_FILE:
            raise
        return None
