"""The VTC-CLS rule: the patches that [CLS] attends to most, summed over several layers; [CLS] itself is dropped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.selectors.base import PatchSelector, PatchSelectorConfig, needed, patches_of


@dataclass(frozen=True, kw_only=True)
class VtcClsSelectorConfig(PatchSelectorConfig):
    """Attention of [CLS] summed from `start_layer` to `layer`; with `start_layer` = `layer` this is `fastervlm`."""

    start_layer: int = 1
    """First layer of the sum, counted like `layer`: 1 is the first block. The published code counts blocks from 0 (its
    `start_layer=22` is 23 or -2 here) and has no default."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, cls_attention_from=self.start_layer)

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> VtcClsSelector:
        return VtcClsSelector(self.count(num_tokens, num_heads, has_cls))


class VtcClsSelector(PatchSelector):
    """Score = sum over layers of the [CLS] attention after softmax, averaged over heads; layers are not weighted.

    Source: VTC-CLS, arXiv 2412.05819, and its code.
    """

    def scores(self, features: VisionFeatures) -> Tensor:
        return patches_of(needed(features.cls_attention_BLN).sum(1), features)
