"""How a stage goes on, as text: speed, hours and cost, what its data and checkpoints ask for, other numbers of cards.

Every line is an estimate and says so; nothing of it is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from train.choices import Part, StageName
from train.config import RunConfig
from train.plan.cards import named_card
from train.plan.dealing import Lengths, mean
from train.plan.fit import GB, Choice
from train.plan.flops import Work, model_flops, recomputed_flops
from train.plan.links import ADAPTER_GBS, DISK_GBS
from train.plan.memory import MASTER_AND_MOMENTS, Layout, value_counts
from train.plan.scale import Assumed, Step, last_that_scales, step_on, steps_on_nodes
from train.plan.shapes import Shapes
from train.plan.traffic import Way

ASSUMED_TEXT = {StageName.align: (18.0, 17.0), StageName.finetune: (190.0, 110.0)}
"""Positions of a mean sample that are not images, and its targets, where nothing else is said: a caption, and an
assumption about instructions (`docs/plan.md`)."""
NODES = (1, 8, 64)
"""Of which other numbers are told; with eight cards each 8, 64 and 512 cards."""
IMAGE_KB = 150.0
"""Of a file. Assumed: a JPEG of 640 x 480."""
LOADER = 200.0
"""Images of that size that one core reads, pads and resizes to 336 x 336 in a second. Assumed; `python -m bench cpu
--only loader` measures it."""
TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan cannot know.

    Attributes:
        mfu: share of the cards' peak at which they compute, while they do.
        price: of one card for an hour, in any currency.
        samples: of one epoch.
        text, supervised: positions of a mean sample that are not images, and its targets.
        images: of a mean sample.
        tiles: of a mean image; the most that the tiling allows where nothing is said.
        lengths: counted samples, in place of a mean one.
        network: of a node, GB/s; one adapter for each card where nothing is said.
        disk: at which a node writes a checkpoint, GB/s.
    """

    mfu: float
    price: float | None = None
    samples: int | None = None
    text: float | None = None
    supervised: float | None = None
    images: float = 1.0
    tiles: float | None = None
    lengths: Lengths | None = None
    network: float | None = None
    disk: float = DISK_GBS

    def of(self, config: RunConfig, shapes: Shapes) -> Assumed:
        """The same for one stage of one model."""
        if self.lengths is not None:
            tiles = shapes.tiles if self.tiles is None else self.tiles
            works = self.lengths.works(shapes, config.data.max_length, tiles)
            return Assumed(mfu=self.mfu, work=mean(works), works=works, network=self.network)
        text, supervised = ASSUMED_TEXT[config.stage.name]
        work = Work.of_sample(
            shapes, text=text if self.text is None else self.text,
            supervised=supervised if self.supervised is None else self.supervised, images=self.images, tiles=self.tiles,
        )  # fmt: skip
        return Assumed(mfu=self.mfu, work=work, network=self.network)


def course(config: RunConfig, shapes: Shapes, choice: Choice, given: Assumptions) -> Iterator[str]:
    """All lines of it."""
    assumed = given.of(config, shapes)
    yield from _sample(config, shapes, choice, assumed, given)
    name = config.hardware.card
    if name is None or choice.layout.value_bytes != 2:
        yield "expected speed: not known; " + ("hardware.card says the peak" if name is None else "peaks are of bf16")
        return
    step = step_on(config, shapes, named_card(name), assumed)
    yield from _speed(config, step, given)
    yield from _sent(step)
    yield from _data(config, shapes, assumed, step)
    yield from _checkpoint(config, shapes, choice, step, given)
    if config.hardware.ranks > 1:
        yield from _scaling(config, shapes, assumed, given)


def _sample(config: RunConfig, shapes: Shapes, choice: Choice, assumed: Assumed, given: Assumptions) -> Iterator[str]:
    work = assumed.work
    per_part = model_flops(shapes, config.stage.whole_parts, work)  # an adapter's own arithmetic is left out
    again = recomputed_flops(shapes, work) if choice.layout.checkpointing else 0.0
    if given.lengths is not None:
        unit = "tiles" if shapes.tiles > 1 else "images"
        what = f"the mean of {len(assumed.works):,} counted samples, {work.supervised:.0f} targets, "
        what += f"{work.images:.2f} {unit}, {work.positions:.0f} positions"
    else:
        text, supervised = ASSUMED_TEXT[config.stage.name]
        text = text if given.text is None else given.text
        supervised = supervised if given.supervised is None else given.supervised
        tiles = f"{work.images:g} tiles, " if shapes.tiles > 1 else ""
        what = f"a sample of {text:g} text positions, {supervised:g} of them targets, and {given.images:g} image(s), "
        what += f"{tiles}{work.positions:g} positions (assumed)"
    yield f"{what}: {sum(per_part.values()) / TERA:.2f} TFLOP"
    parts = ", ".join(f"{part.value} {flops / TERA:.2f}" for part, flops in per_part.items())
    yield f"  {parts}" + (f"; {again / TERA:.2f} more for activation checkpointing" if again else "")


def _speed(config: RunConfig, step: Step, given: Assumptions) -> Iterator[str]:
    samples, what = _epoch(config, given)
    hours = samples / step.rate / 3600
    cost = f", {hours * step.ranks * given.price:.2f} at {given.price:g} per card and hour" if given.price else ""
    yield (
        f"expected: {step.rate:.1f} samples/s ({step.rate / step.ranks:.2f} per rank) at {given.mfu:.0%} of the peak "
        "while it computes (assumed, not measured)"
    )
    yield f"expected: {hours:.2f} hours for {what}, {hours * step.ranks:.1f} card hours{cost}"


