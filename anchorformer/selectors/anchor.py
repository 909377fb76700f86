"""The AnchorFormer rule: each head in turn adds the patches its [CLS] query attends to most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.selectors.base import Selector, SelectorConfig, require_cls


@dataclass(frozen=True, kw_only=True)
class AnchorSelectorConfig(SelectorConfig):
    """Progressive selection by [CLS] attention, head by head."""

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
    """[CLS], then for each head in order its highest ranked patches that no earlier head has taken.

    Equal scores go to the lower index; the anchors come out in ascending order. Source: AnchorFormer, arXiv 2405.18405,
    and the `feature_select` function of its released code.
    """

    def __init__(self, num_anchors: int) -> None:
        super().__init__()
        self.num_anchors = num_anchors

    def forward(self, features: VisionFeatures) -> Anchors:
        if features.cls_scores_BHN is None:
            raise ValueError("the vision tower handed on no [CLS] scores; build it with this selector's `needs`")
        indices_BT = select_anchors(features.cls_scores_BHN, self.num_anchors)
        width = features.tokens_BNV.shape[-1]
        tokens_BTV = features.tokens_BNV.gather(1, indices_BT.unsqueeze(-1).expand(-1, -1, width))
        return Anchors(tokens_BTV=tokens_BTV, indices_BT=indices_BT)


def select_anchors(scores_BHN: Tensor, num_anchors: int) -> Tensor:
    """The anchor rule as a function of the scores; no host synchronisation, static shapes.

    Args:
        scores_BHN: scores of the [CLS] query over N tokens, [CLS] at 0; logits or probabilities, since only the order
            within a head counts. Ranked in fp32.
        num_anchors: T, with H dividing T-1 and T at most N.

    Returns:
        int64 (B, T), ascending, 0 first.
    """
    batch, heads, tokens = scores_BHN.shape
    per_head = (num_anchors - 1) // heads
    keys_BHP = _unique_keys(scores_BHN[..., 1:])
    taken_BP = torch.zeros(batch, tokens - 1, dtype=torch.bool, device=scores_BHN.device)
    lowest = torch.iinfo(torch.int64).min
    for head in range(heads):
        free_BP = keys_BHP[:, head].masked_fill(taken_BP, lowest)
        best = free_BP.topk(per_head, dim=-1, sorted=False).indices
        taken_BP.scatter_(1, best, True)
    # A stable sort of "not taken" brings the taken ones forward without disturbing their order.
    patches = (~taken_BP).to(torch.uint8).argsort(dim=-1, stable=True)[:, : heads * per_head]
    return torch.cat([patches.new_zeros(batch, 1), patches + 1], dim=1)


def _unique_keys(scores_BHP: Tensor) -> Tensor:
    """int64 keys in the order of the scores, no two alike within a head: topk is not stable, so ties must not exist.

    The upper half is the fp32 score as an integer of the same order, the lower half the reversed index.
    """
    # +0.0 turns -0.0 into 0.0, whose bit patterns would otherwise rank equal scores apart.
    bits = (scores_BHP.float() + 0.0).contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    num_patches = scores_BHP.shape[-1]
    return (ordered << 32) + torch.arange(num_patches - 1, -1, -1, device=scores_BHP.device)
