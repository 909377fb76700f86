"""Examples end to end in one row: the flat micro-batch, with everything a step needs computed on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch

from anchorformer.contracts import IGNORE_INDEX, Batch, Example
from data.encoder import Encoder


def collate(examples: Sequence[Example], filler: Example | None = None, num_skipped: int = 0) -> Batch:
    """Packs samples without padding; a sample's last position predicts nothing, least of all the next sample.

    Args:
        filler: what stands for no samples at all: one position without targets and without images, so that a rank
            with nothing to do still runs the same forward and backward as the others.
        num_skipped: samples of this micro-batch that were left out because of their images.

    Raises:
        ValueError: neither examples nor a filler.
    """
    parts = [*examples] or [part for part in [filler] if part is not None]
    if not parts:
        raise ValueError("an empty micro-batch needs a filler")
    lengths = [part.input_ids_S.numel() for part in parts]
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    borders[1:] = torch.tensor(lengths).cumsum(0)
    next_labels = torch.cat(
        [torch.cat([part.labels_S[1:], part.labels_S.new_full((1,), IGNORE_INDEX)]) for part in parts]
    )
    known = [part.token_counts for part in parts]
    predict_index = (next_labels != IGNORE_INDEX).nonzero().squeeze(1)
    return Batch(
        input_ids_S=torch.cat([part.input_ids_S for part in parts]),
        position_ids_S=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=borders,
        max_seqlen=max(lengths),
        tiles_B3HW=torch.cat([part.tiles_B3HW for part in parts]),
        predict_index_Q=predict_index,
        targets_Q=next_labels[predict_index],
        sample_ids=tuple(example.sample_id for example in examples),
        num_skipped=num_skipped,
        tile_counts=tuple(count for part in parts for count in _tile_counts(part)),
        token_counts=None if None in known else tuple(chain.from_iterable(filter(None, known))),
    )


def _tile_counts(example: Example) -> tuple[int, ...]:
    return (1,) * example.tiles_B3HW.shape[0] if example.tile_counts is None else example.tile_counts


def make_filler(processor: Encoder) -> Example:
    """The first position of a text-only sample (its BOS), unsupervised, with no tiles of the processor's size."""
    example = processor.encode([("user", "a"), ("assistant", "a")], [], sample_id="")
    return replace(
        example, input_ids_S=example.input_ids_S[:1], labels_S=torch.full_like(example.labels_S[:1], IGNORE_INDEX)
    )
