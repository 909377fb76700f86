"""The AnchorFormer connector: anchors query all visual tokens, then an MLP projects them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, cast

from pydantic import Field
from torch import Tensor, nn

from anchorformer.connectors.base import Connector
from anchorformer.connectors.blocks import CrossStackConfig, mlp2x_gelu, run_layers
from anchorformer.contracts import Anchors, VisionFeatures


@dataclass(frozen=True, kw_only=True)
class AnchorFormerConnectorConfig(CrossStackConfig):
    """Cross-attention stack with the anchors as queries."""

    spans_tiles = True
    maps_each = True

    width: Annotated[int, Field(ge=1)] | None = None
    """Width of the stack; null for the vision tower's, as published, another one with a linear layer before it."""
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
        width = config.width or vision_width
        self.fold_kv = config.fold_kv
        self.entrance = nn.Linear(vision_width, width, bias=False) if config.width else nn.Identity()
        self.layers = config.layers(width)
        self.norm = nn.LayerNorm(width)
        self.projector = mlp2x_gelu(width, text_width)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        dtype = self.norm.weight.dtype
        queries_BTD, media_BND = (self.entrance(x.to(dtype)) for x in (anchors.tokens_BTV, features.tokens_BNV))
        seen_BTD = run_layers(self.layers, self.norm, queries_BTD, media_BND, features.mask_BN, fold_kv=self.fold_kv)
        return cast(Tensor, self.projector(seen_BTD))
