"""A trained model with another selector before its connector: the same weights, in the same memory, other anchors."""

from __future__ import annotations

import copy

from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.parts import parse_parts
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.selectors.base import SelectorConfig
from anchorformer.views import build_selector, embeddings_per_view


def with_selector(
    model: AnchorFormerForConditionalGeneration, processor: AnchorFormerProcessor, selector: SelectorConfig
) -> tuple[AnchorFormerForConditionalGeneration, AnchorFormerProcessor]:
    """The model with that selector, for answers, and the processor that lays text out for it.

    Nothing is trained: the connector meets these anchors for the first time.

    Raises:
        UserError: tokens of another layer than the connector knows; a tower that has no such layer any more, or cannot
            serve the selector; views that connector, integration or tiling cannot take.
    """
    tower = model.vision_tower
    if tower.counted_from_front(selector.layer) != tower.tapped_layer:
        raise UserError(
            "the connector has been trained on tokens of another layer",
            found=f"layer={selector.layer} of the selector",
            expected=f"layer={tower.needs.layer}, the model's own", remedy=f"set selector.layer={tower.needs.layer}",
        )  # fmt: skip
    shape = tower.num_tokens, tower.num_heads, tower.has_cls
    _, connector = parse_parts(model.config.selector, model.config.connector)
    other = copy.copy(model)
    other._modules = dict(model._modules)  # which a copy would share
    other.num_image_tokens = embeddings_per_view(model.tiling, selector, connector, *shape)
    if other.num_image_tokens is None and model.integration is not None:
        raise UserError(
            "the model's integration takes views of one size",
            found="a selector that gives images different numbers of anchors", expected="as many of each view",
            remedy="choose a selector with num_anchors",
        )  # fmt: skip
    other.selector = build_selector(model.tiling, selector, *shape)
    other.vision_tower = tower.retapped(selector.needs)
    reader = copy.copy(processor)
    reader.num_image_tokens = other.num_image_tokens
    return other, reader
