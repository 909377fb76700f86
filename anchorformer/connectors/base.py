"""What every connector is: a config, and a module from anchors and visual tokens to language-model embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.schema import Schema

PACKAGE = "anchorformer.connectors"


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(Schema):
    """Base of all connector configs; a new connector subclasses it beside its module and adds one YAML."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        """Embeddings per image for a tower of `num_tokens` visual tokens and a selector of `num_anchors`."""
        return num_anchors

    def build(self, vision_width: int, text_width: int) -> Connector:
        raise NotImplementedError


class Connector(nn.Module):
    """Maps what was seen into the language model's embedding space. Queries are an argument, never module state."""

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        """
        Args:
            anchors: queries, tokens (B, T, V).
            features: keys and values, tokens (B, N, V).

        Returns:
            (B, count, D) with D the language model's width.
        """
        raise NotImplementedError
