"""Annotation JSON to memory-mapped Arrow: parsed once, then shared by all processes without a Python list of records.

One row per record, columns id, images (paths under the image root), turns, references and meta; one that cannot be
understood keeps its row, with where it stands and why, so that all of them can be listed. A file is named by the hash
of what it was made from, so it never has to be thrown away by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from anchorformer.errors import UserError
from data.annotations import AnnotationFile, RecordError, check_text
from data.record import ImageRef, Record, Role, Turn

FORMAT = 2
"""Raised whenever the same JSON would give other rows; part of every cache key."""

ROWS_PER_BATCH = 1024
"""Rows per Arrow record batch: row i lies in batch i // ROWS_PER_BATCH, so that no offset table is needed."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ("references", pa.list_(pa.string())),
        ("meta", pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))),
        ("malformed", pa.struct([("file", pa.int32()), ("position", pa.int64()), ("why", pa.string())])),
    ]
)


def open_source(
    name: str,
    files: Sequence[AnnotationFile],
    image_root: Path,
    options: Mapping[str, Any],
    cache_dir: Path,
    linked_roots: Sequence[Path] = (),
) -> ArrowSource:
    """Converts the files unless that has been done before, and opens the result.

    Args:
        image_root: folder that the paths in the files start from.
        options: everything besides the files' content that decides which records there are.
        linked_roots: further folders that symbolic links inside `image_root` may lead to.

    Raises:
        UserError: a file or folder is missing, is not the expected JSON, or holds no record.
    """
    paths = [path for file in files for path in (file.path, *file.beside)]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"data.sources.{name}: annotation file is missing",
                found=_nearest(path),
                expected=path,
                remedy="check data.root and the source's paths, or fetch the file",
            )
    if not image_root.is_dir():
        raise UserError(
            f"data.sources.{name}: image folder is missing",
            found=_nearest(image_root),
            expected=image_root,
            remedy="check data.root and the source's paths, or fetch the images",
        )
    key = hashlib.sha256(json.dumps([FORMAT, sorted(options.items())], sort_keys=True).encode())
    for path in paths:
        with path.open("rb") as stream:
            key.update(hashlib.file_digest(stream, "sha256").digest())
    fingerprint = key.hexdigest()[:32]
    arrow = cache_dir / f"{name}-{fingerprint}.arrow"
    with locked(arrow):
        if not arrow.exists():
            _convert(name, files, arrow)
    roots = tuple(root.resolve() for root in (image_root, *linked_roots))
    return ArrowSource(name, fingerprint, arrow, tuple(file.path for file in files), image_root, roots)


