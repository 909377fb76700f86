"""Estimates how long a step takes on how many cards, and what holds it back: waiting, sending, updating."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from train.config import RunConfig
from train.plan.cards import Card, named_card
from train.plan.dealing import deal
from train.plan.fit import Choice, choose, memory_limit
from train.plan.flops import Work, forward_flops, model_flops, recomputed_flops
from train.plan.links import ADAPTER_GBS, HOST_LINK_GBS, HOST_MEMORY_GBS, NVME_GBS, REACHED, Group
from train.plan.memory import Layout, value_counts
from train.plan.shapes import Shapes
from train.plan.traffic import Message, Phase, Way, step_traffic
from train.zero import Offload

GIGA = 1e9
UPDATE_BYTES = 30
"""Of memory traffic per value that AdamW updates: gradient, fp32 weight and two moments read, these three and the
published weight written."""
MOST_NODES = 1024
ENOUGH = 0.5
"""Share of one node's samples per second and card below which it is said not to scale."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a step's time follows from beside the config.

    Attributes:
        mfu: share of the peak while a card computes.
        work: of a mean sample.
        works: of samples to deal; without them ranks are taken to be even.
        network: GB/s of a node; None has one adapter for each card.
    """

    mfu: float
    work: Work
    works: Sequence[Work] = ()
    network: float | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step, in seconds of every rank.

    Attributes:
        compute: arithmetic of a mean rank.
        waiting: for the slowest rank.
        latency, sending: starts and hops of messages, and their time in motion, as far as no arithmetic hides them.
        update: the optimizer's.
        micro_batches: of a rank.
        traffic: what is sent.
    """

    ranks: int
    nodes: int
    global_batch: int
    micro_batches: float
    compute: float
    waiting: float
    latency: float
    sending: float
    update: float
    traffic: tuple[Message, ...]
    choice: Choice

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting + self.latency + self.sending + self.update

    @property
    def rate(self) -> float:
        """Samples per second of all ranks."""
        return self.global_batch / self.seconds

    @property
    def held_back_by(self) -> str:
        """What most of the time beyond arithmetic goes to, with its share of the step."""
        costs = {
            "the slowest rank": self.waiting, "latency": self.latency, "bytes": self.sending, "the update": self.update,
        }  # fmt: skip
        name = max(costs, key=lambda name: costs[name])
        share = costs[name] / self.seconds
        return f"{name} {share:.0%}" if share >= 0.005 else "nothing"


def step_on(config: RunConfig, shapes: Shapes, card: Card, assumed: Assumed) -> Step:
    """
    Raises:
        UserError: an adapted layer whose shape is not known.
    """
    stage, hardware = config.stage, config.hardware
    choice = choose(config, shapes, memory_limit(config))
    layout, samples, useful = choice.layout, stage.global_batch / config.world_size, 1.0
    micro_batches = max(
        math.ceil(samples / hardware.micro_batch), math.ceil(samples * assumed.work.positions / choice.budget)
    )
    if assumed.works:
        dealt = deal(
            assumed.works, shapes, stage.whole_parts, ranks=config.world_size, global_batch=stage.global_batch,
            micro_batch=hardware.micro_batch, budget=choice.budget,
        )  # fmt: skip
        useful = dealt.useful if layout.zero >= 2 else dealt.by_step
        micro_batches = round(dealt.micro_batches)
    speed = assumed.mfu * card.peak_tflops * 1e12 / samples
    ahead = sum(forward_flops(shapes, assumed.work).values()) / speed
    whole = sum(model_flops(shapes, stage.whole_parts, assumed.work).values()) / speed
    back = whole - ahead + (recomputed_flops(shapes, assumed.work) / speed if layout.checkpointing else 0.0)
    traffic = step_traffic(
        shapes, stage.whole_parts, layout, micro_batches, stage.lora, overlaps=config.zero.overlap_comm,
        qwz=config.zero.qwz, qgz=config.zero.qgz,
    )  # fmt: skip
    # Stages 0 and 1 reduce once, beside the last backward only.
    windows = {
        Phase.forward: ahead,
        Phase.backward: back / (1 if layout.zero >= 2 else micro_batches),
        Phase.after: 0.0,
    }
    latency, sending = _exposed(traffic, windows, config, card, assumed)
    trained = value_counts(shapes, stage.whole_parts, stage.lora)[1]
    return Step(
        ranks=config.world_size, nodes=hardware.nodes, global_batch=stage.global_batch, micro_batches=micro_batches,
        compute=ahead + back, waiting=(ahead + back) * (1 / useful - 1), latency=latency, sending=sending,
        update=_update(layout, card, trained), traffic=tuple(traffic), choice=choice,
    )  # fmt: skip


