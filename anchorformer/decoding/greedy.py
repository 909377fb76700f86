"""Greedy decoding: the token of the highest logit, as the model says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import LogitsProcessorList

from anchorformer.contracts import VisionFeatures
from anchorformer.decoding.base import Decoding, DecodingConfig, Sight
from anchorformer.modeling import AnchorFormerForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class GreedyConfig(DecodingConfig):
    """Nothing to choose."""

    def build(self, model: AnchorFormerForConditionalGeneration) -> Greedy:
        return Greedy(model)


class Greedy(Decoding):
    """Logits stay what they are."""

    def see(
        self, tiles_B3HW: Tensor, tile_counts: Sequence[int] | None = None, features: VisionFeatures | None = None
    ) -> Sight:
        return Sight(*self.model.encode_views(tiles_B3HW, tile_counts, features))

    def logits_processors(self, input_ids_BL: Tensor, mask_BL: Tensor, sight: Sight | None) -> LogitsProcessorList:
        return LogitsProcessorList()
