"""The learned-query resampler: the AnchorFormer stack with trained queries in place of anchors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from anchorformer.connectors.base import Connector
from anchorformer.connectors.blocks import CrossStackConfig, mlp2x_gelu, run_layers
from anchorformer.contracts import Anchors, VisionFeatures


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(CrossStackConfig):
    """Learned queries, same stack as the AnchorFormer reference; the other published resamplers have own files."""

    spans_tiles = True

    num_queries: Annotated[int, Field(ge=1)] = 144
    """Learned queries, which is also the number of embeddings per image."""
    fold_kv: bool = field(default=False, compare=False)  # the same connector either way, computed differently
    """Keys and values of all layers from one matrix product; the same weights and result, not with ZeRO-3."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        return self.num_queries

    def build(self, vision_width: int, text_width: int) -> Resampler:
        return Resampler(self, vision_width, text_width)


class Resampler(Connector):
    """Queries = parameters drawn from a unit normal; keys and values = all N visual tokens; anchors are not read.

    Source: the Perceiver Resampler baseline of AnchorFormer's released code (after Flamingo, arXiv 2204.14198).
    """

    def __init__(self, config: ResamplerConfig, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.fold_kv = config.fold_kv
        self.queries_TV = nn.Parameter(torch.randn(config.num_queries, vision_width))
        self.layers = config.layers(vision_width)
        self.norm = nn.LayerNorm(vision_width)
        self.projector = mlp2x_gelu(vision_width, text_width)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        media_BNV = features.tokens_BNV.to(self.norm.weight.dtype)
        queries_BTV = self.queries_TV.expand(media_BNV.shape[0], -1, -1)
        seen_BTV = run_layers(self.layers, self.norm, queries_BTV, media_BNV, features.mask_BN, fold_kv=self.fold_kv)
        return cast(Tensor, self.projector(seen_BTV))
