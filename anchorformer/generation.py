"""What `generate` does with images: each is looked at once, whatever the number of steps, beams and answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from anchorformer.fusion import check_counts
from anchorformer.integrations.base import Integration, place

IMAGES = ("pixel_values", "tile_counts", "vision_features", "image_embeds")
"""The arguments of `forward` that images come in."""


class ImageGenerationMixin(GenerationMixin):
    """transformers' generation for a model whose rows may have images."""

    image_token_id: int
    num_image_tokens: int | None
    integration: Integration | None
    encode_images: Callable[..., Tensor]
    get_input_embeddings: Callable[[], nn.Module]

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Adds the images to the first step only: later steps find them in the cache."""
        seen = {name: kwargs.pop(name, None) for name in IMAGES}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True):
            inputs |= seen
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats rows for beams or several answers, each with all of its images, which are looked at once.

        transformers would repeat image by image, and a row with two of them would see the first one twice. Images whose
        placeholders lie in the cache are not fused again; an integration knows them in every step.
        """
        images = {name: kwargs.pop(name, None) for name in IMAGES}
        past = kwargs.get("past_key_values")
        before = 0 if past is None else past.get_seq_length()
        if input_ids is not None and (expand_size > 1 or before or self.integration is not None):
            embeds, pixels = images["image_embeds"], images["pixel_values"]
            if embeds is None and pixels is not None and len(pixels):
                embeds = self.encode_images(pixels, images["tile_counts"], images["vision_features"])
                images = {}
            mask_BS, each = input_ids == self.image_token_id, 1
            if self.integration is None:
                embeds = None if embeds is None else embeds.flatten(0, -2)
            else:
                assert self.num_image_tokens is not None, "integrations take views of one size"
                each = self.num_image_tokens
                none_XED = self.get_input_embeddings()(input_ids[:0, :1])
                _, rest_XED = self.integration.split((none_XED if embeds is None else embeds)[:, each:], each)
                images["placed"] = place(rest_XED, mask_BS, each, keeps=True).repeated(expand_size)
                embeds = None if embeds is None else embeds[:, : embeds.shape[1] - rest_XED.shape[1]]
            if embeds is not None:
                check_counts(mask_BS, len(embeds) * each)
                counts, known = (x.sum(1) // each for x in (mask_BS, mask_BS[:, :before]))
                rows = zip(embeds.split(counts.tolist()), known.tolist(), strict=True)
                images["image_embeds"] = torch.cat([part for row, skip in rows for part in [row[skip:]] * expand_size])
        expanded: tuple[Tensor, dict[str, Any]] = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        expanded[1].update({name: value for name, value in images.items() if value is not None})
        return expanded
