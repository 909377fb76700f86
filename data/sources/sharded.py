"""Records of a sharded copy, behind any path or URL: texts from a local index, each image by one ranged read.

The order of a run takes its samples from anywhere in the data, so shards are not cached whole: each would be fetched
again for every few of its images. Where a disk has room for all of them, copy the folder there and name the copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from anchorformer.errors import UserError
from anchorformer.schema import parse, plugin_to_plain
from data.arrow import ArrowSource, locked
from data.record import ImageRef
from data.shards.layout import DIGEST_BYTES, FORMAT, IMAGES, MANIFEST, RECORDS, Manifest, SourceFacts, shard_name
from data.sources.base import SourceConfig
from data.storage import Storage

SIZES_AT_ONCE = 16
"""Shards whose sizes are asked for at the same time."""

NO_RECORD_CHANGES = ("weight", "linked_roots")
"""Options of a source that decide no record."""


def options_of(config: SourceConfig) -> dict[str, Any]:
    """What of a source's config decides its records; the copy and the run that reads it have to agree on it."""
    return {key: value for key, value in plugin_to_plain(config).items() if key not in NO_RECORD_CHANGES}


class ShardedCopy:
    """A folder that `python -m data prepare shard` has written.

    Args:
        place: path or fsspec URL.

    Raises:
        UserError: it cannot be reached, or holds no manifest that can be understood.
    """

    def __init__(self, place: str) -> None:
        self.storage = Storage(place)
        self.manifest = _manifest(self.storage)

    def open(self, name: str, config: SourceConfig, cache_dir: Path) -> ShardedSource:
        """The source that the native `config` means, from this copy.

        Its index is brought to `cache_dir` once per machine; then the sizes of all shards are compared.

        Raises:
            UserError: there is no such source, it was copied with other options, or files are missing or of another
                size than the manifest says.
        """
        facts = self.manifest.sources.get(name)
        if facts is None:
            raise UserError(
                f"data.shards holds no source {name}",
                found=f"{', '.join(self.manifest.sources)} in {self.storage.place}",
                expected=f"{name}, as data.sources has it", remedy="write a copy with the same data=... as the run",
            )  # fmt: skip
        wanted = options_of(config)
        other = sorted(key for key in {*wanted, *facts.options} if wanted.get(key) != facts.options.get(key))
        if other:
            raise UserError(
                f"data.sources.{name}: the sharded copy was written with other options",
                found="; ".join(f"{key}={facts.options.get(key)!r}" for key in other),
                expected="; ".join(f"{key}={wanted.get(key)!r}" for key in other),
                remedy="write another copy with these options, or read this one with its own",
            )
        records = cache_dir / f"{name}-{facts.records.sha256[:32]}.arrow"
        images = cache_dir / f"{name}-{facts.images.sha256[:32]}.images.arrow"
        with locked(records):
            if not (records.is_file() and images.is_file()):
                self._check_sizes(name, facts)
                self.storage.copy(f"{name}/{IMAGES}", images, facts.images.bytes, facts.images.sha256)
                self.storage.copy(f"{name}/{RECORDS}", records, facts.records.bytes, facts.records.sha256)
        return ShardedSource(name, facts.fingerprint, records, Shards(self.storage, name, images))

    def _check_sizes(self, name: str, facts: SourceFacts) -> None:
        names = [f"{name}/{shard_name(number)}" for number in range(len(facts.shards))]
        with ThreadPoolExecutor(SIZES_AT_ONCE) as pool:
            for shard, shard_facts, size in zip(names, facts.shards, pool.map(self.storage.size, names), strict=True):
                if size != shard_facts.bytes:
                    raise UserError(
                        f"{self.storage.place}/{shard} is not whole", found=f"{size} bytes",
                        expected=f"{shard_facts.bytes} bytes, as {MANIFEST} says", remedy="copy that shard again",
                    )  # fmt: skip


class ShardedSource(ArrowSource):
    """A `Source` whose images lie in shards; a record holds where they do, and their bytes are fetched when opened."""

    def __init__(self, name: str, fingerprint: str, records: Path, shards: Shards) -> None:
        super().__init__(name, fingerprint, records, (f"{shards.storage.place}/{name}/{RECORDS}",), Path())
        self._shards = shards

    def _images(self, row: Mapping[str, Any]) -> tuple[ImageRef, ...]:
        return tuple(
            ImageRef(path=Path(path), stored=Stored(self._shards, number, path))
            for path, number in zip(row["images"], row["stored"], strict=True)
        )


class Shards:
    """Where every image of one source lies; mapped into memory by the process that reads it."""

    def __init__(self, storage: Storage, name: str, places: Path) -> None:
        self.storage, self._name, self._places = storage, name, places
        self._table: pa.RecordBatch | None = None

    def place(self, number: int) -> dict[str, Any]:
        """The row of an image, by the names of PLACE_SCHEMA."""
        if self._table is None:
            self._table = pa.ipc.open_file(pa.memory_map(str(self._places))).get_batch(0)
        row: dict[str, Any] = self._table.slice(number, 1).to_pylist()[0]
        return row

    def read(self, number: int, path: str) -> bytes:
        """The bytes of an image; none of one that was not there when the copy was written.

        Raises:
            UserError: what `Storage.read` raises, or other bytes than were stored.
        """
        place = self.place(number)
        if not place["length"]:
            return b""
        shard = f"{self._name}/{shard_name(place['shard'])}"
        content = self.storage.read(shard, place["offset"], place["length"])
        if digest(content) != place["digest"]:
            raise UserError(
                f"{self.storage.place}/{shard} is damaged",
                found=f"other bytes at {place['offset']}, where {path} lies", expected="the image that was stored",
                remedy=f"copy that shard again; {MANIFEST} holds its sha256",
            )  # fmt: skip
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}


@dataclass(frozen=True, slots=True)
class Stored:
    """One image of `Shards`."""

    shards: Shards
    number: int
    path: str

    @property
    def size(self) -> tuple[int, int] | None:
        place = self.shards.place(self.number)
        return (place["width"], place["height"]) if place["width"] else None

    def read(self) -> bytes:
        return self.shards.read(self.number, self.path)


def digest(content: bytes) -> bytes:
    """The checksum of an image."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _manifest(storage: Storage) -> Manifest:
    remedy = "write the copy with `python -m data prepare shard`, and copy shards.json last"
    try:
        found = json.loads(storage.read(MANIFEST))
    except ValueError as error:
        raise UserError(
            f"{storage.place}/{MANIFEST} is no manifest", found=error, expected="complete JSON", remedy=remedy
        ) from None
    if isinstance(found, dict) and found.get("format") != FORMAT:
        raise UserError(
            f"{storage.place}/{MANIFEST} is of another format", found=found.get("format"), expected=FORMAT,
            remedy="write the copy again with this version",
        )  # fmt: skip
    return parse(Manifest, found, f"{storage.place}/{MANIFEST}", remedy)
