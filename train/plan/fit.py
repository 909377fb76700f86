"""What fits into a card: the largest micro-batch, whether checkpointing is needed, which ZeRO stage, and what would."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml

from anchorformer.devices import Device, Precision
from anchorformer.errors import UserError
from anchorformer.schema import parse
from data.overrides import CONF
from train.choices import Checkpointing, EngineName, Part
from train.config import LoraConfig, RunConfig
from train.plan.cards import named_card
from train.plan.memory import Layout, Memory, MicroBatch, rank_memory
from train.plan.shapes import Shapes, read_shapes
from train.zero import ZeroConfig

log = logging.getLogger(__name__)

GB = 1e9
STEP = 64
"""Planned positions are a multiple of this."""
COMFORTABLE = 2
"""Longest samples in a micro-batch below which another layout is recommended: dealing needs something to balance, and
under ZeRO every micro-batch sends all gradients on their way."""
LAYOUTS = (
    ("zero2", False), ("zero3", False), ("zero2", True), ("zero3", True), ("zero2_offload", True),
    ("zero3_offload", True),
)  # fmt: skip
"""A file of conf/zero and checkpointing, in the order of their speed. Published for 7B on eight A800: 5.33, 4.95 and at
most 4.69 and 4.45, so that gathering weights costs less than computing layers twice; the host's memory is slower by far
than a card's."""
CHECKPOINT, SHORTEN, SHARD = "hardware.activation_checkpointing=on", "data.token_budget={}", "zero=zero3"
"""What makes a run need less memory, in the order in which it costs least."""
OFFLOADS = ("zero2_offload", "zero3_offload")
"""What else does, on the host."""
ADAPTER = "lora=qlora stage.trains.language_model.lr=2e-4"
"""What else does where the language model is trained: less of it is, on 4-bit weights."""
MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a run uses its memory.

    Attributes:
        budget: positions of the largest micro-batch.
        memory: of a rank with that micro-batch.
        fits: whether that is within the card.
    """

    layout: Layout
    budget: int
    memory: Memory
    fits: bool


def memory_limit(config: RunConfig) -> float | None:
    """Bytes of one card; None where the config names none.

    Raises:
        UserError: a card that is not in the table.
    """
    hardware = config.hardware
    card = named_card(hardware.card) if hardware.card is not None else None
    size = hardware.memory_gb or (card.memory_gb if card else None)
    return None if size is None else size * GB


def settle(config: RunConfig) -> RunConfig:
    """The config with what it leaves to the memory written out: checkpointing, and the positions of a micro-batch.

    What the user has set stays, whether it fits or not: then the plan is advice, not a door.

    Raises:
        UserError: nothing that is left open makes the longest sample fit, or what `read_shapes` raises.
    """
    limit, hardware = memory_limit(config), config.hardware
    if limit is None:
        return _with(config, checkpointing=hardware.activation_checkpointing is Checkpointing.on)
    if config.data.token_budget is not None and hardware.activation_checkpointing is not Checkpointing.auto:
        return config
    shapes = read_shapes(config)
    choice = choose(config, shapes, limit)
    if not choice.fits and config.data.token_budget is None:
        raise UserError(
            f"a sample of data.max_length={config.data.max_length} positions does not fit into the card",
            found=f"{choice.memory.total / GB:.1f} GB", expected=f"at most {limit / GB:.1f} GB",
            remedy="; or ".join(remedies(config, shapes, limit)),
        )  # fmt: skip
    log.info(
        "planned from %.0f GB: micro-batches of at most %d positions, activation checkpointing %s",
        limit / GB, choice.budget, "on" if choice.layout.checkpointing else "off",
    )  # fmt: skip
    settled = _with(config, checkpointing=choice.layout.checkpointing)
    return replace(settled, data=replace(settled.data, token_budget=config.data.token_budget or choice.budget))


def choose(config: RunConfig, shapes: Shapes, limit: float | None) -> Choice:
    """What a run does with its memory: no checkpointing, as far as that is possible and the config leaves it open.

    Args:
        limit: bytes of the card; None takes what the config says for granted.
    """
    asked = config.hardware.activation_checkpointing
    options = [False, True] if asked is Checkpointing.auto else [asked is Checkpointing.on]
    if limit is None:
        options = options[:1]
    for checkpointing in options:
        layout = layout_of(config, checkpointing=checkpointing)
        budget = min(config.data.token_budget or _planned_budget(config, shapes, layout, limit), most_positions(config))
        memory = memory_at(config, shapes, layout, budget)
        fits = limit is None or memory.total <= limit
        if fits:
            break
    return Choice(layout=layout, budget=budget, memory=memory, fits=fits)


def recommend(config: RunConfig, shapes: Shapes, limit: float) -> Choice | None:
    """The fastest layout in which several of the longest samples fit together; failing that, one."""
    layouts = [
        layout_of(config, zero=_zero(config, name), checkpointing=checkpointing)
        for name, checkpointing in LAYOUTS
        if config.world_size > 1 or name != "zero3"  # which would share its weights with nobody
    ]
    for samples in (COMFORTABLE, 1):
        for layout in layouts:
            if largest_budget(config, shapes, layout, limit) >= samples * config.data.max_length:
                budget = _planned_budget(config, shapes, layout, limit)
                memory = memory_at(config, shapes, layout, budget)
                return Choice(layout=layout, budget=budget, memory=memory, fits=True)
    return None


def remedies(config: RunConfig, shapes: Shapes, limit: float) -> list[str]:
    """What would make a run fit that does not: the smallest sets of changes, else the card or the ranks it takes."""
    asked, budget = config.hardware.activation_checkpointing is Checkpointing.on, config.data.token_budget
    needed = config.data.max_length if budget is None else min(budget, most_positions(config))
    changes = [CHECKPOINT] if not asked else []
    changes += [SHORTEN] if needed > config.data.max_length else []
    can_shard = config.world_size > 1 and config.zero.stage < 3 and _goes(config, zero=_zero(config, "zero3"))
    changes += [SHARD] if can_shard else []
    for size in range(1, len(changes) + 1):
        fitting = []
        for chosen in itertools.combinations(changes, size):
            zero = _zero(config, "zero3") if SHARD in chosen else config.zero
            layout = layout_of(config, zero=zero, checkpointing=asked or CHECKPOINT in chosen)
            room = largest_budget(config, shapes, layout, limit)
            if room >= (config.data.max_length if SHORTEN in chosen else needed):
                fitting.append(" ".join(chosen).format(room // STEP * STEP))
        if fitting:
            return fitting
    return [*_elsewhere(config, shapes, limit), *_larger(config, shapes, limit)]


def _elsewhere(config: RunConfig, shapes: Shapes, limit: float) -> list[str]:
    """What fits with the state on the host, or with an adapter in place of the language model."""
    longest = config.data.max_length
    given = [] if config.data.token_budget is None else [f"data.token_budget={longest}"]
    found = []
    for name in OFFLOADS:
        zero = _zero(config, name)
        layout = layout_of(config, zero=zero, checkpointing=True)
        if _goes(config, zero=zero) and largest_budget(config, shapes, layout, limit) >= longest:
            found.append(" ".join([f"zero={name}", CHECKPOINT, *given]))
            break
    adapter = {**_yaml("lora/default")["lora"], **_yaml("lora/qlora")["lora"]}
    adapted = replace(config.stage, lora=parse(LoraConfig, adapter, "conf/lora"))
    if Part.language_model in config.stage.whole_parts and _goes(config, stage=adapted, zero=_zero(config, "zero2")):
        smaller = replace(config, stage=adapted, zero=_zero(config, "zero2"))
        layout = layout_of(smaller, checkpointing=True)
        if largest_budget(smaller, shapes, layout, limit) >= longest:
            found.append(" ".join([ADAPTER, "zero=zero2", CHECKPOINT, *given]))
    return found


def _larger(config: RunConfig, shapes: Shapes, limit: float) -> list[str]:
    sharded = _zero(config, "zero3")
    least = layout_of(config, zero=sharded if config.world_size > 1 else config.zero, checkpointing=True)
    need = memory_at(config, shapes, least, config.data.max_length).total
    found = [f"a card of at least {math.ceil(need / GB)} GB with hardware.activation_checkpointing=on"]
    ranks = config.world_size
    while ranks < MOST_RANKS:
        ranks *= 2
        wider = replace(layout_of(config, zero=sharded, checkpointing=True), ranks=ranks)
        if memory_at(config, shapes, wider, config.data.max_length).total <= limit:
            found.append(f"{ranks} ranks with zero=zero3 hardware.activation_checkpointing=on")
            break
    return found


def _zero(config: RunConfig, name: str) -> ZeroConfig:
    """What the file of conf/zero would be in this run."""
    own = {"overlap_comm": config.zero.overlap_comm, "bucket_size": config.zero.bucket_size}
    return parse(ZeroConfig, {**own, **_yaml(f"zero/{name}")}, f"conf/zero/{name}.yaml")


@cache
def _yaml(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return content


def _goes(config: RunConfig, **changes: Any) -> bool:
    """Whether the config may say so, whatever it needs of memory."""
    try:
        replace(config, **changes)
    except UserError:
        return False
    return True


def layout_of(config: RunConfig, *, checkpointing: bool, zero: ZeroConfig | None = None) -> Layout:
    """How a rank of this run holds its state."""
    is_plain = config.engine is EngineName.plain
    zero = config.zero if zero is None else zero
    stage = 0 if is_plain else zero.stage
    has_streams = config.hardware.device is not Device.cpu
    halves = config.hardware.precision is Precision.bf16 or (
        config.hardware.precision is Precision.auto and has_streams
    )
    return Layout(
        ranks=config.world_size, zero=stage, value_bytes=2 if halves else 4, checkpointing=checkpointing,
        bucket=zero.bucket_size, buckets=2 if zero.overlap_comm and has_streams and stage < 3 else 1,
        node_ranks=config.hardware.ranks, optimizer=zero.offload_optimizer, parameters=zero.offload_parameters,
        hpz=zero.hpz,
    )  # fmt: skip


def memory_at(config: RunConfig, shapes: Shapes, layout: Layout, budget: int) -> Memory:
    """With the fullest micro-batch of `budget` positions: every position a target, and as many images as they hold."""
    tiles = budget // shapes.connector.queries * shapes.view
    batch = MicroBatch(positions=budget, supervised=budget, images=tiles)
    return rank_memory(shapes, config.stage.whole_parts, layout, batch, config.stage.lora)


def most_positions(config: RunConfig) -> int:
    """What no micro-batch exceeds: as many of the longest samples as it may have, and a rank's share of a step has."""
    share = config.stage.global_batch // config.world_size
    return min(config.hardware.micro_batch, share) * config.data.max_length


def largest_budget(config: RunConfig, shapes: Shapes, layout: Layout, limit: float) -> int:
    """Most positions of a micro-batch within `limit` bytes; 0 where not even one is."""
    positions = range(1, most_positions(config) + 1)
    return _last(positions, lambda budget: memory_at(config, shapes, layout, budget).total <= limit)


def _planned_budget(config: RunConfig, shapes: Shapes, layout: Layout, limit: float | None) -> int:
    longest = config.data.max_length
    if limit is None:
        return most_positions(config)
    return max(longest, largest_budget(config, shapes, layout, limit) // STEP * STEP)


def _last(values: Sequence[int], holds: Callable[[int], bool]) -> int:
    """The largest of ascending values for which a condition holds that fails for all values behind it; 0 for none."""
    found = bisect.bisect_left(values, True, key=lambda value: not holds(value))
    return values[found - 1] if found else 0


def _with(config: RunConfig, *, checkpointing: bool) -> RunConfig:
    state = Checkpointing.on if checkpointing else Checkpointing.off
    return replace(config, hardware=replace(config.hardware, activation_checkpointing=state))
