"""Which records are trained on: what is too long, has nothing to learn from, or cannot be encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anchorformer.errors import UserError
from data.config import DataConfig, OnBad, Overlength
from data.encoder import Encoder, measured
from data.lengths import UNUSABLE, Lengths, measure, measure_shortened
from data.sources.base import Source

NAMED = 5
"""How many records an error names."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What is left of one source, and why the rest is not.

    Attributes:
        kept: int64 record numbers, ascending.
        tokens: int32 positions of each kept record, after the over-length rule.
        too_long: record numbers left out because they exceed the longest length (and, under `truncate_answer`, cannot
            be shortened without cutting an anchor or every target).
        without_targets: record numbers left out because no token of them is supervised.
        unusable: record numbers left out because their source or the processor refuses them.
    """

    kept: np.ndarray
    tokens: np.ndarray
    too_long: np.ndarray
    without_targets: np.ndarray
    unusable: np.ndarray

    @property
    def num_dropped(self) -> int:
        """Records left out, for whatever reason."""
        return len(self.too_long) + len(self.without_targets) + len(self.unusable)


def admit(source: Source, encoder: Encoder, encoder_fingerprint: str, config: DataConfig) -> Admission:
    """Counts one source, or reads what was counted before, and applies the over-length rule to it.

    Raises:
        UserError: a record that cannot be used (`on_bad_record=error`), or one that is too long (`overlength=error`);
            named by id.
    """
    max_length = config.max_length
    lengths = measure(source, encoder, encoder_fingerprint, Path(config.cache_dir))
    tokens = np.array(lengths.tokens)
    unusable = np.flatnonzero(tokens == UNUSABLE)
    if len(unusable) and config.on_bad_record is OnBad.error:
        explain(source, encoder, int(unusable[0]))
    without_targets = np.flatnonzero(lengths.supervised == 0)
    long = _long(lengths, max_length)
    if len(long) and config.overlength is Overlength.error:
        shown = ", ".join(f"{source.name}/{source.record_id(int(i))} ({tokens[i]})" for i in long[:NAMED])
        raise UserError(
            f"{len(long)} record(s) of {source.name} are longer than data.max_length",
            found=f"{shown}{', ...' if len(long) > NAMED else ''} positions, anchors counted",
            expected=f"at most {max_length}",
            remedy="raise data.max_length, or choose data.overlength=drop or truncate_answer",
        )
    if config.overlength is Overlength.truncate_answer:
        short, left = shortened(source, encoder, encoder_fingerprint, config, lengths)
        tokens[short] = left
        long = np.setdiff1d(long, short, assume_unique=True)
    kept = np.setdiff1d(np.arange(len(tokens)), np.concatenate([long, without_targets, unusable]), assume_unique=True)
    return Admission(kept, tokens[kept], long, without_targets, unusable)


def shortened(
    source: Source, encoder: Encoder, encoder_fingerprint: str, config: DataConfig, lengths: Lengths
) -> tuple[np.ndarray, np.ndarray]:
    """What `truncate_answer` makes of the over-length records.

    Args:
        lengths: of `source`, with nothing cut.

    Returns:
        int64 numbers of those that fit when the end of an answer is cut, ascending, and int32 positions that each of
        them has then; the others would lose an anchor or every target.
    """
    long = _long(lengths, config.max_length)
    if len(long) == 0:
        return long, lengths.tokens[long]
    left = measure_shortened(source, encoder, encoder_fingerprint, Path(config.cache_dir), long, config.max_length)
    fits = (left.tokens <= config.max_length) & (left.supervised > 0)
    return long[fits], left.tokens[fits]


def check_share(sources: Sequence[Source], admissions: Sequence[Admission], ceiling: float) -> None:
    """Refuses a mixture of which too much is left out.

    Raises:
        UserError: with the counts by source and reason, and a few ids.
    """
    total = sum(len(source) for source in sources)
    reasons = []
    dropped = 0
    for source, admission in zip(sources, admissions, strict=True):
        dropped += admission.num_dropped
        for reason, indices in (
            ("too long", admission.too_long), ("without targets", admission.without_targets),
            ("that cannot be used", admission.unusable),
        ):  # fmt: skip
            if len(indices):
                shown = ", ".join(source.record_id(int(index)) for index in indices[:NAMED])
                reasons.append(f"{source.name}: {len(indices)} {reason} ({shown}{', ...' * (len(indices) > NAMED)})")
    if dropped > ceiling * total or dropped == total:
        raise UserError(
            "too many records would be left out",
            found=f"{dropped} of {total}; " + "; ".join(reasons),
            expected=f"a share of at most {ceiling} (data.max_dropped_share)",
            remedy="look at them with `python -m data scan`; raise data.max_length or the share, or mend the data",
        )


def explain(source: Source, encoder: Encoder, index: int) -> None:
    """Encodes a record again that was counted as unusable, for the reason.

    Raises:
        UserError: the source's, or the processor's with the record's id.
    """
    record = source[index]
    try:
        measured(encoder, record)
    except UserError as error:
        raise UserError(
            f"{source.name}/{record.id}: {error.what}",
            found=error.found,
            expected=error.expected,
            remedy=f"{error.remedy}; data.on_bad_record=skip leaves such records out, `python -m data scan` lists them",
        ) from None


def _long(lengths: Lengths, max_length: int) -> np.ndarray:
    return np.flatnonzero((lengths.tokens > max_length) & (lengths.supervised > 0))
