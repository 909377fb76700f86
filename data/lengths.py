"""How long every record is, counted once in parallel and kept as a memory-mapped table."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from anchorformer.errors import UserError
from data.arrow import locked, written_whole
from data.encoder import Encoder, turns_of
from data.sources.base import Source

FORMAT = 1
"""Raised whenever the same records would be counted otherwise; part of every cache key."""

UNUSABLE = -1
"""Length of a record that the processor refuses; asking it again gives the reason."""

CHUNK = 2000
"""Records per task: about half a second of tokenisation."""

PARALLEL_FROM = 20_000
"""Records below which starting processes takes longer than counting here."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Per record of one source, int32: positions (anchors counted, nothing cut) and supervised tokens."""

    tokens: np.ndarray
    supervised: np.ndarray


def measure(
    source: Source, encoder: Encoder, encoder_fingerprint: str, cache_dir: Path, processes: int | None = None
) -> Lengths:
    """Counts every record of `source`, or reads the table of an earlier count.

    Args:
        encoder_fingerprint: `data.encoder.fingerprint` of the processor; with the source's own it names the table.
        processes: null takes every CPU this process may run on, where there is enough to count.
    """
    table = cache_dir / f"{source.name}-{source.fingerprint}-{encoder_fingerprint}-{FORMAT}.lengths.npy"
    with locked(table):
        if not table.exists():
            counted = _count(source, encoder, processes or len(os.sched_getaffinity(0)))
            with written_whole(table) as draft, draft.open("wb") as file:
                np.save(file, counted)
    counts = np.load(table, mmap_mode="r")
    return Lengths(counts[0], counts[1])


def _count(source: Source, encoder: Encoder, processes: int) -> np.ndarray:
    ranges = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    title = f"counting tokens of {source.name}"
    with tqdm(total=len(source), desc=title, unit=" records", delay=2, mininterval=0.5) as progress:
        chunks = []
        for chunk in _chunks(source, encoder, ranges, processes if len(source) >= PARALLEL_FROM else 1):
            chunks.append(chunk)
            progress.update(chunk.shape[1])
    return np.concatenate(chunks, axis=1)


def _chunks(source: Source, encoder: Encoder, ranges: Sequence[range], processes: int) -> Iterator[np.ndarray]:
    if processes == 1:
        yield from (_chunk(source, encoder, indices) for indices in ranges)
        return
    # Spawned, not forked: this process may hold threads, sockets of the other ranks and a device.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _enter_worker, (source, encoder)) as pool:
        yield from pool.map(_worker_chunk, ranges)


def _chunk(source: Source, encoder: Encoder, indices: range) -> np.ndarray:
    counts = np.empty((2, len(indices)), np.int32)
    for column, index in enumerate(indices):
        record = source[index]
        try:
            counts[:, column] = encoder.measure(turns_of(record), len(record.images))
        except UserError:
            counts[:, column] = UNUSABLE
    return counts


_worker: tuple[Source, Encoder] | None = None
"""What a counting process works on; sent once, not with every range."""


def _enter_worker(source: Source, encoder: Encoder) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = source, encoder


def _worker_chunk(indices: range) -> np.ndarray:
    assert _worker is not None
    return _chunk(*_worker, indices)
