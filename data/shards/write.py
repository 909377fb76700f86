"""Native files into a sharded copy: records and places whole, images in shards of a bounded size, resumed after a kill.

What is finished is known from the shards themselves and from a journal beside them, which becomes part of the manifest
in the end; images are numbered in the order in which records first show them, so that a second call goes on with the
first one that is in no shard yet.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from tqdm import tqdm

from anchorformer.errors import UserError
from anchorformer.images import BAD_FILE
from anchorformer.schema import parse, parse_plugin, to_plain
from data.arrow import ROWS_PER_BATCH, locked, written_whole
from data.config import DataConfig, OnBad
from data.disk import cannot_write, free_bytes, size
from data.images import locate
from data.mixture import open_sources
from data.record import ImageRef
from data.shards.config import ShardConfig
from data.shards.layout import (
    FORMAT,
    IMAGES,
    MANIFEST,
    PLACE_SCHEMA,
    RECORD_SCHEMA,
    RECORDS,
    SAFE_NAME,
    FileFacts,
    Manifest,
    ShardFacts,
    SourceFacts,
    shard_name,
)  # fmt: skip
from data.shards.shard import facts_of, length_of, new_shard, places, row_of
from data.sources.base import PACKAGE, Source, SourceConfig
from data.sources.sharded import options_of

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"

AHEAD = 64
"""Images that are read ahead of the one that is written."""

MB = 1_000_000

AGAIN = "call the command again: it goes on"


def write(config: ShardConfig) -> Manifest:
    """Copies every source of the mixture that has a weight into `config.out`, or goes on with what is there.

    Raises:
        UserError: what opening the sources raises, an image that is not there under `on_bad_image=error`, a folder that
            holds another copy, or a disk without room.
    """
    out = Path(config.out)
    sources = [
        (source, options_of(parse_plugin(SourceConfig, config.data.sources[source.name], PACKAGE, source.name)))
        for source, _ in open_sources(config.data)
    ]
    for source, _ in sources:
        if not SAFE_NAME.fullmatch(source.name):
            raise UserError(
                f"data.sources.{source.name} cannot be a folder's name", found=source.name,
                expected="letters, digits, '_', '-' and '.'", remedy="call the source otherwise",
            )  # fmt: skip
    try:
        with locked(out / MANIFEST):
            return _write(config, sources, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise
        raise cannot_write(out, error, AGAIN) from None


def _write(config: ShardConfig, sources: Sequence[tuple[Source, dict[str, Any]]], out: Path) -> Manifest:
    _check_same(out, config, sources)
    if (out / MANIFEST).is_file():
        log.info("%s is complete", out)
        return read_manifest(out)
    indexed = [_index(source, config.data, out / source.name) for source, _ in sources]
    there = sum(shard.bytes for pictures in indexed for shard in pictures.shards)
    missing_bytes = sum(pictures.bytes for pictures in indexed) - there
    log.info(
        "%d records with %d images, %s, for shards of %d MB; %s are there, %s free",
        sum(len(source) for source, _ in sources),
        sum(len(pictures.first) for pictures in indexed),
        size(missing_bytes + there),
        config.shard_mb,
        size(there),
        size(free_bytes(out)),
    )
    if free_bytes(out) < missing_bytes:
        raise UserError(
            f"there is no room for the sharded copy {out}", found=f"{size(free_bytes(out))} free",
            expected=f"{size(missing_bytes)}, and {size(there)} are there",
            remedy="free disk space, or name another out=",
        )  # fmt: skip
    facts = {}
    for (source, options), pictures in zip(sources, indexed, strict=True):
        folder = out / source.name
        _write_images(source, pictures, config, folder)
        _write_places(folder, pictures)
        facts[source.name] = SourceFacts(
            fingerprint=source.fingerprint, options=options, num_records=len(source), num_images=len(pictures.first),
            num_missing=pictures.missing, records=facts_of(folder / RECORDS), images=facts_of(folder / IMAGES),
            shards=tuple(pictures.shards),
        )  # fmt: skip
    manifest = Manifest(format=FORMAT, shard_mb=config.shard_mb, sources=facts)
    with written_whole(out / MANIFEST) as draft:
        draft.write_text(json.dumps(to_plain(manifest), indent=1) + "\n")
    for source, _ in sources:
        (out / source.name / JOURNAL).unlink()
    return manifest


def read_manifest(out: Path) -> Manifest:
    """The manifest of a finished copy on this disk."""
    return parse(Manifest, json.loads((out / MANIFEST).read_text()), str(out / MANIFEST), "write the copy again")


def verify(out: Path) -> None:
    """Reads every file of a finished copy and compares it with the manifest.

    Raises:
        UserError: no manifest, a file that is missing, or one with another content.
    """
    if not (out / MANIFEST).is_file():
        raise UserError(
            f"{out} holds no finished copy", found=f"no {MANIFEST}", expected="a finished one", remedy=AGAIN
        )
    expected: dict[str, FileFacts] = {}
    for name, facts in read_manifest(out).sources.items():
        expected |= {f"{name}/{RECORDS}": facts.records, f"{name}/{IMAGES}": facts.images}
        expected |= {f"{name}/{shard_name(number)}": shard for number, shard in enumerate(facts.shards)}
    total = sum(facts.bytes for facts in expected.values())
    with tqdm(desc="comparing", total=total, unit="B", unit_scale=True, delay=2, mininterval=0.5) as progress:
        for name, written in expected.items():
            found = facts_of(out / name) if (out / name).is_file() else None
            if found is None or (found.bytes, found.sha256) != (written.bytes, written.sha256):
                raise UserError(
                    f"{out / name} is not what was written",
                    found="nothing" if found is None else f"{found.bytes} bytes with sha256 {found.sha256}",
                    expected=f"{written.bytes} bytes with sha256 {written.sha256}", remedy="copy that file again",
                )  # fmt: skip
            progress.update(written.bytes)


@dataclass
class _Pictures:
    """The images of one source.

    Attributes:
        first: record and place in it where each is first shown.
        bytes: of all of them.
        missing: how many are not there.
        shards: that are finished.
    """

    first: list[tuple[int, int]] = field(default_factory=list)
    bytes: int = 0
    missing: int = 0
    shards: list[ShardFacts] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(shard.images for shard in self.shards)


def _check_same(out: Path, config: ShardConfig, sources: Sequence[tuple[Source, dict[str, Any]]]) -> None:
    """Refuses to mix two copies: what is in the folder was begun with the same records and sizes, or it is empty."""
    plan = {
        "format": FORMAT, "shard_mb": config.shard_mb, "on_bad_image": config.data.on_bad_image.value,
        "sources": {source.name: [source.fingerprint, len(source)] for source, _ in sources},
    }  # fmt: skip
    path = out / "plan.json"
    if path.is_file():
        before = json.loads(path.read_text())
        if before != plan:
            other = sorted(key for key in plan if before.get(key) != plan[key])
            raise UserError(
                f"{out} holds another copy", found="; ".join(f"{key}={before.get(key)}" for key in other),
                expected="; ".join(f"{key}={plan[key]}" for key in other),
                remedy="name another out=, or remove that folder",
            )  # fmt: skip
        return
    if any(entry.name != f"{MANIFEST}.lock" for entry in out.iterdir()):
        raise UserError(
            f"{out} is not empty", found=", ".join(sorted(entry.name for entry in out.iterdir())[:6]),
            expected="a new folder, or one that this command has begun", remedy="name another out=",
        )  # fmt: skip
    with written_whole(path) as draft:
        draft.write_text(json.dumps(plan, indent=1) + "\n")


def _index(source: Source, config: DataConfig, folder: Path) -> _Pictures:
    """Writes the records, each image numbered by its first appearance, and finds out what is finished of the shards.

    Raises:
        UserError: under `on_bad_image=error`, an image that is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, numbers, missing = _Pictures(), dict[str, int](), list[str]()
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
    pictures.missing, pictures.shards = len(missing), _finished(folder)
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