class ArrowSource:
    """A `Source` over one Arrow file; reading a record touches that record's rows only.

    The file is mapped lazily, so that a copy sent to another process maps it there.
    """

    def __init__(
        self, name: str, fingerprint: str, path: Path, files: tuple[Path | str, ...], image_root: Path,
        roots: tuple[Path, ...] = (),
    ) -> None:  # fmt: skip
        self.name, self.fingerprint = name, fingerprint
        self._path, self._files, self._image_root, self._roots = path, files, image_root, roots
        self._reader: pa.RecordBatchFileReader | None = None
        batches = self._open().num_record_batches
        last = self._open().get_batch(batches - 1).num_rows
        self._length = (batches - 1) * ROWS_PER_BATCH + last

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(index)
        row = self._open().get_batch(index // ROWS_PER_BATCH).slice(index % ROWS_PER_BATCH, 1).to_pylist()[0]
        if row["malformed"] is not None:
            raise self._refusal(row["id"], row["malformed"])
        return Record(
            id=row["id"],
            images=self._images(row),
            turns=tuple(Turn(Role(turn["role"]), turn["text"]) for turn in row["turns"]),
            references=tuple(row["references"]),
            meta=tuple((item["key"], item["value"]) for item in row["meta"]),
        )

    def _images(self, row: Mapping[str, Any]) -> tuple[ImageRef, ...]:
        return tuple(ImageRef(path=self._image_root / image, roots=self._roots) for image in row["images"])

    def check_records(self) -> None:
        columns = [self._open().get_batch(number) for number in range(self._open().num_record_batches)]
        malformed = [batch for batch in columns if batch.column("malformed").null_count < batch.num_rows]
        if malformed:
            count = sum(batch.num_rows - batch.column("malformed").null_count for batch in malformed)
            first = malformed[0].filter(malformed[0].column("malformed").is_valid()).slice(0, 1).to_pylist()[0]
            raise self._refusal(first["id"], first["malformed"], count - 1)

    def _refusal(self, record_id: str, malformed: Mapping[str, Any], more: int = 0) -> UserError:
        return UserError(
            f"{self._files[malformed['file']]}: record {malformed['position']} (id {record_id}) cannot be used",
            found=malformed["why"] + (f"; {more} more such record(s)" if more else ""),
            expected="a record in the published format",
            remedy="correct or remove it; `python -m data scan` lists all of them, and training leaves them out with "
            "data.on_bad_record=skip",
        )

    def record_id(self, index: int) -> str:
        """The id alone, without reading the rest of the record."""
        return str(self._open().get_batch(index // ROWS_PER_BATCH).column("id")[index % ROWS_PER_BATCH].as_py())

    def _open(self) -> pa.RecordBatchFileReader:
        if self._reader is None:
            self._reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock beside a cache file: of all ranks and workers one makes it, the others wait for it.

    Correctness does not hang on the lock (files appear whole, by rename); it only saves doing the work twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path that becomes `path` at the end, and vanishes where writing fails."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _convert(name: str, files: Sequence[AnnotationFile], target: Path) -> None:
    taken: dict[str, int] = {}
    columns: dict[str, list[Any]] = {field: [] for field in SCHEMA.names}
    with (
        written_whole(target) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        tqdm(desc=f"reading {name}", unit=" records", delay=2, mininterval=0.5) as progress,
    ):
        for number, file in enumerate(files):
            for position, raw in enumerate(file.entries(file.path)):
                try:
                    record, malformed = _understood(file, raw, position), None
                except RecordError as error:
                    record = Record(id=_label(raw, position), images=(), turns=())
                    malformed = {"file": number, "position": position, "why": str(error)}
                for field, value in (_row(record, taken) | {"malformed": malformed}).items():
                    columns[field].append(value)
                progress.update()
                if len(columns["id"]) == ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
                    columns = {field: [] for field in SCHEMA.names}
        if not taken:
            raise UserError(
                f"data.sources.{name}: there are no records",
                found=" and ".join(f"{file.path}: []" for file in files),
                expected="at least one record",
                remedy="check which files the source names",
            )
        if columns["id"]:
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))


def _understood(file: AnnotationFile, raw: Any, position: int) -> Record:
    """The entry as a record.

    Raises:
        RecordError: it cannot be one.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"is {type(raw).__name__}, not an object")
    record = file.parse(raw, position)
    check_text(record)
    return record


def _label(raw: Any, position: int) -> str:
    """What a record that cannot be understood is called: the id it was meant to have, or its position."""
    label = raw.get("id", raw.get("questionId", raw.get("question_id"))) if isinstance(raw, dict) else None
    return f"#{position}" if label is None else str(label).encode("ascii", "backslashreplace").decode()[:80]


def _row(record: Record, taken: dict[str, int]) -> dict[str, Any]:
    """The columns of one record.

    Args:
        taken: ids so far -> the last number put behind them; this one's are added.
    """
    # Real files repeat ids, some one id in every record. Logs and predictions must still tell the records apart;
    # counting goes on where the last repeat stopped, or the work would grow with the square of the repeats.
    unique, repeats = record.id, taken.get(record.id, 1)
    while unique in taken:
        repeats += 1
        unique = f"{record.id}~{repeats}"
    taken[unique] = 1
    taken[record.id] = repeats
    meta = [*record.meta, *([("duplicate_of", record.id)] if repeats > 1 else [])]
    return {
        "id": unique,
        "images": [str(image.path) for image in record.images],
        "turns": [{"role": turn.role.value, "text": turn.text} for turn in record.turns],
        "references": list(record.references),
        "meta": [{"key": key, "value": value} for key, value in meta],
    }


def _nearest(path: Path) -> str:
    """The part of a missing path that exists, and what lies there."""
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    names = sorted(entry.name for entry in parent.iterdir())
    listing = ", ".join(names[:6]) + (f", ... ({len(names)} entries)" if len(names) > 6 else "")
    return f"{parent} holds {listing or 'nothing'}"
