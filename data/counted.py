"""Records whose images were looked at before the run: how many embeddings each tile has goes with the record.

Where a selector gives images different numbers of anchors, the length of a record depends on what the vision tower
sees. So every image of a source is looked at once, the features and the choice are kept (`data.features`), and beside
them, for the whole source, how many tokens were chosen of each tile: text is laid out by these numbers, and a batch
whose features say otherwise is refused.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from data.arrow import locked, written_whole
from data.config import OnBad
from data.features import FeatureCache
from data.fill import filled
from data.record import Record
from data.sources.base import Source

log = logging.getLogger(__name__)

TokenCounts = tuple[tuple[int, ...], ...]
"""Of each image the embeddings of each of its tiles."""


@dataclass(frozen=True, slots=True)
class Table:
    """The counts of all records of a source, end to end.

    Attributes:
        images: where the images of each record begin, and where the last ones end, int64 (records + 1,).
        tiles: where the tiles of each image begin and end, int64 (images + 1,).
        tokens: embeddings of each tile, int32.
    """

    images: np.ndarray
    tiles: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, counts: list[TokenCounts]) -> Table:
        """The table of records by number."""
        flat = [own for record in counts for own in record]
        return cls(
            _borders([len(record) for record in counts]), _borders([len(own) for own in flat]),
            np.array([count for own in flat for count in own], np.int32),
        )  # fmt: skip

    def __getitem__(self, number: int) -> TokenCounts:
        """The counts of one record."""
        borders = self.tiles[self.images[number] : self.images[number + 1] + 1].tolist()
        return tuple(tuple(self.tokens[start:end].tolist()) for start, end in pairwise(borders))

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for array in (self.images, self.tiles, self.tokens):
            digest.update(array.tobytes())
        return digest.hexdigest()


class CountedSource:
    """A source whose records bring their `token_counts` along; another table is another source."""

    def __init__(self, source: Source, table: Table) -> None:
        self._source, self._table = source, table
        self.name = source.name
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {table.digest}".encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """
        Raises:
            UserError: as the source.
        """
        return replace(self._source[index], token_counts=self._table[index])

    def check_records(self) -> None:
        """
        Raises:
            UserError: as the source.
        """
        self._source.check_records()

    def record_id(self, index: int) -> str:
        """The id of that record."""
        return self._source.record_id(index)


def counted(source: Source, cache: FeatureCache | None) -> CountedSource:
    """The source with what was counted of it.

    Raises:
        UserError: there is no cache, nothing was counted, or the table is damaged.
    """
    if cache is None:
        raise needs_cache()
    path = cache.counts_of(source.fingerprint)
    try:
        with np.load(path, allow_pickle=False) as stored:
            table = Table(**{name: stored[name] for name in Table.__slots__})
    except FileNotFoundError:
        raise UserError(
            f"the images of {source.name} have not been looked at", found=f"no {path}",
            expected="how many embeddings each of them has, before text is laid out",
            remedy="start through `python -m train`, which looks first",
        ) from None  # fmt: skip
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, str(error)) from None
    ends = len(table.images) - 1, int(table.images[-1]), int(table.tiles[-1])
    expected = len(source), len(table.tiles) - 1, len(table.tokens)
    if ends != expected or int(table.tokens.min(initial=1)) < 1:
        raise _damaged(path, f"records, images and tiles {ends} in place of {expected}")
    return CountedSource(source, table)


def count(
    source: Source, cache: FeatureCache, transform: ImageTransform, *, on_bad_image: OnBad, num_workers: int = 0
) -> None:
    """Looks at every image of a source, where no earlier run has, and writes down how many tokens were chosen of each.

    Args:
        transform, on_bad_image, num_workers: as `data.fill.fill` takes them. An image that cannot be read has no
            tiles; its record is never encoded.

    Raises:
        UserError: as `data.fill.fill`.
    """
    path = cache.counts_of(source.fingerprint)
    with locked(path):
        if path.is_file():
            return
        keys: dict[int, list[bytes]] = {}
        for found in filled(cache, _Usable(source), range(len(source)), transform, on_bad_image, num_workers):
            keys[found.number] = [bytes.fromhex("".join(own)) for own in found.keys]
        counts = [
            tuple(tuple(cache.num_chosen(own[at : at + 32].hex()) for at in range(0, len(own), 32))
                  for own in keys[number])
            for number in range(len(source))
        ]  # fmt: skip
        table = Table.of(counts)
        with written_whole(path) as draft, draft.open("wb") as file:
            np.savez(file, **{name: getattr(table, name) for name in Table.__slots__})
    tokens = table.tokens if len(table.tokens) else np.zeros(1)
    log.info("%s: %d tiles of %.1f embeddings on average, %d to %d", source.name, len(table.tokens), tokens.mean(),
             tokens.min(), tokens.max())  # fmt: skip


def needs_cache() -> UserError:
    """What is said where lengths depend on what images show and there is no cache to read them from."""
    return UserError(
        "the length of a sample depends on what the vision tower sees of its images", found="data.feature_cache=null",
        expected="a folder in which every image is looked at once, before the run",
        remedy="set data.feature_cache=.cache/features, or choose a selector with num_anchors",
    )  # fmt: skip


class _Usable:
    """A source's records under their full ids; those that it refuses have no images."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, number: int) -> Record:
        try:
            record = self._source[number]
        except UserError:  # which data.on_bad_record is asked about where records are admitted
            return Record(id="", images=(), turns=())
        return replace(record, id=f"{self._source.name}/{record.id}")


def _borders(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def _damaged(path: object, found: str) -> UserError:
    return UserError(
        f"the counts in {path} are damaged", found=found, expected="the table as it was written",
        remedy="remove that file and start again: no image is computed anew",
    )  # fmt: skip
