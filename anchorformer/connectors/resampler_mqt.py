"""The resampler of MQT-LLaVA: one attention layer that looks by place alone."""

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
from anchorformer.raster import side_of

_EPS = 1e-6
_INIT_STD = 0.02
_LONGEST_WAVE = 10_000


@dataclass(frozen=True, kw_only=True)
class MqtResamplerConfig(ConnectorConfig):
    """A fixed number of queries: MQT's training draws another prefix of them for each batch, which is not done here."""

    num_queries: Annotated[int, Field(ge=1)] = 256
    """Learned queries, a square number, which is also the number of embeddings per image."""
    num_heads: Annotated[int, Field(ge=1)] = 16
    """Attention heads; a divisor of the vision width."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        side_of(num_tokens - has_cls, "the vision tower's patches")
        side_of(self.num_queries, "the queries of resampler_mqt")
        return self.num_queries

    def build(self, vision_width: int, text_width: int) -> MqtResampler:
        side_of(self.num_queries, "the queries of resampler_mqt")
        return MqtResampler(self, vision_width, text_width)


class MqtResampler(Connector):
    """Queries = parameters and their place in a square, keys = the patches' places alone, values = the patches.

    No [CLS], no residual, no feed-forward. Source: MQT-LLaVA, arXiv 2405.19315, and its released
    `multimodal_projector/builder.py`, where keys carry no content; in Qwen-VL, from which it descends, they do.
    """

    def __init__(self, config: MqtResamplerConfig, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.queries_TV = nn.Parameter(torch.empty(config.num_queries, vision_width))
        nn.init.trunc_normal_(self.queries_TV, std=_INIT_STD)
        self.norm_queries, self.norm_keys, self.norm_values = (nn.LayerNorm(vision_width, _EPS) for _ in range(3))
        self.cross = MultiHeadAttention(vision_width, config.num_heads)
        self.projector = nn.Linear(vision_width, text_width, bias=False)
        for linear in (self.cross.to_q, self.cross.to_k, self.cross.to_v):
            # Published as one matrix below the other, whose fan out is that of all three.
            nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
        nn.init.trunc_normal_(self.cross.to_out.weight, std=_INIT_STD)
        for linear in (self.cross.to_q, self.cross.to_k, self.cross.to_v, self.cross.to_out):
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.projector.weight, std=text_width**-0.5)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        queries_TV = self.queries_TV
        patches_BPV = features.patches_BPV.to(queries_TV.dtype)
        batch, patches, width = patches_BPV.shape
        places_TV = sine_places(side_of(len(queries_TV), "the queries of resampler_mqt"), width, queries_TV.device)
        of_patches_PV = resized(places_TV, side_of(patches, "the vision tower's patches")).to(queries_TV)
        queries_TV = self.norm_queries(queries_TV + places_TV.to(queries_TV))
        keys_PV = self.norm_keys(of_patches_PV)
        seen_BTV = self.cross(
            queries_TV.expand(batch, -1, -1), keys_PV.expand(batch, -1, -1), self.norm_values(patches_BPV)
        )
        return cast(Tensor, self.projector(seen_BTV))


def sine_places(side: int, width: int, device: torch.device) -> Tensor:
    """Places in a square, row by row, as sines and cosines: (side * side, width) in fp32.

    The first half of the width tells the column, the second half the row; of each half, the first half holds sines.
    Source: MAE, arXiv 2111.06377, `pos_embed.py`.
    """
    waves = _LONGEST_WAVE ** -(torch.arange(width // 4, device=device, dtype=torch.float32) / (width / 4))
    angles_SW = torch.outer(torch.arange(side, device=device, dtype=torch.float32), waves)
    line_SE = torch.cat([angles_SW.sin(), angles_SW.cos()], dim=1)
    columns_SSE, rows_SSE = line_SE.expand(side, -1, -1), line_SE[:, None].expand(-1, side, -1)
    return torch.cat([columns_SSE, rows_SSE], dim=2).flatten(0, 1)


def resized(places_TV: Tensor, side: int) -> Tensor:
    """The table of another square, (side * side, V), by bicubic interpolation."""
    grid_1VSS = places_TV.unflatten(0, (side_of(len(places_TV), "places"), -1)).permute(2, 0, 1)[None]
    return F.interpolate(grid_1VSS, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
