"""The MLP connector: each selected token is projected on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from anchorformer.connectors.base import Connector, ConnectorConfig
from anchorformer.connectors.blocks import mlp2x_gelu
from anchorformer.contracts import Anchors, VisionFeatures


@dataclass(frozen=True, kw_only=True)
class MlpConfig(ConnectorConfig):
    """LLaVA-1.5's mlp2x_gelu; with selector `all` this is LLaVA's own connector on every patch."""

    spans_tiles = True
    maps_each = True

    def build(self, vision_width: int, text_width: int) -> Mlp:
        return Mlp(vision_width, text_width)


class Mlp(Connector):
    """Linear, GELU, Linear on what the selector chose. Source: LLaVA-1.5, arXiv 2310.03744."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.projector = mlp2x_gelu(vision_width, text_width)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        return cast(Tensor, self.projector(anchors.tokens_BTV.to(next(self.parameters()).dtype)))
