"""The published connector: the same stack of layers with attention spelled out as two einsums and a softmax."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anchorformer.connectors.anchor_former import AnchorFormerConnector
from anchorformer.connectors.base import Connector
from anchorformer.connectors.blocks import CrossAttention, CrossLayer, FeedForward, GeluLinear, Norm, NormedLinear
from anchorformer.connectors.resampler import Resampler
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.kernels.normed_linear import EPS


class PublishedConnector(nn.Module):
    """Runs on the very parameters of a connector of ours, an `AnchorFormerConnector` or a `Resampler`.

    Source: the resampler of AnchorFormer's release (after Flamingo, arXiv 2204.14198).
    """

    def __init__(self, connector: Connector) -> None:
        super().__init__()
        if not isinstance(connector, AnchorFormerConnector | Resampler):
            raise TypeError(f"{type(connector).__name__} has no cross-attention to spell out")
        self.connector = connector

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        """Embeddings (B, T, D), from anchors (B, T, V) and tokens (B, N, V)."""
        parts = self.connector
        dtype = parts.norm.weight.dtype
        media_BNV = features.tokens_BNV.to(dtype)
        learned = parts.queries_TV.repeat(len(media_BNV), 1, 1) if isinstance(parts, Resampler) else None
        x_BTV = anchors.tokens_BTV.to(dtype) if learned is None else learned
        for layer in parts.layers:
            assert isinstance(layer, CrossLayer)
            x_BTV = attention(layer.cross, x_BTV, media_BNV) + x_BTV
            x_BTV = feed_forward(layer.ff, x_BTV) + x_BTV
        return cast(Tensor, parts.projector(parts.norm(x_BTV)))


def attention(parts: CrossAttention, queries_BTV: Tensor, media_BNV: Tensor) -> Tensor:
    """softmax(q k^T) v with the (B, H, T, N) scores as tensors: scaled queries, largest score taken off, softmax."""
    key, value = _linear(parts.to_kv, _norm(parts.norm_media, media_BNV)).chunk(2, dim=-1)
    query = _linear(parts.to_q, _norm(parts.norm_queries, queries_BTV))

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, parts.head_width)).transpose(1, 2)

    query_BHTK, key_BHNK, value_BHNK = heads(query), heads(key), heads(value)
    scores = torch.einsum("bhtk,bhnk->bhtn", query_BHTK * parts.head_width**-0.5, key_BHNK)
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    out = torch.einsum("bhtn,bhnk->bhtk", scores.softmax(dim=-1), value_BHNK)
    return cast(Tensor, parts.to_out(out.transpose(1, 2).flatten(2)))


def feed_forward(parts: FeedForward, x_BTV: Tensor) -> Tensor:
    """LayerNorm, Linear, GELU, Linear, one after the other."""
    return _linear(parts.down, nn.functional.gelu(_linear(parts.up, _norm(parts.norm, x_BTV))))


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, EPS)


def _linear(linear: NormedLinear | GeluLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, linear.weight)