def _exposed(
    traffic: list[Message], windows: dict[Phase, float], config: RunConfig, card: Card, assumed: Assumed
) -> tuple[float, float]:
    ranks, nodes = config.hardware.ranks, config.hardware.nodes
    network = ADAPTER_GBS * ranks if assumed.network is None else assumed.network
    groups = {
        Way.all: Group(ranks=ranks * nodes, nodes=nodes, link=card.link_gbs, network=network),
        Way.node: Group(ranks=ranks, nodes=1, link=card.link_gbs, network=network),
    }
    speeds = {Way.host: REACHED * HOST_LINK_GBS, Way.disk: NVME_GBS / ranks}
    latency = sending = 0.0
    for phase, window in windows.items():
        hidden_latency = hidden = 0.0
        for message in (message for message in traffic if message.phase is phase):
            if message.way in groups:
                starts, moves = groups[message.way].ring_seconds(message.size, message.calls)
            else:
                starts, moves = 0.0, message.size / (speeds[message.way] * GIGA)
            if message.hides:
                hidden_latency, hidden = hidden_latency + starts, hidden + moves
            else:
                latency, sending = latency + starts, sending + moves
        together = hidden_latency + hidden
        share = max(0.0, 1 - window / together) if together else 0.0
        latency, sending = latency + share * hidden_latency, sending + share * hidden
    return latency, sending


def _update(layout: Layout, card: Card, trained: int) -> float:
    mine = trained / (layout.ranks if layout.zero else 1)
    is_on_card = layout.optimizer is Offload.none
    speed = card.memory_gbs if is_on_card else HOST_MEMORY_GBS / layout.node_ranks
    return UPDATE_BYTES * mine / (speed * GIGA)


def on_nodes(config: RunConfig, nodes: int, *, grows: bool) -> RunConfig | None:
    """The run on so many nodes; None where the global batch cannot be dealt evenly to their ranks.

    Args:
        grows: the global batch grows with the ranks, from what one node has; else it stays.
    """
    ranks, batch = config.hardware.ranks, config.stage.global_batch
    if grows:
        batch = batch // ranks * ranks * nodes
    if batch % (ranks * nodes):
        return None
    zero = config.zero if nodes > 1 else replace(config.zero, hpz=False, qgz=False)
    hardware = replace(config.hardware, nodes=nodes)
    return replace(config, zero=zero, hardware=hardware, stage=replace(config.stage, global_batch=batch))


def steps_on_nodes(
    config: RunConfig, shapes: Shapes, assumed: Assumed, nodes: list[int], *, grows: bool
) -> Iterator[tuple[int, Step | None]]:
    """Nodes and the step on them, or None where it cannot be dealt."""
    assert config.hardware.card is not None
    for count in nodes:
        run = on_nodes(config, count, grows=grows)
        yield count, None if run is None else step_on(run, shapes, named_card(config.hardware.card), assumed)


def last_that_scales(config: RunConfig, shapes: Shapes, assumed: Assumed, *, grows: bool) -> tuple[int, str]:
    """Nodes, doubled from one, up to which a card gives `ENOUGH` of what it gives in one node, and why no further."""
    one, last = 0.0, 1
    doubled = [2**power for power in range(int(math.log2(MOST_NODES)) + 1)]
    for count, step in steps_on_nodes(config, shapes, assumed, doubled, grows=grows):
        if step is None:
            return last, f"{config.stage.global_batch} samples cannot be dealt evenly to {count} nodes"
        if not step.choice.fits:
            return last, "it does not fit"
        per_card = step.rate / step.ranks
        one = one or per_card
        if per_card < ENOUGH * one:
            return last, step.held_back_by
        last = count
    return last, "no more were tried"
