"""The Q-Former: learned queries that talk to each other, and in every second layer to the visual tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from anchorformer.connectors.base import Connector, ConnectorConfig, width_of_heads
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.kernels.vision_attention import VISION_ATTENTION

log = logging.getLogger(__name__)

_INIT_STD = 0.02
_CROSS_EVERY = 2


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(ConnectorConfig):
    """The published sizes are those of BERT-base."""

    spans_tiles = True

    num_queries: Annotated[int, Field(ge=1)] = 32
    """Learned queries, which is also the number of embeddings per image."""
    depth: Annotated[int, Field(ge=1)] = 12
    """Layers; the first, third, fifth, ... of them see the image."""
    num_heads: Annotated[int, Field(ge=1)] = 12
    """Attention heads of each layer; a divisor of `width`."""
    width: Annotated[int, Field(ge=1)] = 768
    """Width of the layers."""
    ff_width: Annotated[int, Field(ge=1)] = 3072
    """Inner width of the feed-forward."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of attention weights and of what each half of a layer adds, in training."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        return self.num_queries

    def build(self, vision_width: int, text_width: int) -> QFormer:
        width_of_heads(self.width, self.num_heads)
        return QFormer(self, vision_width, text_width)


class QFormer(Connector):
    """LayerNorm of all N visual tokens, the Q-Former of transformers without its text half, one linear.

    The published one starts from BERT-base and is trained in a stage of its own; this one starts at random, which is
    logged. Source: BLIP-2, arXiv 2301.12597, and LAVIS.
    """

    def __init__(self, config: QFormerConfig, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.queries_TD = nn.Parameter(torch.empty(config.num_queries, config.width).normal_(std=_INIT_STD))
        self.norm_media = nn.LayerNorm(vision_width)
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(
            hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
            intermediate_size=config.ff_width, encoder_hidden_size=vision_width, initializer_range=_INIT_STD,
            cross_attention_frequency=_CROSS_EVERY, hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout, attn_implementation=VISION_ATTENTION,
        ))  # fmt: skip
        self.projector = nn.Linear(config.width, text_width)
        if not self.queries_TD.is_meta:  # weights follow from a folder where the module is built without any
            log.warning("Q-Former with random weights: the published one starts from BERT-base and a stage of its own")

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        media_BNV = self.norm_media(features.tokens_BNV.to(self.norm_media.weight.dtype))
        batch = media_BNV.shape[0]
        if not batch:  # transformers' code cannot be run on no image at all
            media_BNV = media_BNV.new_zeros(1, *media_BNV.shape[1:])
        mask = (
            None if features.mask_BN is None else features.mask_BN[:, None, None]
        )  # in four dimensions taken as it is
        seen_BTD = self.qformer(
            query_embeds=self.queries_TD.expand(media_BNV.shape[0], -1, -1), encoder_hidden_states=media_BNV,
            encoder_attention_mask=mask,
        ).last_hidden_state  # fmt: skip
        return cast(Tensor, self.projector(seen_BTD[:batch]))
