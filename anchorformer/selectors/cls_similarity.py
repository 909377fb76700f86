"""The [CLS] similarity rule: [CLS], and the patches whose final features point the way its own do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.selectors.base import ClsAndPatches, ClsAndPatchesConfig, needed


@dataclass(frozen=True, kw_only=True)
class ClsSimilaritySelectorConfig(ClsAndPatchesConfig):
    """Cosine to [CLS] behind the last block and norm; the anchors are the tokens of `layer`. Every block runs."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, final=True)

    @property
    def needs_cls(self) -> bool:
        return True

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> ClsSimilaritySelector:
        return ClsSimilaritySelector(self.count(num_tokens, num_heads, has_cls))


class ClsSimilaritySelector(ClsAndPatches):
    """Score = cosine of patch and [CLS] in the tower's normalised output, in fp32.

    Source: GLSim, arXiv 2407.12891, whose ranking of patches is taken without its crop.
    """

    def scores(self, features: VisionFeatures) -> Tensor:
        final_BNV = needed(features.final_BNV).float()
        return cosine_similarity(final_BNV[:, :1], final_BNV[:, 1:], dim=-1)
