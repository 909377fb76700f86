"""What the ranks tell each other, once per step in one exchange: its samples, who is slow or full, whether to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchorformer.contracts import Batch
from evals.memory import Memory
from train.distributed import World


@dataclass(frozen=True)
class StepFacts:
    """What all ranks together work on in one step; the same on every rank.

    Attributes:
        sample_ids: rank by rank, micro-batch by micro-batch.
        padding_share: share of positions that ranks wait for instead of computing: within a micro-batch every rank
            waits for the longest. (Batches themselves hold no padding.)
        squares: sum over the samples of their positions squared, which is what attention pays for.
        own_seconds: of each rank, what `train.observe.pace` measures.
        memory: of each rank, the most that it has held up to the exchange.
        signal: name of the signal that asks the run to stop, whichever rank has received it; empty where none has.
    """

    sample_ids: tuple[str, ...]
    tokens: int
    supervised: int
    images: int
    skipped: int
    padding_share: float
    squares: int = 0
    own_seconds: tuple[float, ...] = ()
    memory: tuple[Memory, ...] = ()
    signal: str = ""


def gather_facts(world: World, batches: Sequence[Batch], own_seconds: float = 0.0, signal: str = "") -> StepFacts:
    """One exchange on the host, before the step's first forward, because the loss is divided by its total."""
    mine = [
        (
            batch.sample_ids, batch.num_tokens, batch.num_supervised, batch.tiles_B3HW.shape[0], batch.num_skipped,
            int(batch.cu_seqlens.diff().long().square().sum()),
        )
        for batch in batches
    ]  # fmt: skip
    told = world.gather((mine, own_seconds, Memory.of(world.device), signal))
    ranks, seconds, memory, signals = zip(*told, strict=True)
    every = [micro for rank in ranks for micro in rank]
    tokens = sum(micro[1] for micro in every)
    slots = world.size * sum(max(micro[1] for micro in micros) for micros in zip(*ranks, strict=True))
    return StepFacts(
        sample_ids=tuple(name for micro in every for name in micro[0]),
        tokens=tokens,
        supervised=sum(micro[2] for micro in every),
        images=sum(micro[3] for micro in every),
        skipped=sum(micro[4] for micro in every),
        padding_share=round(1.0 - tokens / slots, 6) if slots else 0.0,
        squares=sum(micro[5] for micro in every),
        own_seconds=seconds,
        memory=memory,
        signal=next(filter(None, signals), ""),
    )
