"""What a sharded copy of a mixture's sources looks like on disk or behind a URL.

    shards.json                     the manifest, written last: counts, sizes and sha256 of every other file
    NAME/records.arrow              of each source: its records, image by image with the place in the next file
    NAME/images.arrow               where each image lies: shard, first byte, bytes, checksum, width and height
    NAME/images-00000.arrow ...     the shards: plain Arrow files of encoded images

An image is stored once, however many records show it. Arrow does not compress the shards, so an image is a range of
bytes of its file, and reading one sample moves that sample's images and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from anchorformer.schema import Schema
from data.arrow import SCHEMA

FORMAT = 1
"""Raised whenever the files would mean something else."""

MANIFEST = "shards.json"
RECORDS, IMAGES = "records.arrow", "images.arrow"

DIGEST_BYTES = 16

RECORD_SCHEMA = SCHEMA.append(pa.field("stored", pa.list_(pa.int64())))
"""Rows as `data.arrow` has them, and per image its row in IMAGES."""

SHARD_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("bytes", pa.large_binary()),
    ]
)
"""One image: its name, its size in pixels (0 where no header can be read), BLAKE2b of its bytes, its bytes as they were
encoded. Null bytes stand for a file that was not there."""

PLACE_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("digest", pa.binary(DIGEST_BYTES)),
    ]
)
"""One image: its shard, and the range of that file that holds its bytes; an image that was not there has no bytes."""

SAFE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")
"""Source names that can be a folder's name anywhere."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class FileFacts(Schema):
    """A file that is complete."""

    bytes: Size
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class ShardFacts(FileFacts):
    """A shard, and how many images it holds."""

    images: Size


@dataclass(frozen=True, kw_only=True)
class SourceFacts(Schema):
    """One source: what it was made from, and its files."""

    fingerprint: str
    """The native source's: equal records have equal ones, whether they lie in files or in shards."""
    options: dict[str, Any]
    """The source's config without what changes no record (`options_of`)."""
    num_records: Size
    num_images: Size
    num_missing: Size
    """Images that were not there, copied under data.on_bad_image=skip."""
    records: FileFacts
    images: FileFacts
    shards: tuple[ShardFacts, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest(Schema):
    """Everything that a sharded copy holds."""

    format: int
    shard_mb: int
    sources: dict[str, SourceFacts]


def shard_name(number: int) -> str:
    return f"images-{number:05d}.arrow"
