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
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from tqdm import tqdm

from anchorformer.errors import UserError
from anchorformer.schema import parse, parse_plugin, to_plain
from data.arrow import locked, written_whole
from data.config import DataConfig
from data.disk import cannot_write, free_bytes, size
from data.mixture import open_sources
from data.shards.config import ShardConfig
from data.shards.layout import (
    FORMAT,
    IMAGES,
    MANIFEST,
    PLACE_SCHEMA,
    RECORDS,
    SAFE_NAME,
    Manifest,
    ShardFacts,
    SourceFacts,
    shard_name,
)
from data.shards.records import Pictures, write_records
from data.shards.shard import facts_of, length_of, new_shard, places, row_of
from data.shards.verify import read_manifest
from data.sources.base import PACKAGE, Source, SourceConfig
from data.sources.sharded import options_of

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"

AHEAD = 32
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
    indexed = [_begun(source, config.data, out / source.name) for source, _ in sources]
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


def _begun(source: Source, config: DataConfig, folder: Path) -> Pictures:
    """Writes the records, and finds out what is finished of the shards; drafts that a kill has left are removed."""
    for draft in folder.glob("*.tmp"):
        draft.unlink()
    pictures = write_records(source, config, folder)
    pictures.shards = _finished(folder)
    return pictures


def _write_images(source: Source, pictures: Pictures, config: ShardConfig, folder: Path) -> None:
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


def _write_places(folder: Path, pictures: Pictures) -> None:
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
