"""Which samples a step holds and which rank computes which; a pure function of (seed, epoch, consumed) and lengths."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from anchorformer.errors import UserError

MicroBatches = list[list[int]]
"""Of one rank: places in the global batch, one list per micro-batch."""


def permutation(count: int, *key: object) -> np.ndarray:
    """A permutation of range(count) that depends on `key` alone, int64.

    Indices are sorted by splitmix64 of (key, index) (Steele et al. 2014), so that neither numpy's nor torch's generator
    can change an order between versions.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.frombuffer(digest[:8], "<u8").astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


@dataclass(frozen=True, slots=True)
class SamplerState:
    """The whole position in the data; the same for every rank, and for any number of ranks and workers.

    Attributes:
        seed: of the run.
        epoch: passes over the mixture that are complete.
        consumed: samples of the current pass that are.
    """

    seed: int
    epoch: int = 0
    consumed: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Sampler:
    """Deals out global batches: each epoch's samples in an order of its own, one epoch after the other.

    A batch at the end of an epoch is filled up from the next one's order; nothing is dropped and nothing is padded.

    Args:
        epoch: record numbers of an epoch, from (epoch, seed).
        size: samples per epoch.
        global_batch: samples per optimizer step over all ranks.
    """

    def __init__(self, epoch: Callable[[int, int], np.ndarray], size: int, global_batch: int) -> None:
        self._epoch, self.size, self.global_batch = epoch, size, global_batch
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, state: SamplerState) -> np.ndarray:
        """Record numbers of the step that begins at `state`, int64 (global_batch,)."""
        parts: list[np.ndarray] = []
        missing, epoch, first = self.global_batch, state.epoch, state.consumed
        while missing:
            part = self._order(state.seed, epoch)[first : first + missing]
            parts.append(part)
            missing, epoch, first = missing - len(part), epoch + 1, 0
        return np.concatenate(parts)

    def after(self, state: SamplerState, steps: int = 1) -> SamplerState:
        """The position `steps` global batches further on."""
        total = state.epoch * self.size + state.consumed + steps * self.global_batch
        return SamplerState(state.seed, *divmod(total, self.size))

    def steps_before(self, state: SamplerState) -> int:
        """Whole global batches between the start and `state`."""
        return (state.epoch * self.size + state.consumed) // self.global_batch

    def digest(self, seed: int, steps: int) -> str:
        """Hash of the record numbers of the first `steps` global batches, in their order."""
        missing, epoch, digest = steps * self.global_batch, 0, hashlib.sha256()
        while missing > 0:
            part = self._order(seed, epoch)[:missing]
            digest.update(part.astype("<i8").tobytes())
            missing, epoch = missing - len(part), epoch + 1
        return digest.hexdigest()

    def restore(self, saved: Mapping[str, int], seed: int) -> SamplerState:
        """The position of a checkpoint.

        Raises:
            UserError: other keys, another seed, or a position that this mixture does not have.
        """
        try:
            state = SamplerState(**saved)
        except TypeError:
            state = SamplerState(seed, -1, -1)
        if state.seed != seed or state.epoch < 0 or not 0 <= state.consumed < self.size:
            raise UserError(
                "the saved position in the data does not fit this run",
                found=dict(saved),
                expected=f"seed={seed}, epoch >= 0 and 0 <= consumed < {self.size} samples per epoch",
                remedy="resume with the data and the seed that the checkpoint was written with",
            )
        return state

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        if (seed, epoch) not in self._orders:
            # A batch reaches over an epoch's end at most into the next ones; older orders are not needed again.
            self._orders = {key: order for key, order in self._orders.items() if key[1] >= epoch - 1}
            numbers = self._epoch(epoch, seed)
            self._orders[seed, epoch] = numbers[permutation(len(numbers), seed, "epoch", epoch)]
        return self._orders[seed, epoch]


def plan_step(
    lengths: Sequence[int], world_size: int, micro_batch: int, token_budget: int | None = None
) -> list[MicroBatches]:
    """Deals the samples of one global batch to ranks and micro-batches.

    Ranks get equally many samples and nearly equal numbers of positions (longest first, to the rank with the least).
    Every rank gets the same number of micro-batches, as many as the neediest rank needs; within a rank they are
    balanced and ordered by size, so that the ranks' large ones meet.

    Args:
        lengths: positions of each sample.
        micro_batch: most samples in one micro-batch.
        token_budget: most positions in one micro-batch.

    Returns:
        Per rank its micro-batches of places in `lengths`, ascending within a micro-batch.

    Raises:
        ValueError: samples that cannot be shared out evenly, or one longer than the budget (`Loader` checks both
            before a run starts).
    """
    if len(lengths) % world_size:
        raise ValueError(f"{len(lengths)} samples cannot be dealt evenly to {world_size} ranks")
    if token_budget is not None and max(lengths) > token_budget:
        raise ValueError(f"a sample of {max(lengths)} positions exceeds the token budget of {token_budget}")
    shares = _deal(range(len(lengths)), lengths, world_size, len(lengths) // world_size, None)
    assert shares is not None
    # Micro-batches that the neediest rank needs; the others spread their samples over as many, so that none is empty.
    count = max(_at_least(share, lengths, micro_batch, token_budget) for share in shares)
    dealt = [_deal(share, lengths, count, micro_batch, token_budget) for share in shares]
    while any(bins is None for bins in dealt):
        count += 1
        dealt = [_deal(share, lengths, count, micro_batch, token_budget) for share in shares]
    plan = []
    for bins in dealt:
        assert bins is not None
        bins.sort(key=lambda places: (-sum(lengths[place] for place in places), places))
        plan.append([sorted(places) for places in bins])
    return plan


def _at_least(places: Sequence[int], lengths: Sequence[int], micro_batch: int, token_budget: int | None) -> int:
    by_samples = math.ceil(len(places) / micro_batch)
    if token_budget is None:
        return by_samples
    return max(by_samples, math.ceil(sum(lengths[place] for place in places) / token_budget))


def _deal(
    places: Sequence[int], lengths: Sequence[int], count: int, most_samples: int, most_tokens: int | None
) -> list[list[int]] | None:
    """Longest processing time first into `count` bins with both limits, or None where a sample finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    # A heap by load: with hundreds of bins, looking at all of them for every sample would hold up the step.
    open_bins = [(0, index) for index in range(count)]
    for place in sorted(places, key=lambda place: (-lengths[place], place)):
        if not open_bins or (most_tokens is not None and open_bins[0][0] + lengths[place] > most_tokens):
            return None  # the emptiest has no room for it, so no other has
        load, best = open_bins[0]
        bins[best].append(place)
        if len(bins[best]) < most_samples:
            heapq.heapreplace(open_bins, (load + lengths[place], best))
        else:
            heapq.heappop(open_bins)
    return bins
