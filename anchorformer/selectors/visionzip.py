"""The VisionZip rule: the patches that are attended to most, and tokens that all others are merged into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.selectors.base import ClsAndPatches, ClsAndPatchesConfig, needed, patches_of, vectors_at


@dataclass(frozen=True, kw_only=True)
class VisionZipSelectorConfig(ClsAndPatchesConfig):
    """T tokens: [CLS] where there is one, dominant patches, then contextual tokens that the rest is merged into."""

    contextual_share: Annotated[float, Field(gt=0, lt=1)] = 0.15625
    """Contextual tokens as a share of all but [CLS], to the nearest number: 10 of 64, 20 of 128 and 30 of 192 are
    published."""
    received: bool = False
    """Rank by the attention that all tokens give, and not by that of [CLS]: for towers without [CLS]."""

    @property
    def needs(self) -> VisionNeeds:
        ranked_by_cls = None if self.received else self.layer
        return VisionNeeds(layer=self.layer, cls_attention_from=ranked_by_cls, received=self.received, qk=(self.layer,))

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """
        Raises:
            UserError: no [CLS] where the rule reads it; more tokens than the tower's, or not two beside [CLS].
        """
        super().count(num_tokens, num_heads, has_cls)
        if self.num_anchors < has_cls + 2:
            raise UserError(
                f"num_anchors={self.num_anchors} is too few for selector 'visionzip'",
                found=f"{self.num_anchors - has_cls} beside [CLS]", expected="a dominant and a contextual one",
                remedy=f"set num_anchors={has_cls + 2}, or more",
            )  # fmt: skip
        return self.num_anchors

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> VisionZipSelector:
        others = self.count(num_tokens, num_heads, has_cls) - has_cls
        contextual = min(max(round(self.contextual_share * others), 1), others - 1)
        return VisionZipSelector(has_cls + others - contextual, contextual, num_heads, received=self.received)


class VisionZipSelector(ClsAndPatches):
    """Dominant patches are ranked by attention averaged over heads, and stay as they are, in raster order behind [CLS].

    Every so many of the others, in raster order, is a target; each remaining one is merged into the target whose key,
    averaged over heads, points most the way its own does. A contextual token is the target plus the mean of what was
    merged into it. Computed in fp32.
    Source: VisionZip, arXiv 2412.04467, and its code.
    """

    def __init__(self, num_dominant: int, num_contextual: int, num_heads: int, *, received: bool) -> None:
        """
        Args:
            num_dominant: with [CLS], where the tower has one.
        """
        super().__init__(num_dominant)
        self.num_contextual, self.num_heads, self.received = num_contextual, num_heads, received

    def scores(self, features: VisionFeatures) -> Tensor:
        if self.received:
            return patches_of(needed(features.received_BN), features)
        return patches_of(needed(features.cls_attention_BLN)[:, -1], features)

    def forward(self, features: VisionFeatures) -> Anchors:
        keys_BNHK = needed(features.keys_BLNV)[:, 0].float().unflatten(-1, (self.num_heads, -1))
        directions_BNK = normalize(keys_BNHK.mean(2), dim=-1)
        dominant = super().forward(features)
        assert dominant.indices_BT is not None
        rest_BR = _others(dominant.indices_BT, features.tokens_BNV.shape[1], features.has_cls)
        tokens_BRV, directions_BRK = (
            vectors_at(features.tokens_BNV.float(), rest_BR),
            vectors_at(directions_BNK, rest_BR),
        )
        with torch.autocast(tokens_BRV.device.type, enabled=False):
            contextual_BCV = self._contextual(tokens_BRV, directions_BRK).to(dominant.tokens_BTV.dtype)
        return Anchors(torch.cat([dominant.tokens_BTV, contextual_BCV], dim=1), indices_BT=None)

    def _contextual(self, tokens_BRV: Tensor, directions_BRK: Tensor) -> Tensor:
        rest, targets = tokens_BRV.shape[1], self.num_contextual
        is_target = torch.zeros(rest, dtype=torch.bool, device=tokens_BRV.device)
        is_target[: targets * (rest // targets) : rest // targets] = True
        order_R = is_target.logical_not().to(torch.int8).argsort(stable=True)  # targets first, raster order otherwise
        target_BCV, merged_BMV = tokens_BRV[:, order_R].split((targets, rest - targets), 1)
        target_BCK, merged_BMK = directions_BRK[:, order_R].split((targets, rest - targets), 1)
        into_BM = (merged_BMK @ target_BCK.mT).argmax(-1)
        into_BMC = one_hot(into_BM, targets).to(tokens_BRV.dtype)
        sizes_BC1 = into_BMC.sum(1).clamp(min=1).unsqueeze(-1)
        return target_BCV + into_BMC.mT @ merged_BMV / sizes_BC1


def _others(chosen_BT: Tensor, num_tokens: int, has_cls: bool) -> Tensor:
    """Indices of the tokens that are not chosen, ascending; [CLS], where there is one, is."""
    batch, chosen = chosen_BT.shape
    is_chosen_BN = torch.zeros(batch, num_tokens, dtype=torch.int8, device=chosen_BT.device)
    return is_chosen_BN.scatter(1, chosen_BT, 1).argsort(dim=1, stable=True)[:, : num_tokens - chosen]
