"""What every way of decoding is: a config, and a companion of the model that looks at images and changes logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from anchorformer.contracts import VisionFeatures
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.schema import Schema


class DecodingConfig(Schema):
    """Base of all decoding configs; a new one subclasses it beside its class and adds one YAML."""

    def build(self, model: AnchorFormerForConditionalGeneration) -> Decoding:
        """The companion of a model in evaluation mode, whose weights it shares.

        Raises:
            UserError: a model that cannot be decoded this way.
        """
        raise NotImplementedError


class Sight(NamedTuple):
    """What answers about some images are generated from.

    Attributes:
        embeds: what `encode_images` says of their views.
        counts: how many placeholders each view stands for.
        contrast_XKD: embeddings of the same views that the decoding compares with; None where it compares with nothing.
    """

    embeds: Tensor
    counts: tuple[int, ...]
    contrast_XKD: Tensor | None = None

    def split(self, views: Sequence[int]) -> list[Sight]:
        """Of each image by itself.

        Args:
            views: of each image.
        """
        left, contrasts = iter(self.counts), [None] * len(views)
        counts = [tuple(next(left) for _ in range(each)) for each in views]
        rows = list(views) if self.embeds.ndim == 3 else [sum(each) for each in counts]
        if self.contrast_XKD is not None:
            contrasts = self.contrast_XKD.split(list(views))
        return [Sight(*own) for own in zip(self.embeds.split(rows), counts, contrasts, strict=True)]

    @classmethod
    def of(cls, sights: Sequence[Sight]) -> Sight | None:
        """Of several images together; None where there are none."""
        if not sights:
            return None
        contrasts = [sight.contrast_XKD for sight in sights if sight.contrast_XKD is not None]
        return cls(
            torch.cat([sight.embeds for sight in sights]), tuple(count for sight in sights for count in sight.counts),
            torch.cat(contrasts) if contrasts else None,
        )  # fmt: skip


class Decoding:
    """Answers of a model are generated from what `see` says, with the logits processors that belong to the prompt."""

    def __init__(self, model: AnchorFormerForConditionalGeneration) -> None:
        self.model = model

    def see(
        self, tiles_B3HW: Tensor, tile_counts: Sequence[int] | None = None, features: VisionFeatures | None = None
    ) -> Sight:
        """Looks at uint8 tiles once; arguments as those of `encode_images`."""
        raise NotImplementedError

    def logits_processors(self, input_ids_BL: Tensor, mask_BL: Tensor, sight: Sight | None) -> LogitsProcessorList:
        """What `generate` is given for one prompt, padded on the left.

        Args:
            sight: of all views that the prompt has placeholders for, in their order; None where it has none.
        """
        raise NotImplementedError
