"""`bench gpu-ladder`: what each change is worth, one rung at a time, on the same samples dealt to eight ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anchorformer.contracts import Batch
from anchorformer.errors import run_guarded
from anchorformer.lean import make_lean
from bench.gpu.as_published import PaddedBatch, PublishedSelector, collate_padded, padded_loss, published_vision
from bench.gpu.emulate import NOT_INCLUDED, EmulatedRank, checkpoint_layers, run_step
from bench.gpu.session import Columns, Session, parser
from bench.gpu.shapes import (
    LONGEST,
    Length,
    build_language_model,
    build_model,
    image_tokens,
    make_examples,
    plan_shapes,
    read_lengths,
    stage_config,
)  # fmt: skip
from bench.gpu.step import peaks
from bench.gpu.timing import release, synchronize
from bench.published.batching import grouped, useful_share
from bench.published.connector import PublishedConnector
from data.collate import collate
from data.sampler import plan_step
from train.loss import supervised_loss
from train.plan.flops import Work, model_flops

KIND = "anchor_former"
RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Everything in which a step of ours differs from a published one; each is off or on.

    Attributes:
        vision: the tower up to the tapped block with one row of scores, instead of all blocks with eager maps.
        selection: without leaving the device, instead of loops over images and heads.
        connector: fused attention, instead of einsums.
        head: logits of supervised positions, instead of all.
        packed: samples end to end and dealt by length, instead of padded groups.
        lean: language model layers that save what they need, instead of transformers' own.
        keeps_activations: instead of checkpointing every layer.
        compiled: vision tower and connector through torch.compile.
    """

    vision: bool = False
    selection: bool = False
    connector: bool = False
    head: bool = False
    packed: bool = False
    lean: bool = False
    keeps_activations: bool = False
    compiled: bool = False