def _epoch(config: RunConfig, given: Assumptions) -> tuple[float, str]:
    stage = config.stage
    if stage.max_steps is not None:
        return float(stage.max_steps * stage.global_batch), f"{stage.max_steps} steps"
    if stage.epochs is not None and given.samples is not None:
        return stage.epochs * given.samples, f"{stage.epochs:g} epoch(s) of {given.samples:,}"
    return 100_000.0, "100,000 samples (--samples=N says how many an epoch has)"


def _sent(step: Step) -> Iterator[str]:
    names = {
        Way.all: "through all ranks", Way.node: "through each node's", Way.host: "between card and host",
        Way.disk: "between host and NVMe",
    }  # fmt: skip
    sums = {way: sum(message.size for message in step.traffic if message.way is way) for way in names}
    sent = ", ".join(f"{size / GB:.2f} GB {names[way]}" for way, size in sums.items() if size) or "nothing"
    yield f"a step of {step.global_batch} samples in {step.micro_batches:.0f} micro-batch(es) sends {sent} (counted)"
    yield (
        f"  {step.seconds:.3f} s (estimated): arithmetic {step.compute:.3f}, the slowest rank {step.waiting:.3f}, "
        f"latency {step.latency:.3f}, bytes {step.sending:.3f}, the update {step.update:.3f}; "
        "what arithmetic hides is not counted"
    )


def _data(config: RunConfig, shapes: Shapes, assumed: Assumed, step: Step) -> Iterator[str]:
    """Tiles are cut from one image that is read once."""
    images = assumed.work.images / shapes.tiles * step.rate / step.nodes
    yield (
        f"data: a node reads {images:.0f} images/s, {images * IMAGE_KB / 1e3:.1f} MB/s of files of {IMAGE_KB:.0f} kB, "
        f"{images / LOADER:.1f} cores at {LOADER:.0f} images/s each (assumed); "
        f"it has {config.data.num_workers * config.hardware.ranks} workers"
    )


def _checkpoint(config: RunConfig, shapes: Shapes, choice: Choice, step: Step, given: Assumptions) -> Iterator[str]:
    size = checkpoint_bytes(config, shapes, choice.layout)
    seconds = max(size.values()) / (given.disk * GB)
    total, every = sum(size.values()), config.checkpoint.every
    often = "at the end"
    if every is not None:
        often = f"every {every} steps, {seconds / (every * step.seconds):.1%} of the time"
    yield f"a checkpoint: {total / GB:.2f} GB, {seconds:.1f} s at {given.disk:g} GB/s of a node (assumed), {often}"


def checkpoint_bytes(config: RunConfig, shapes: Shapes, layout: Layout) -> dict[int, float]:
    """Node -> what its ranks write of a checkpoint.

    The connector alone, an adapter, or what every rank has whole, is gathered and written by rank 0; else every rank
    writes its share, and below stage 3 rank 0 the trained weights besides, as they compute.
    """
    stage, nodes = config.stage, config.hardware.nodes
    trained = value_counts(shapes, stage.whole_parts, stage.lora)[1]
    if layout.zero == 0 or set(stage.whole_parts) <= {Part.connector, Part.integration}:
        return {0: float(MASTER_AND_MOMENTS * trained)}
    sizes = dict.fromkeys(range(nodes), MASTER_AND_MOMENTS * trained / nodes)
    sizes[0] += layout.value_bytes * trained if layout.zero < 3 else 0
    return sizes


def _scaling(config: RunConfig, shapes: Shapes, assumed: Assumed, given: Assumptions) -> Iterator[str]:
    ranks = config.hardware.ranks
    network = ADAPTER_GBS * ranks if assumed.network is None else assumed.network
    yield ""
    yield (
        f"other numbers of nodes, estimated: nodes of {ranks}, {network:g} GB/s between them"
        + ("" if assumed.works else "; ranks taken as even, --lengths=FILE deals real samples to them")
    )
    yield (
        f"{'cards':>6}{'batch':>7}{'micro':>6}{'arithmetic':>11}{'waiting':>9}{'latency':>9}{'bytes':>8}{'update':>8}"
        f"{'step s':>8}{'samples/s':>11}{'per card':>9}{'hours':>7}  most of the rest"
    )
    for grows in (False, True):
        one = 0.0
        for nodes, step in steps_on_nodes(config, shapes, assumed, list(NODES), grows=grows):
            cards = nodes * ranks
            if step is None:
                yield f"{cards:>6}{config.stage.global_batch:>7}  cannot be dealt: fewer samples than ranks, or uneven"
            elif not step.choice.fits:
                yield f"{cards:>6}{step.global_batch:>7}  does not fit: {step.choice.memory.total / GB:.1f} GB"
            elif not (grows and nodes == 1):
                one = one or step.rate / cards
                yield _row(config, step, one, given)
            else:
                one = step.rate / cards
    for grows, what in ((False, "kept"), (True, "grown with the cards, another recipe")):
        nodes, why = last_that_scales(config, shapes, assumed, grows=grows)
        cards = nodes * ranks
        yield f"with the global batch {what}: at least half of one node's speed per card up to {cards} cards; {why}"


def _row(config: RunConfig, step: Step, one: float, given: Assumptions) -> str:
    return (
        f"{step.ranks:>6}{step.global_batch:>7}{step.micro_batches:>6.0f}{step.compute:>11.3f}{step.waiting:>9.3f}"
        f"{step.latency:>9.3f}{step.sending:>8.3f}{step.update:>8.3f}{step.seconds:>8.3f}{step.rate:>11.0f}"
        f"{step.rate / step.ranks / one:>9.0%}{_epoch(config, given)[0] / step.rate / 3600:>7.2f}  {step.held_back_by}"
    )
