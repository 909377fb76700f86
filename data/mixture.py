"""Several sources as one numbered set of records, and which of them an epoch holds."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from data.admission import admit, check_share
from data.config import DataConfig, OnBad
from data.encoder import Encoder, fingerprint
from data.record import Record
from data.sampler import permutation
from data.sources.base import PACKAGE, Source, SourceConfig

if TYPE_CHECKING:  # loads torch
    from data.features import FeatureCache

logger = logging.getLogger(__name__)


class Mixture:
    """The records of all sources behind one index, with their lengths; `epoch` says what is trained on when.

    A source's `weight` is its passes per epoch: 2 shows every record twice, 0.5 shows a half, and the next epoch the
    other half. A source of weight 0 is not opened.

    Attributes:
        tokens: int32, positions of each record (anchors counted), after the over-length rule.
        num_dropped: records left out because they are too long, have no targets or cannot be used.

    Raises:
        UserError: what `open_sources` or the over-length rule raises, images that nobody has looked at where lengths
            depend on them, more records left out than `max_dropped_share` allows, or a source of which an epoch holds
            no record.
    """

    def __init__(self, config: DataConfig, processor: Encoder, features: FeatureCache | None = None) -> None:
        """
        Args:
            features: where the images have been looked at, if the length of a record depends on what they show.
        """
        named = open_sources(config)
        self.sources: tuple[Source, ...] = tuple(source for source, _ in named)
        if processor.needs_token_counts:
            from data.counted import counted  # loads torch

            self.sources = tuple(counted(source, features) for source in self.sources)
        self._weights = tuple(weight for _, weight in named)
        self._encoder_fingerprint = fingerprint(processor)
        admissions = []
        for source in self.sources:
            admissions.append(admit(source, processor, self._encoder_fingerprint, config))
        check_share(self.sources, admissions, config.max_dropped_share)
        self._kept = tuple(admission.kept for admission in admissions)
        for source, weight, kept in zip(self.sources, self._weights, self._kept, strict=True):
            if _share(len(kept), weight) == 0:
                raise UserError(
                    f"an epoch holds no sample of {source.name}",
                    found=f"{source.name}: weight {weight:g} of {len(kept)} records that can be used",
                    expected="at least one, when the product is rounded",
                    remedy=f"raise data.sources.{source.name}.weight (passes per epoch, not a share); 0 leaves it out",
                )
        self._ends = np.cumsum([len(kept) for kept in self._kept])
        self.tokens = np.concatenate([admission.tokens for admission in admissions])
        self.num_dropped = sum(item.num_dropped for item in admissions)
        for source, weight, item in zip(self.sources, self._weights, admissions, strict=True):
            logger.info(
                "%s: %d records, %d too long, %d without targets and %d unusable left out, %g passes per epoch, %.0f "
                "positions on average",
                source.name,
                len(source),
                len(item.too_long),
                len(item.without_targets),
                len(item.unusable),
                weight,
                item.tokens.mean() if len(item.tokens) else 0,
            )

    @property
    def data_fingerprint(self) -> dict[str, str]:
        """What the samples are made of, by name: the processor with its libraries, and each source's files and size."""
        sources = {
            f"source {source.name}": f"{source.fingerprint}, {len(kept)} of {len(source)} records"
            for source, kept in zip(self.sources, self._kept, strict=True)
        }
        return {"processor and tokenization libraries": self._encoder_fingerprint, **sources}

    @property
    def images_digest(self) -> str:
        """Hash of which records are kept of which files; unlike `data_fingerprint` it knows of no tokens."""
        digest = hashlib.sha256()
        for source, kept in zip(self.sources, self._kept, strict=True):
            digest.update(source.fingerprint.encode() + np.ascontiguousarray(kept).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Samples per epoch."""
        return sum(_share(len(kept), weight) for kept, weight in zip(self._kept, self._weights, strict=True))

    def __getitem__(self, number: int) -> Record:
        """The record of that number, its id prefixed with its source's name."""
        source, index = self._find(number)
        record = source[index]
        return replace(record, id=f"{source.name}/{record.id}")

    def sample_id(self, number: int) -> str:
        """The id that `self[number]` has, without reading the record."""
        source, index = self._find(number)
        return f"{source.name}/{source.record_id(index)}"

    def epoch(self, epoch: int, seed: int) -> np.ndarray:
        """Record numbers of one epoch, source by source, int64 (len(self),); the sampler shuffles them.

        Where a weight is not whole, the odd share is a window that moves through one fixed permutation of the source
        from epoch to epoch, so that every record gets its turn.
        """
        numbers = []
        for place, (source, kept, weight) in enumerate(zip(self.sources, self._kept, self._weights, strict=True)):
            start = 0 if place == 0 else int(self._ends[place - 1])
            count = len(kept)
            whole, rest = divmod(_share(count, weight), max(count, 1))
            order = permutation(count, seed, source.name)
            window = (epoch * rest + np.arange(rest)) % max(count, 1)
            numbers.append(start + np.concatenate([np.tile(np.arange(count), whole), order[window]]))
        return np.concatenate(numbers)

    def _find(self, number: int) -> tuple[Source, int]:
        place = int(np.searchsorted(self._ends, number, side="right"))
        start = 0 if place == 0 else int(self._ends[place - 1])
        return self.sources[place], int(self._kept[place][number - start])


def open_sources(config: DataConfig) -> list[tuple[Source, float]]:
    """Opens every source that has a weight, in the order of their names; from their sharded copy where there is one.

    Raises:
        UserError: `data.root` is missing, the copy cannot be read or is of other sources, no source has a weight, what
            a source or its config raises, or (`on_bad_record=error`) a record that cannot be understood.
    """
    root = Path(config.root)
    if config.shards is None and not root.is_dir():
        raise UserError(
            "data.root is not a folder",
            found=f"{root} ({'a file' if root.exists() else 'nothing there'})",
            expected="the folder that the sources' paths start from",
            remedy="set data.root=/path/to/your/data",
        )
    copy = None
    if config.shards is not None:
        from data.sources.sharded import ShardedCopy  # only now: file systems take a while to import

        copy = ShardedCopy(config.shards)
    opened: list[tuple[Source, float]] = []
    for name, spec in sorted(config.sources.items()):
        place = f"data.sources.{name}"
        source = parse_plugin(SourceConfig, spec, PACKAGE, place, f"correct {place} on the command line or in its YAML")
        if source.weight > 0:
            cache_dir = Path(config.cache_dir)
            records = copy.open(name, source, cache_dir) if copy else source.open(name, root, cache_dir)
            opened.append((records, source.weight))
            if config.on_bad_record is OnBad.error:
                records.check_records()
    if not opened:
        raise UserError(
            "there is nothing to train on",
            found=f"data.sources={config.sources}",
            expected="at least one source with a weight above 0",
            remedy="choose data=..., one of conf/data/",
        )
    return opened


def _share(count: int, weight: float) -> int:
    return round(count * weight)
