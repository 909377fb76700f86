"""The AnchorFormer connector: anchors query all visual tokens, then an MLP projects them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, cast

from pydantic import Field
from torch import Tensor, nn

from anchorformer.connectors.base import Connector, ConnectorConfig
from anchorformer.connectors.blocks import cross_layers, mlp2x_gelu, run_layers
from anchorformer.contracts import Anchors, VisionFeatures


@dataclass(frozen=True, kw_only=True)
class AnchorFormerConnectorConfig(ConnectorConfig):
    """Cross-attention stack with the anchors as queries."""

    depth: Annotated[int, Field(ge=1)] = 6
    """Cross-attention layers; 10.49 M parameters each at width 1024."""
    num_heads: Annotated[int, Field(ge=1)] = 8
    """Attention heads of each layer."""
    head_dim: Annotated[int, Field(ge=1)] = 64
    """Width of one head; heads times this need not be the vision width."""
    ff_mult: Annotated[int, Field(ge=1)] = 4
    """Inner width of the feed-forward, as a multiple of the vision width."""
    fold_kv: bool = field(default=False, compare=False)  # the same connector either way, computed differently
    """Keys and values of all layers from one matrix product; the same weights and result, not with ZeRO-3."""

    def build(self, vision_width: int, text_width: int) -> AnchorFormerConnector:
        return AnchorFormerConnector(self, vision_width, text_width)


class AnchorFormerConnector(Connector):
    """Queries = anchors, keys and values = all N visual tokens ([CLS] counted), no positional embedding.

    Source: AnchorFormer, arXiv 2405.18405, and its released `multimodal_projector/builder.py`; the published module
    also holds learned latents that this path never reads, which are left out here.
    """

    def __init__(self, config: AnchorFormerConnectorConfig, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.fold_kv = config.fold_kv
        self.layers = cross_layers(vision_width, config.depth, config.num_heads, config.head_dim, config.ff_mult)
        self.norm = nn.LayerNorm(vision_width)
        self.projector = mlp2x_gelu(vision_width, text_width)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        dtype = self.norm.weight.dtype
        queries_BTV, media_BNV = anchors.tokens_BTV.to(dtype), features.tokens_BNV.to(dtype)
        seen_BTV = run_layers(self.layers, self.norm, queries_BTV, media_BNV, fold_kv=self.fold_kv)
        return cast(Tensor, self.projector(seen_BTV))
