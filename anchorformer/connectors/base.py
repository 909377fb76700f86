"""What every connector is: a config, and a module from anchors and visual tokens to language-model embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from anchorformer.schema import Schema

PACKAGE = "anchorformer.connectors"


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(Schema):
    """Base of all connector configs; a new connector subclasses it beside its module and adds one YAML."""

    spans_tiles: ClassVar[bool] = False
    """Whether all tiles of an image can be one view: it needs no raster of patches, and heeds `mask_BN`."""
    maps_each: ClassVar[bool] = False
    """Whether each anchor becomes one embedding that does not depend on the other anchors, so that images may have
    different numbers of them: what shorter rows are padded with is computed and thrown away."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        """Embeddings per image for a tower of `num_tokens` visual tokens and a selector of `num_anchors`.

        Raises:
            UserError: the tower's tokens cannot be what this connector works on.
        """
        return num_anchors

    def build(self, vision_width: int, text_width: int) -> Connector:
        """The module, with fresh weights as published.

        Raises:
            UserError: sizes that do not go together.
        """
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


def width_of_heads(width: int, num_heads: int) -> int:
    """
    Raises:
        UserError: the width does not divide into that many heads.
    """
    if width % num_heads:
        raise UserError(
            "the connector's heads do not fit its width", found=f"{num_heads} heads, width {width}",
            expected=f"a divisor of {width}", remedy="set model.connector.num_heads to one",
        )  # fmt: skip
    return width // num_heads
