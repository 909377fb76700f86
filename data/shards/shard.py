"""One shard: an Arrow file of encoded images, written whole with its hash, and where in it each image lies."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from anchorformer.images import BAD_FILE, image_size, read_image
from data.arrow import written_whole
from data.images import locate
from data.record import ImageRef
from data.shards.layout import PLACE_SCHEMA, SHARD_SCHEMA, FileFacts, ShardFacts
from data.sources.sharded import digest

BATCH_BYTES = 32_000_000
"""Images that are in memory together before they are written, unless one alone is larger."""

Row = dict[str, Any]
"""An image by the names of SHARD_SCHEMA."""


class ShardWriter:
    """Takes images, and after the block of `new_shard` knows what has become of them.

    Attributes:
        bytes: of the images so far.
        facts: of the file, once it is whole.
    """

    facts: ShardFacts

    def __init__(self, arrow: pa.RecordBatchFileWriter) -> None:
        self.bytes, self.images = 0, 0
        self._arrow, self._rows, self._waiting = arrow, list[Row](), 0

    def takes(self, row: Row, limit: int) -> bool:
        """Whether the image fits below `limit` bytes; the first one always does."""
        return not self.images or self.bytes + length_of(row) <= limit

    def add(self, row: Row) -> None:
        if self._waiting + length_of(row) > BATCH_BYTES:
            self.flush()
        self._rows.append(row)
        self._waiting += length_of(row)
        self.bytes += length_of(row)
        self.images += 1

    def flush(self) -> None:
        """Writes what is in memory."""
        if self._rows:
            self._arrow.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=SHARD_SCHEMA))
        self._rows, self._waiting = [], 0


@contextlib.contextmanager
def new_shard(path: Path) -> Iterator[ShardWriter]:
    """A shard that has its name, on the disk, when the block ends well, and is gone when it does not."""
    with written_whole(path) as draft, draft.open("wb") as raw:
        file = _Hashed(raw)
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), SHARD_SCHEMA) as arrow:
            shard = ShardWriter(arrow)
            yield shard
            shard.flush()
        raw.flush()
        os.fsync(raw.fileno())
        shard.facts = ShardFacts(bytes=file.size, sha256=file.digest.hexdigest(), images=shard.images)


def row_of(ref: ImageRef) -> Row:
    """The image as it is encoded, whatever is wrong with it; null bytes where there is no such file.

    Raises:
        UserError: it lies outside its root.
        OSError: it could not be read for a reason that is none of its own.
    """
    place = locate(ref)
    try:
        content = read_image(place) if isinstance(place, Path) else place
    except OSError as error:
        if error.errno not in BAD_FILE:
            raise
        content = None
    width, height = (image_size(content) or (0, 0)) if content else (0, 0)
    return {"path": "" if ref.path is None else ref.path.name, "width": width, "height": height,
            "digest": digest(content or b""), "bytes": content}  # fmt: skip


def length_of(row: Row) -> int:
    return len(row["bytes"] or b"")


def places(path: Path, shard: int) -> pa.Table:
    """PLACE_SCHEMA of a shard's images: where Arrow has put them is read from the mapped file itself."""
    with pa.memory_map(str(path)) as mapped:
        whole = mapped.read_buffer()
        reader, parts = pa.ipc.open_file(whole), []
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            _, ends, content = batch.column("bytes").buffers()
            ends = np.frombuffer(ends, np.int64, len(batch) + 1)
            offsets = ends[:-1] + (content.address - whole.address if content is not None and content.size else 0)
            lengths = np.diff(ends)
            for row in (0, len(batch) - 1):
                found = whole.slice(int(offsets[row]), int(lengths[row]))
                if digest(found) != batch.column("digest")[row].as_py():
                    raise AssertionError(f"image {row} of batch {number} of {path} does not lie where Arrow says")
            columns = [np.full(len(batch), shard, np.int32), offsets, lengths,
                       *(batch.column(name) for name in ("width", "height", "digest"))]  # fmt: skip
            parts.append(pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=PLACE_SCHEMA))
        # A copy: nothing of it may point into the map that is closed here.
        return pa.Table.from_pylist(pa.Table.from_batches(parts, schema=PLACE_SCHEMA).to_pylist(), schema=PLACE_SCHEMA)


def facts_of(path: Path) -> FileFacts:
    """Size and hash of a file, read from the disk."""
    with path.open("rb") as file:
        return FileFacts(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=file.tell())


class _Hashed:
    """A file that knows the size and hash of what has been written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, content: bytes) -> int:
        self._file.write(content)
        self.digest.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: the file is closed by who has opened it."""
