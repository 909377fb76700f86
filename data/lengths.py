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
from data.config import Overlength
from data.encoder import Encoder, measured
from data.sources.base import Source

FORMAT = 1
"""Raised whenever the same records would be counted otherwise; part of every cache key."""

UNUSABLE = -1
"""Length of a record that its source or the processor refuses; asking it again gives the reason."""

CHUNK = 2000
"""Records per task: about half a second of tokenisation."""

RECORDS_PER_PROCESS = 10_000
"""Records below which one more process takes longer to start than it saves."""

MOST_PROCESSES = 32
"""Each one imports torch and holds a copy of the tokenizer, whatever the number of CPUs."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Per record of one source, int32: positions (anchors counted) and supervised tokens."""

    tokens: np.ndarray
    supervised: np.ndarray


def measure(source: Source, encoder: Encoder, encoder_fingerprint: str, cache_dir: Path) -> Lengths:
    """Counts every record of `source` with nothing cut, or reads the table of an earlier count.

    Args:
        encoder_fingerprint: `data.encoder.fingerprint` of the processor; with the source's own it names the table.
    """
    stem = f"{source.name}-{source.fingerprint}-{encoder_fingerprint}-{FORMAT}"
    return _table(cache_dir / f"{stem}.lengths.npy", source, encoder, range(len(source)), None)


def measure_shortened(
    source: Source, encoder: Encoder, encoder_fingerprint: str, cache_dir: Path, long: np.ndarray, max_length: int
) -> Lengths:
    """Counts what is left of over-length records under `truncate_answer`, or reads the table of an earlier count.

    Args:
        long: numbers of all the records of `source` that exceed `max_length` and have targets; int64, ascending. They
            follow from the table of `measure`, so that `max_length` alone tells two of these tables apart.

    Returns:
        Per record in `long`; one that cannot be shortened keeps a length above `max_length`, or has no target left.
    """
    stem = f"{source.name}-{source.fingerprint}-{encoder_fingerprint}-{FORMAT}"
    name = f"{stem}-{Overlength.truncate_answer.value}-{max_length}.lengths.npy"
    return _table(cache_dir / name, source, encoder, long.tolist(), max_length)


def _table(path: Path, source: Source, encoder: Encoder, indices: Sequence[int], shorten_to: int | None) -> Lengths:
    """One rank counts, the others wait for it and read."""
    with locked(path):
        if not path.exists():
            counted = _count(source, encoder, indices, shorten_to, _processes(len(indices)))
            with written_whole(path) as draft, draft.open("wb") as file:
                np.save(file, counted)
    counts = np.load(path, mmap_mode="r")
    return Lengths(counts[0], counts[1])


def _processes(num_records: int) -> int:
    return max(1, min(len(os.sched_getaffinity(0)), MOST_PROCESSES, num_records // RECORDS_PER_PROCESS))


def _count(
    source: Source, encoder: Encoder, indices: Sequence[int], shorten_to: int | None, processes: int
) -> np.ndarray:
    """Positions and supervised tokens of the records, int32 (2, len(indices))."""
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    what = "tokens" if shorten_to is None else "shortened records"
    title = f"counting {what} of {source.name}"
    counted = [np.empty((2, 0), np.int32)]
    with tqdm(total=len(indices), desc=title, unit=" records", delay=2, mininterval=0.5) as progress:
        for chunk in _chunks(source, encoder, chunks, shorten_to, min(processes, len(chunks))):
            counted.append(chunk)
            progress.update(chunk.shape[1])
    return np.concatenate(counted, axis=1)


def _chunks(
    source: Source, encoder: Encoder, chunks: Sequence[Sequence[int]], shorten_to: int | None, processes: int
) -> Iterator[np.ndarray]:
    if processes <= 1:
        yield from (_chunk(source, encoder, shorten_to, indices) for indices in chunks)
        return
    # Spawned, not forked: this process may hold threads, sockets of the other ranks and a device.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _enter_worker, (source, encoder, shorten_to)) as pool:
        yield from pool.map(_worker_chunk, chunks)


def _chunk(source: Source, encoder: Encoder, shorten_to: int | None, indices: Sequence[int]) -> np.ndarray:
    rule = Overlength.error if shorten_to is None else Overlength.truncate_answer
    counts = np.empty((2, len(indices)), np.int32)
    for column, index in enumerate(indices):
        try:
            counts[:, column] = measured(encoder, source[index], max_length=shorten_to, overlength=rule.value)
        except UserError:
            counts[:, column] = UNUSABLE
    return counts


_worker: tuple[Source, Encoder, int | None] | None = None
"""What a counting process works on; sent once, not with every chunk."""


def _enter_worker(source: Source, encoder: Encoder, shorten_to: int | None) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = source, encoder, shorten_to


def _worker_chunk(indices: Sequence[int]) -> np.ndarray:
    assert _worker is not None
    return _chunk(*_worker, indices)
