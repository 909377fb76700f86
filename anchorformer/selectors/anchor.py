"""The AnchorFormer rule: each head in turn adds the patches its [CLS] query attends to most."""

from __future__ import annotations

from dataclasses import dataclass

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.kernels.selection import select_anchors
from anchorformer.selectors.base import Selector, SelectorConfig, anchors_at, needed, require_cls


@dataclass(frozen=True, kw_only=True)
class AnchorSelectorConfig(SelectorConfig):
    """Progressive selection by [CLS] attention, head by head."""

    spans_tiles = True

    num_anchors: int = 145
    """T, [CLS] counted: 65, 145 and 257 are the published settings; the tower's heads must divide T-1."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, cls_scores=True)

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """
        Raises:
            UserError: no [CLS]; T-1 smaller than the heads or not divisible by them; T larger than the tokens.
        """
        require_cls("anchor", has_cls)
        per_head, rest = divmod(self.num_anchors - 1, num_heads)
        if per_head < 1 or rest or self.num_anchors > num_tokens:
            most = (num_tokens - 1) // num_heads
            nearest = 1 + num_heads * min(max(round((self.num_anchors - 1) / num_heads), 1), most)
            raise UserError(
                f"num_anchors={self.num_anchors} does not fit this vision tower",
                found=f"{num_heads} heads and {num_tokens} tokens, [CLS] counted",
                expected=f"1 + a multiple of {num_heads}, from {1 + num_heads} to {1 + num_heads * most}",
                remedy=f"set num_anchors={nearest}" if most else "choose a vision tower with more patches",
            )
        return self.num_anchors

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> AnchorSelector:
        return AnchorSelector(self.count(num_tokens, num_heads, has_cls))


class AnchorSelector(Selector):
    """The tokens that `select_anchors` chooses by the tower's [CLS] logits, in ascending order."""

    def __init__(self, num_anchors: int) -> None:
        super().__init__()
        self.num_anchors = num_anchors

    def forward(self, features: VisionFeatures) -> Anchors:
        return anchors_at(features, select_anchors(needed(features.cls_scores_BHN), self.num_anchors))
