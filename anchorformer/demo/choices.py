"""Which selectors can stand before a trained connector."""

from __future__ import annotations

import pkgutil
from dataclasses import fields, replace
from typing import Any

from anchorformer import selectors
from anchorformer.errors import UserError
from anchorformer.import_llava import read_selector
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.parts import parse_parts
from anchorformer.schema import parse_plugin
from anchorformer.selectors.base import SelectorConfig
from anchorformer.views import embeddings_per_view, view_sizes
from anchorformer.vision import VisionTower

BUDGETS = ("num_anchors", "window")
"""Fields of which one decides how many anchors a selector gives."""

Choices = dict[str, dict[int, SelectorConfig]]
"""Name of a selector -> every T that it can give -> its config; the largest T alone where the image decides."""


def choices(model: AnchorFormerForConditionalGeneration) -> Choices:
    """The selectors that fit the model's tower and tiling, all on the layer that it was trained on.

    One that reads what lies behind the block that the tower was cut at is left out.
    """
    own, _ = parse_parts(model.config.selector, model.config.connector)
    found: Choices = {}
    for info in pkgutil.iter_modules(selectors.__path__):
        if info.name == "base":
            continue
        spec = read_selector([f"selector={info.name}", f"selector.layer={own.layer}"])
        config = parse_plugin(SelectorConfig, spec, selectors.__name__, info.name)
        config = own if type(own) is type(config) else config
        if _is_served(config, model.vision_tower) and (by_count := _by_count(config, model)):
            found[info.name] = by_count
    return found


def trained_with(model: AnchorFormerForConditionalGeneration) -> tuple[str, int]:
    """Name and T of the model's own selector; T is the largest where images have different numbers of anchors."""
    own, _ = parse_parts(model.config.selector, model.config.connector)
    return type(own).__module__.rpartition(".")[2], _count(own, model)


def follows_anchors(model: AnchorFormerForConditionalGeneration) -> bool:
    """Whether the connector makes one embedding of each anchor; those with queries of their own do not."""
    _, connector = parse_parts(model.config.selector, model.config.connector)
    tower = model.vision_tower
    return all(connector.count(tower.num_tokens, count, tower.has_cls) == count for count in (1, 2))


def nearest(counts: dict[int, Any], wanted: int) -> int:
    """The possible T that is nearest to the one asked for."""
    return min(counts, key=lambda count: (abs(count - wanted), count))


def _is_served(config: SelectorConfig, tower: VisionTower) -> bool:
    """Whether the selector, as its YAML has it, is a choice for this tower."""
    return (tower.has_cls or not config.needs_cls) and tower.has_blocks_for(config.needs)


def _by_count(config: SelectorConfig, model: AnchorFormerForConditionalGeneration) -> dict[int, SelectorConfig]:
    tower = model.vision_tower
    budget = next((field.name for field in fields(config) if field.name in BUDGETS), None)
    most = min(view_sizes(model.tiling, tower.num_tokens, tower.has_cls))
    candidates = [config] if budget is None else [replace(config, **{budget: value}) for value in range(1, most + 1)]
    found: dict[int, SelectorConfig] = {}
    for candidate in candidates:
        try:
            _embeddings(candidate, model)
        except UserError:  # it cannot give that many
            continue
        found.setdefault(_count(candidate, model), candidate)
    return dict(sorted(found.items()))


def _count(config: SelectorConfig, model: AnchorFormerForConditionalGeneration) -> int:
    tower = model.vision_tower
    tokens = max(view_sizes(model.tiling, tower.num_tokens, tower.has_cls))
    return config.count(tokens, tower.num_heads, tower.has_cls)


def _embeddings(config: SelectorConfig, model: AnchorFormerForConditionalGeneration) -> int | None:
    tower = model.vision_tower
    _, connector = parse_parts(model.config.selector, model.config.connector)
    return embeddings_per_view(model.tiling, config, connector, tower.num_tokens, tower.num_heads, tower.has_cls)