def rungs() -> list[tuple[str, Switches]]:
    """As published, then one switch more on each rung."""
    ladder = [("as published", Switches())]
    for name in Switches.__dataclass_fields__:
        ladder.append((f"+ {name.replace('_', ' ')}", replace(ladder[-1][1], **{name: True})))
    return ladder


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One optimizer step's samples and how both samplers deal them to the ranks.

    Attributes:
        published: per rank its samples, in one padded micro-batch.
        dealt: per rank its packed micro-batches.
        padded_share, packed_share: real positions of those computed while all ranks wait for the slowest.
    """

    lengths: list[Length]
    published: list[list[int]]
    dealt: list[list[list[int]]]
    padded_share: float
    packed_share: float


def draw(stage: int, lengths: Sequence[Length], num_image_tokens: int, batch: int) -> Samples:
    """The step of an epoch in which the published sampler's share of real positions is the middle one.

    Stage 2 is grouped by modality and length as LLaVA does, and the step is one with images; stage 1 is not grouped.
    """
    positions = [length.positions(num_image_tokens) for length in lengths]
    usable = [index for index, count in enumerate(positions) if count <= LONGEST]
    if stage == 1:
        usable = [index for index in usable if lengths[index].images]
        order = [usable[place] for place in torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))]
        size = RANKS * batch
        steps = [
            [order[start + rank * batch : start + (rank + 1) * batch] for rank in range(RANKS)]
            for start in range(0, len(order) - size + 1, size)
        ]
    else:
        steps = grouped(
            [lengths[index].words for index in usable], [lengths[index].images > 0 for index in usable], RANKS, batch, 0
        )
        steps = [[[usable[place] for place in share] for share in step] for step in steps]
        steps = [step for step in steps if all(lengths[index].images for share in step for index in share)]
    if not steps:
        raise ValueError(f"{len(usable)} samples do not fill one step of {RANKS} x {batch} with images")
    step = sorted(steps, key=lambda step: useful_share([step], positions))[len(steps) // 2]
    members = [index for share in step for index in share]
    place = {index: number for number, index in enumerate(members)}
    counts = [positions[index] for index in members]
    published = [[place[index] for index in share] for share in step]
    dealt = plan_step(counts, RANKS, batch)
    slowest = max(sum(counts[number] for micro in share for number in micro) for share in dealt)
    return Samples(
        lengths=[lengths[index] for index in members], published=published, dealt=dealt,
        padded_share=useful_share([published], counts), packed_share=sum(counts) / (RANKS * slowest),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("gpu-ladder", __doc__)
    options.add_argument("--stages", default="2,1", help="comma-separated (default: 2,1)")
    options.add_argument("--distributions", default="counted,captions", help="also: mixture")
    options.add_argument("--repeats", type=int, default=1, help="timed steps per rank (default: 1)")
    parsed = options.parse_args(arguments)
    session = Session("gpu-ladder", parsed)
    session.sheet.facts |= {"ranks": RANKS, "not_included": NOT_INCLUDED}
    print(f"{RANKS} ZeRO-2 ranks one after the other, the slowest counts; {NOT_INCLUDED} not included")
    session.measure_ceilings()
    distributions, wanted = read_lengths(session.lengths, tiny=session.tiny), parsed.distributions.split(",")
    for stage in (int(stage) for stage in parsed.stages.split(",")):
        for name, lengths in distributions[stage].items():
            if name in wanted:
                Ladder(session, stage, name, lengths, parsed.repeats).climb()
                release(session.scale.device)
    session.close()


class Ladder:
    """One stage's rungs over one distribution of lengths."""

    def __init__(self, session: Session, stage: int, name: str, lengths: Sequence[Length], repeats: int) -> None:
        self.session, self.stage, self.name, self.repeats = session, stage, name, repeats
        scale = session.scale
        self.stage_config = stage_config(stage)
        self.batch = 2 if session.tiny else self.stage_config.global_batch // RANKS
        self.language_model = build_language_model(scale)
        self.model = build_model(scale, KIND, self.language_model)
        self.samples = draw(stage, lengths, image_tokens(self.model), self.batch)
        self.examples = make_examples(self.model, self.samples.lengths)
        self.supervised = sum(length.supervised for length in self.samples.lengths)
        self.parts = {
            "vision_tower": (published_vision(scale, self.model.vision_tower), self.model.vision_tower),
            "selector": (PublishedSelector(scale.num_anchors), self.model.selector),
            "connector": (PublishedConnector(self.model.connector), self.model.connector),
        }
        """Attribute of the model -> as published, ours; the same weights in both."""

    def climb(self) -> None:
        """Measures every rung, lowest first."""
        rank = EmulatedRank(self.model, self.stage_config, RANKS)
        slowest: list[float] = []
        for name, switches in rungs():
            labels = {"what": "ladder", "stage": self.stage, "lengths": self.name, "rung": name}

            def row(switches: Switches = switches) -> Columns:
                self._set(switches)
                columns = self._measure(rank, switches)
                slowest.append(columns["slowest_s"])
                gains = {"gain": slowest[-2] / slowest[-1] if slowest[1:] else None, "total": slowest[0] / slowest[-1]}
                return columns | gains

            self.session.row(labels, self._seconds(switches), row)
            self.model.zero_grad(set_to_none=True)
        rank.close()
        torch.compiler.reset()

    def _seconds(self, switches: Switches) -> float:
        """About how long a rung takes: all ranks and one more to warm up, at three tenths of what the card can do."""
        counts = [length.positions(image_tokens(self.model)) for length in self.samples.lengths]
        share = self.samples.packed_share if switches.packed else self.samples.padded_share
        work = Work(
            positions=sum(counts) / share, squares=sum(count**2 for count in counts) / share,
            supervised=self.supervised, images=sum(length.images for length in self.samples.lengths),
        )  # fmt: skip
        flops = sum(model_flops(plan_shapes(self.session.scale, KIND), self.stage_config.trains, work).values())
        rounds = self.repeats + (1 if switches.compiled else 2 / RANKS)
        return (90 if switches.compiled else 3) + rounds * flops / (0.3 * self.session.matmul_flops)

    def _set(self, switches: Switches) -> None:
        """Puts the parts into the model that the switches say."""
        chosen = {"vision_tower": switches.vision, "selector": switches.selection, "connector": switches.connector}
        for attribute, is_ours in chosen.items():
            setattr(self.model, attribute, self.parts[attribute][is_ours])
        if switches.lean:
            make_lean(self.language_model)
        self.model.train()
        checkpoint_layers(self.model, on=not switches.keeps_activations)
        if switches.compiled:
            for part in (self.model.vision_tower, self.model.connector):
                part.compile(backend=self.session.compiler)

    def _measure(self, rank: EmulatedRank, switches: Switches) -> Columns:
        device = self.session.scale.device
        losses = self._packed() if switches.packed else self._padded(all_logits=not switches.head)
        # Memory is at its height with the heaviest; and kernels are compiled for the shapes they see, some of them anew
        # where a length is divisible by 16.
        for number in (self._heaviest(packed=switches.packed), *range(RANKS)):
            run_step(rank, losses[number])
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, total = [], 0.0
        for share in losses:
            times = []
            for _ in range(self.repeats):
                started = time.perf_counter()
                value = float(run_step(rank, share))
                synchronize(device)
                times.append(time.perf_counter() - started)
            seconds.append(statistics.median(times))
            total += value
        slowest = max(seconds)
        samples = len(self.samples.lengths)
        return {
            "slowest_s": slowest, "mean_s": statistics.mean(seconds), "samples_s": samples / RANKS / slowest,
            "useful_share": self.samples.packed_share if switches.packed else self.samples.padded_share,
            **peaks(device), "loss": total,
        }  # fmt: skip

    def _padded(self, *, all_logits: bool) -> list[list[Callable[[], Tensor]]]:
        return [
            [self._loss(collate_padded([self.examples[number] for number in share]), all_logits=all_logits)]
            for share in self.samples.published
        ]

    def _packed(self) -> list[list[Callable[[], Tensor]]]:
        return [
            [self._loss(collate([self.examples[number] for number in micro])) for micro in share]
            for share in self.samples.dealt
        ]

    def _loss(self, batch: Batch | PaddedBatch, *, all_logits: bool = False) -> Callable[[], Tensor]:
        device = self.session.scale.device
        held = batch.pin_memory() if device.type == "cuda" else batch
        if isinstance(held, PaddedBatch):
            return lambda: padded_loss(self.model, held.to(device), self.supervised, all_logits=all_logits)
        return lambda: supervised_loss(self.model, held.to(device), self.supervised)

    def _heaviest(self, *, packed: bool) -> int:
        """The rank with the most positions to compute: its step fills the allocator's cache for all."""
        counts = [length.positions(image_tokens(self.model)) for length in self.samples.lengths]
        loads = (
            [sum(counts[number] for micro in micros for number in micro) for micros in self.samples.dealt]
            if packed
            else [len(share) * max(counts[number] for number in share) for share in self.samples.published]
        )
        return max(range(RANKS), key=loads.__getitem__)


if __name__ == "__main__":
    run_guarded(main)
