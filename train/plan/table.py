"""The plan of a stage as text."""

from __future__ import annotations

from dataclasses import dataclass, fields

from train.choices import Checkpointing
from train.config import RunConfig
from train.plan.adapter import adapter_values
from train.plan.course import Assumptions, course
from train.plan.fit import GB, Choice, choose, memory_limit, recommend, remedies
from train.plan.memory import Memory, host_memory
from train.plan.shapes import Shapes, read_shapes
from train.zero import Offload


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
    lines = course(plan.config, plan.shapes, plan.choice, assumed)
    return "\n".join([_title(plan), "", *_parts(plan), "", *_memory(plan), "", *lines])


def _title(plan: StagePlan) -> str:
    config, layout = plan.config, plan.choice.layout
    card = f" of {config.hardware.card}" if config.hardware.card else ""
    values = "bf16" if layout.value_bytes == 2 else "fp32"
    nodes = f" in {config.hardware.nodes} nodes" if config.hardware.nodes > 1 else ""
    zero = ", ".join([f"ZeRO-{layout.zero}", *config.zero.extras])
    return f"stage {config.stage.name.value}: {layout.ranks} rank(s){nodes}{card}, {values}, {zero}"


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
    most = plan.shapes.most_anchors
    expected = "" if most is None else f" (expected: model.selector.expected_share; {most} at most)"
    lines = [
        f"memory of a rank with its fullest micro-batch: {choice.budget} positions, all of them targets, "
        f"{choice.budget // queries} {unit} of {queries}{expected}",
        *(f"{field.name:<16}{getattr(memory, field.name) / GB:>13.2f} GB" for field in fields(Memory)),
        f"{'peak':<16}{memory.total / GB:>13.2f} GB" + (f" of {plan.limit / GB:.0f}" if plan.limit else ""),
        f"activation checkpointing: {_state(choice)}",
        *_host(plan),
    ]
    if plan.limit is None:
        return [*lines, "fits: not known; hardware.card or hardware.memory_gb says what into"]
    if plan.recommended:
        best = plan.recommended
        lines.append(
            f"recommended: zero={_preset(best)} hardware.activation_checkpointing={_state(best)} "
            f"data.token_budget={best.budget} ({best.memory.total / GB:.1f} GB)"
        )
    return [*lines, f"fits: {'yes' if choice.fits else 'no'}"]


def _host(plan: StagePlan) -> list[str]:
    stage, layout = plan.config.stage, plan.choice.layout
    host = host_memory(plan.shapes, stage.whole_parts, layout, stage.lora)
    if not (host.memory or host.disk):
        return []
    disk = f" and {host.disk * layout.node_ranks / GB:.1f} GB of NVMe" if host.disk else ""
    return [f"offloaded: {host.memory * layout.node_ranks / GB:.1f} GB of each node's memory{disk}"]


def _preset(choice: Choice) -> str:
    """Its file of conf/zero."""
    return f"zero{choice.layout.zero}" + ("" if choice.layout.optimizer is Offload.none else "_offload")


def _state(choice: Choice) -> str:
    return (Checkpointing.on if choice.layout.checkpointing else Checkpointing.off).value
