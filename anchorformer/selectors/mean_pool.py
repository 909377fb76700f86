"""Mean-pooled queries: [CLS], and the mean of each square of patches; tokens are merged, none is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from anchorformer.raster import side_of
from anchorformer.selectors.base import Selector, SelectorConfig

WHAT = "the patches that selector 'mean_pool' reads"


@dataclass(frozen=True, kw_only=True)
class MeanPoolSelectorConfig(SelectorConfig):
    """One anchor per `window` x `window` patches, behind [CLS] where the tower has one."""

    window: Annotated[int, Field(ge=1)] = 2
    """Patches per side of a pooled square; it has to divide those of the image. 2 is the published setting."""

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """
        Raises:
            UserError: `window` does not divide the grid.
        """
        side = side_of(num_tokens - has_cls, WHAT)
        if side % self.window:
            raise UserError(
                f"window={self.window} does not fit this vision tower",
                found=f"a grid of {side} x {side} patches",
                expected=f"one of {[each for each in range(1, side + 1) if side % each == 0]}",
                remedy="set `window` of the selector to one of them",
            )
        return has_cls + (side // self.window) ** 2

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> MeanPoolSelector:
        self.count(num_tokens, num_heads, has_cls)
        return MeanPoolSelector(self.window, side_of(num_tokens - has_cls, WHAT))


class MeanPoolSelector(Selector):
    """Means in fp32 of squares that do not overlap, in raster order; they have no indices.

    Source: the pooling ablation in AnchorFormer's released code.
    """

    def __init__(self, window: int, side: int) -> None:
        super().__init__()
        self.window = window
        self.side = side

    def forward(self, features: VisionFeatures) -> Anchors:
        patches_BPV = features.patches_BPV
        batch, _, width = patches_BPV.shape
        pooled = self.side // self.window
        squares = patches_BPV.reshape(batch, pooled, self.window, pooled, self.window, width)
        means_BPV = squares.float().mean((2, 4)).to(patches_BPV.dtype).reshape(batch, pooled**2, width)
        if features.has_cls:
            means_BPV = torch.cat([features.tokens_BNV[:, :1], means_BPV], dim=1)
        return Anchors(tokens_BTV=means_BPV, indices_BT=None)
