"""The FasterVLM rule: the patches that [CLS] attends to most, averaged over heads; [CLS] itself is dropped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.selectors.base import PatchSelector, PatchSelectorConfig, needed, patches_of


@dataclass(frozen=True, kw_only=True)
class FasterVlmSelectorConfig(PatchSelectorConfig):
    """The ranking of `average`, without [CLS] among the anchors."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, cls_attention_from=self.layer)

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> FasterVlmSelector:
        return FasterVlmSelector(self.count(num_tokens, num_heads, has_cls))


class FasterVlmSelector(PatchSelector):
    """Score = [CLS] attention after softmax, averaged over heads. Source: FasterVLM, arXiv 2412.01818, and its code."""

    def scores(self, features: VisionFeatures) -> Tensor:
        return patches_of(needed(features.cls_attention_BLN)[:, -1], features)
