"""The plan of a stage as text."""

from __future__ import annotations

from dataclasses import dataclass, fields

from train.config import Checkpointing, RunConfig, StageName
from train.plan.adapter import adapter_values
from train.plan.cards import named_card
from train.plan.fit import GB, Choice, choose, memory_limit, recommend, remedies
from train.plan.flops import Work, model_flops, recomputed_flops
from train.plan.memory import Memory
from train.plan.shapes import Shapes, read_shapes

ASSUMED_TEXT = {StageName.align: (18.0, 17.0), StageName.finetune: (190.0, 110.0)}
"""Positions of a mean sample that are not images, and its targets, where nothing else is said: a caption, and an
assumption about instructions (`docs/plan.md`)."""
TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan cannot know.

    Attributes:
        mfu: share of the cards' peak at which the arithmetic runs.
        price: of one card for an hour, in any currency.
        samples: of one epoch.
        text, supervised: positions of a mean sample that are not images, and its targets.
        images: of a mean sample.
        tiles: of a mean image; the most that the tiling allows where nothing is said.
    """

    mfu: float
    price: float | None = None
    samples: int | None = None
    text: float | None = None
    supervised: float | None = None
    images: float = 1.0
    tiles: float | None = None


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        limit: bytes of the card; None where the config names none.
        remedies: what would make it fit; empty where it does.
    """

    config: RunConfig
    shapes: Shapes
    limit: float | None
    choice: Choice
    recommended: Choice | None
    remedies: tuple[str, ...]


def plan_stage(config: RunConfig) -> StagePlan:
    """
    Raises:
        UserError: an unknown card; a model whose sizes or costs are not known here.
    """
    shapes, limit = read_shapes(config), memory_limit(config)
    choice = choose(config, shapes, limit)
    return StagePlan(
        config=config, shapes=shapes, limit=limit, choice=choice,
        recommended=recommend(config, shapes, limit) if limit else None,
        remedies=() if limit is None or choice.fits else tuple(remedies(config, shapes, limit)),
    )  # fmt: skip


def render(plan: StagePlan, assumed: Assumptions) -> str:
    """All of it, with every assumption called one."""
    return "\n".join([_title(plan), "", *_parts(plan), "", *_memory(plan), "", *_course(plan, assumed)])


def _title(plan: StagePlan) -> str:
    config, layout = plan.config, plan.choice.layout
    card = f" of {config.hardware.card}" if config.hardware.card else ""
    values = "bf16" if layout.value_bytes == 2 else "fp32"
    return f"stage {config.stage.name.value}: {layout.ranks} rank(s){card}, {values}, ZeRO-{layout.zero}"


def _parts(plan: StagePlan) -> list[str]:
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}"]
    for part, count in plan.shapes.parameters.items():
        trained = count if part in plan.config.stage.whole_parts else 0
        lines.append(f"{part.value:<16}{count:>16,}{trained:>16,}")
    lora = plan.config.stage.lora
    if lora is not None:
        count = adapter_values(plan.shapes.text, lora)
        lines.append(f"{'adapter':<16}{count:>16,}{count:>16,}")
    return lines


def _memory(plan: StagePlan) -> list[str]:
    choice, memory = plan.choice, plan.choice.memory
    queries = plan.shapes.connector.queries
    unit = "tiles" if plan.shapes.tiles > plan.shapes.view else "images"
    lines = [
        f"memory of a rank with its fullest micro-batch: {choice.budget} positions, all of them targets, "
        f"{choice.budget // queries} {unit} of {queries}",
        *(f"{field.name:<16}{getattr(memory, field.name) / GB:>13.2f} GB" for field in fields(Memory)),
        f"{'peak':<16}{memory.total / GB:>13.2f} GB" + (f" of {plan.limit / GB:.0f}" if plan.limit else ""),
        f"activation checkpointing: {_state(choice)}",
    ]
    if plan.limit is None:
        return [*lines, "fits: not known; hardware.card or hardware.memory_gb says what into"]
    if plan.recommended:
        best = plan.recommended
        lines.append(
            f"recommended: zero=zero{best.layout.zero} hardware.activation_checkpointing={_state(best)} "
            f"data.token_budget={best.budget} ({best.memory.total / GB:.1f} GB)"
        )
    return [*lines, f"fits: {'yes' if choice.fits else 'no'}"]


def _state(choice: Choice) -> str:
    return (Checkpointing.on if choice.layout.checkpointing else Checkpointing.off).value


def _course(plan: StagePlan, assumed: Assumptions) -> list[str]:
    stage = plan.config.stage
    text, supervised = ASSUMED_TEXT[stage.name]
    text = text if assumed.text is None else assumed.text
    supervised = supervised if assumed.supervised is None else assumed.supervised
    work = Work.of_sample(plan.shapes, text=text, supervised=supervised, images=assumed.images, tiles=assumed.tiles)
    tiles = f"{work.images:g} tiles, " if plan.shapes.tiles > 1 else ""
    per_part = model_flops(plan.shapes, stage.whole_parts, work)  # an adapter's own arithmetic is left out
    useful = sum(per_part.values())
    again = recomputed_flops(plan.shapes, work) if plan.choice.layout.checkpointing else 0.0
    parts = ", ".join(f"{part.value} {flops / TERA:.2f}" for part, flops in per_part.items())
    return [
        f"a sample of {text:g} text positions, {supervised:g} of them targets, and {assumed.images:g} image(s), "
        f"{tiles}{work.positions:g} positions (assumed): {useful / TERA:.2f} TFLOP",
        f"  {parts}" + (f"; {again / TERA:.2f} more for activation checkpointing" if again else ""),
        *_time(plan, assumed, useful + again),
    ]


def _time(plan: StagePlan, assumed: Assumptions, flops: float) -> list[str]:
    stage, card, layout = plan.config.stage, plan.config.hardware.card, plan.choice.layout
    if card is None or layout.value_bytes != 2:
        return [
            "expected speed: not known; " + ("hardware.card says the peak" if card is None else "peaks are of bf16")
        ]
    rate = assumed.mfu * named_card(card).peak_tflops * TERA / flops
    samples, what = 100_000.0, "100,000 samples (--samples=N says how many an epoch has)"
    if stage.max_steps is not None:
        samples, what = float(stage.max_steps * stage.global_batch), f"{stage.max_steps} steps"
    elif stage.epochs is not None and assumed.samples is not None:
        samples, what = stage.epochs * assumed.samples, f"{stage.epochs:g} epoch(s) of {assumed.samples:,}"
    card_hours = samples / rate / 3600
    cost = f", {card_hours * assumed.price:.2f} at {assumed.price:g} per card and hour" if assumed.price else ""
    return [
        f"expected: {rate * layout.ranks:.1f} samples/s ({rate:.2f} per rank) at {assumed.mfu:.0%} of the peak "
        "(assumed, not measured)",
        f"expected: {card_hours / layout.ranks:.2f} hours for {what}, {card_hours:.1f} card hours{cost}",
    ]
