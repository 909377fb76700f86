"""The average-head rule: [CLS], and the patches that its query attends to most, averaged over heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.selectors.base import ClsAndPatches, ClsAndPatchesConfig, needed, patches_of


@dataclass(frozen=True, kw_only=True)
class AverageSelectorConfig(ClsAndPatchesConfig):
    """One joint ranking of all heads, where `anchor` gives each head its share."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, cls_attention_from=self.layer)

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> AverageSelector:
        return AverageSelector(self.count(num_tokens, num_heads, has_cls))


class AverageSelector(ClsAndPatches):
    """Score = [CLS] attention after softmax, averaged over heads. Source: the anchors of eRAM-V (design of its paper;
    no code was published), with `layer` and the ascending order as in AnchorFormer."""

    def scores(self, features: VisionFeatures) -> Tensor:
        return patches_of(needed(features.cls_attention_BLN)[:, -1], features)
