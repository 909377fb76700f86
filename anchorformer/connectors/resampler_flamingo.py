"""Flamingo's resampler: learned queries that see the visual tokens and each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from anchorformer.connectors.base import Connector
from anchorformer.connectors.blocks import CrossLayer, CrossStackConfig, mlp2x_gelu
from anchorformer.contracts import Anchors, VisionFeatures


@dataclass(frozen=True, kw_only=True)
class FlamingoResamplerConfig(CrossStackConfig):
    """The stack of `resampler` whose keys and values are those of the visual tokens and of the queries."""

    spans_tiles = True

    num_queries: Annotated[int, Field(ge=1)] = 64
    """Learned queries, which is also the number of embeddings per image."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        return self.num_queries

    def build(self, vision_width: int, text_width: int) -> FlamingoResampler:
        return FlamingoResampler(self, vision_width, text_width)


class FlamingoResampler(Connector):
    """Queries = parameters drawn from a unit normal; keys and values = all N visual tokens, then the queries so far.

    Flamingo's language model reads the result through layers of its own; here a projector hands it over. Source:
    Flamingo, arXiv 2204.14198, as in open_flamingo's `PerceiverResampler`, without its embeddings of time (one image).
    """

    def __init__(self, config: FlamingoResamplerConfig, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.queries_TV = nn.Parameter(torch.randn(config.num_queries, vision_width))
        self.layers = config.layers(vision_width)
        self.norm = nn.LayerNorm(vision_width)
        self.projector = mlp2x_gelu(vision_width, text_width)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        media_BNV = features.tokens_BNV.to(self.norm.weight.dtype)
        queries_BTV = self.queries_TV.expand(media_BNV.shape[0], -1, -1)
        mask = None if features.mask_BN is None else F.pad(features.mask_BN, (0, queries_BTV.shape[1]), value=True)
        for layer in self.layers:
            cross = cast(CrossLayer, layer).cross
            of_both = torch.cat([cross.key_values(media_BNV), cross.key_values_of_queries(queries_BTV)], dim=1)
            queries_BTV = layer(queries_BTV, of_both, mask)
        return cast(Tensor, self.projector(self.norm(queries_BTV)))
