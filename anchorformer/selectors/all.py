"""No selection: every patch, as LLaVA feeds its MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.selectors.base import Selector, SelectorConfig


@dataclass(frozen=True, kw_only=True)
class AllSelectorConfig(SelectorConfig):
    """All patches in raster order; [CLS] is dropped (LLaVA-1.5's `patch` feature selection)."""

    spans_tiles = True

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        return num_tokens - has_cls

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> AllSelector:
        return AllSelector()


class AllSelector(Selector):
    """Hands on the patches as they are."""

    def forward(self, features: VisionFeatures) -> Anchors:
        tokens_BPV = features.patches_BPV
        batch, patches, _ = tokens_BPV.shape
        indices = torch.arange(patches, device=tokens_BPV.device) + int(features.has_cls)
        return Anchors(tokens_BTV=tokens_BPV, indices_BT=indices.expand(batch, -1))
