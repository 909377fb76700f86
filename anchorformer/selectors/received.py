"""The received-attention rule, for towers without [CLS]: the patches that all tokens together attend to most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.selectors.base import PatchSelector, PatchSelectorConfig, needed, patches_of


@dataclass(frozen=True, kw_only=True)
class ReceivedSelectorConfig(PatchSelectorConfig):
    """The ranking of `fastervlm` with every token in the place of [CLS]."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, received=True)

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> ReceivedSelector:
        return ReceivedSelector(self.count(num_tokens, num_heads, has_cls))


class ReceivedSelector(PatchSelector):
    """Score = attention received, averaged over heads and all queries, itself counted.

    Source: what VisionZip (arXiv 2412.04467) does for towers without [CLS], without its merging.
    """

    def scores(self, features: VisionFeatures) -> Tensor:
        return patches_of(needed(features.received_BN), features)