def _write_images(source: Source, pictures: _Pictures, config: ShardConfig, folder: Path) -> None:
    """Writes the shards that are not finished, one after the other; each appears whole and is then noted."""
    threads = config.threads or 4 * len(os.sched_getaffinity(0))
    written = sum(shard.bytes for shard in pictures.shards)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(desc=f"copying images of {source.name}", total=max(pictures.bytes, written), initial=written, unit="B",
             unit_scale=True, delay=2, mininterval=0.5) as progress,
        (folder / JOURNAL).open("a") as journal,
    ):  # fmt: skip
        images = _ahead(pool, lambda shown: row_of(source[shown[0]].images[shown[1]]), pictures.first[pictures.done :])
        image = next(images, None)
        while image is not None:
            with new_shard(folder / shard_name(len(pictures.shards))) as shard:
                while image is not None and shard.takes(image, config.shard_mb * MB):
                    shard.add(image)
                    progress.update(length_of(image))
                    image = next(images, None)
            pictures.shards.append(shard.facts)
            journal.write(json.dumps(to_plain(shard.facts)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`map` in order, with AHEAD items under way."""
    waiting = iter(items)
    futures = [pool.submit(function, item) for item in itertools.islice(waiting, AHEAD)]
    while futures:
        result = futures.pop(0).result()
        futures += [pool.submit(function, item) for item in itertools.islice(waiting, 1)]
        yield result


def _finished(folder: Path) -> list[ShardFacts]:
    """The shards that the journal knows and that are there in their size; what lies behind them is written again."""
    journal, shards = folder / JOURNAL, list[ShardFacts]()
    for line in journal.read_text().splitlines() if journal.is_file() else ():
        try:
            facts = parse(ShardFacts, json.loads(line), str(journal))
        except ValueError:  # the line that a kill has cut
            break
        path = folder / shard_name(len(shards))
        if not path.is_file() or path.stat().st_size != facts.bytes:
            break
        shards.append(facts)
    with written_whole(journal) as draft:
        draft.write_text("".join(json.dumps(to_plain(facts)) + "\n" for facts in shards))
    return shards


def _write_places(folder: Path, pictures: _Pictures) -> None:
    """Writes where every image lies, as the shards themselves say."""
    parts = [places(folder / shard_name(number), number) for number in range(len(pictures.shards))]
    rows = pa.concat_tables([PLACE_SCHEMA.empty_table(), *parts]).combine_chunks()
    if len(rows) != len(pictures.first):
        raise AssertionError(f"{len(rows)} images in the shards of {folder}, {len(pictures.first)} in the records")
    (batch,) = rows.to_batches() or [pa.RecordBatch.from_pylist([], schema=PLACE_SCHEMA)]
    with (
        written_whole(folder / IMAGES) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, PLACE_SCHEMA) as writer,
    ):
        writer.write_batch(batch)
