"""Honeybee's resampler: a gated feed-forward, residuals on the normalised query, and queries that start at zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from anchorformer.connectors.base import Connector, ConnectorConfig
from anchorformer.connectors.blocks import MultiHeadAttention
from anchorformer.contracts import Anchors, VisionFeatures

_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class HoneybeeResamplerConfig(ConnectorConfig):
    """The published sizes are those of its `configs/model_config/resampler.yaml`."""

    spans_tiles = True

    num_queries: Annotated[int, Field(ge=1)] = 64
    """Learned queries, which is also the number of embeddings per image."""
    depth: Annotated[int, Field(ge=1)] = 6
    """Cross-attention layers."""
    num_heads: Annotated[int, Field(ge=1)] = 16
    """Attention heads of each layer; a divisor of `width`."""
    width: Annotated[int, Field(ge=1)] = 1024
    """Width of the layers; a linear layer leads to it from the vision tower's, another one to the language model's."""
    ff_width: Annotated[int, Field(ge=1)] = 4096
    """Inner width of the gated feed-forward."""
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of attention weights in training; above 0, as nothing else tells apart queries that all start at zero."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        return self.num_queries

    def build(self, vision_width: int, text_width: int) -> HoneybeeResampler:
        return HoneybeeResampler(self, vision_width, text_width)


class HoneybeeResampler(Connector):
    """Keys and values = the queries so far and all N visual tokens; no position embedding, no final norm.

    Source: Honeybee, arXiv 2312.06742, and its released `projectors/resamplers.py`.
    """

    def __init__(self, config: HoneybeeResamplerConfig, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.queries_TD = nn.Parameter(torch.zeros(config.num_queries, config.width))
        self.entrance = nn.Linear(vision_width, config.width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))
        self.projector = nn.Linear(config.width, text_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        media_BND = self.entrance(features.tokens_BNV.to(self.entrance.weight.dtype))
        queries_BTD = self.queries_TD.expand(media_BND.shape[0], -1, -1)
        mask = None if features.mask_BN is None else F.pad(features.mask_BN, (queries_BTD.shape[1], 0), value=True)
        for layer in self.layers:
            queries_BTD = layer(queries_BTD, media_BND, mask)
        return cast(Tensor, self.projector(queries_BTD))


class _Layer(nn.Module):
    """Attention and feed-forward; what the first residual adds to is the query after its norm, not before."""

    def __init__(self, config: HoneybeeResamplerConfig) -> None:
        super().__init__()
        self.norm_queries = nn.LayerNorm(config.width)
        self.norm_media = nn.LayerNorm(config.width)
        self.cross = MultiHeadAttention(config.width, config.num_heads, config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.ff = _GatedFeedForward(config.width, config.ff_width)

    def forward(self, queries_BTD: Tensor, media_BND: Tensor, mask: Tensor | None) -> Tensor:
        queries_BTD = self.norm_queries(queries_BTD)
        seen_BND = torch.cat([queries_BTD, self.norm_media(media_BND)], dim=1)
        queries_BTD = queries_BTD + self.cross(queries_BTD, seen_BND, seen_BND, mask)
        return cast(Tensor, queries_BTD + self.ff(self.norm(queries_BTD)))


class _GatedFeedForward(nn.Module):
    """down(norm(silu(gate(x)) * up(x)))."""

    def __init__(self, width: int, ff_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, ff_width)
        self.up = nn.Linear(width, ff_width)
        self.norm = nn.LayerNorm(ff_width, eps=1e-6)
        self.down = nn.Linear(ff_width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return cast(Tensor, self.down(self.norm(F.silu(self.gate(x_BTD)) * self.up(x_BTD))))
