"""The building blocks that connectors share: a cross-attention stack and the projector into the language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from anchorformer.connectors.base import ConnectorConfig, width_of_heads
from anchorformer.connectors.fold import folded_key_values
from anchorformer.kernels.attention import attend
from anchorformer.kernels.backend import Backend
from anchorformer.kernels.gelu_linear import gelu_linear
from anchorformer.kernels.normed_linear import normed_linear


@dataclass(frozen=True, kw_only=True)
class CrossStackConfig(ConnectorConfig):
    """The sizes of a stack of cross layers."""

    depth: Annotated[int, Field(ge=1)] = 6
    """Cross-attention layers; 10.49 M parameters each at width 1024."""
    num_heads: Annotated[int, Field(ge=1)] = 8
    """Attention heads of each layer."""
    head_dim: Annotated[int, Field(ge=1)] = 64
    """Width of one head; heads times this need not be the stack's width."""
    ff_mult: Annotated[int, Field(ge=1)] = 4
    """Inner width of the feed-forward, as a multiple of the stack's width."""

    def layers(self, width: int) -> nn.ModuleList:
        """`depth` cross layers of that width, with weights of their own."""
        return nn.ModuleList(
            CrossLayer(width, self.num_heads, self.head_dim, self.ff_mult) for _ in range(self.depth)
        )  # fmt: skip


class CrossAttention(nn.Module):
    """Queries look at visual tokens: q from the normed queries, k and v from the normed tokens, all without bias.

    The queries are not among the keys unless the caller appends them, as Flamingo does. Source: AnchorFormer's released
    `PerceiverAttention`.
    """

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        inner = num_heads * head_width
        self.norm_media = Norm(width)
        self.norm_queries = Norm(width)
        self.to_q = NormedLinear(width, inner)
        self.to_kv = NormedLinear(width, 2 * inner)
        self.to_out = nn.Linear(inner, width, bias=False)

    def key_values(self, media_BNV: Tensor) -> Tensor:
        """Keys and values side by side, (B, N, 2 * heads * head width)."""
        return cast(Tensor, self.to_kv(media_BNV, *self.norm_media()))

    def key_values_of_queries(self, queries_BTV: Tensor) -> Tensor:
        """Those of the queries themselves, (B, T, 2 * heads * head width)."""
        return cast(Tensor, self.to_kv(queries_BTV, *self.norm_queries()))

    def forward(self, queries_BTV: Tensor, key_values_BNE: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """
        Args:
            mask_BN: bool, which keys are real; None: all.
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        key, value = key_values_BNE.chunk(2, dim=-1)
        query = self.to_q(queries_BTV, *self.norm_queries())
        # Never with a matrix of scores, at no size: those of every layer would be kept until backward.
        out_BTHK = attend(
            heads(query), heads(key), heads(value), scale=self.head_width**-0.5,
            mask=None if mask_BN is None else mask_BN[:, None, None], backend=Backend.sdpa,
        )  # fmt: skip
        return cast(Tensor, self.to_out(out_BTHK.flatten(2)))


class FeedForward(nn.Module):
    """LayerNorm, Linear, erf-GELU, Linear; no bias in the linears."""

    def __init__(self, width: int, mult: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.up = NormedLinear(width, mult * width)
        self.down = GeluLinear(mult * width, width)

    def forward(self, x_BTV: Tensor) -> Tensor:
        return cast(Tensor, self.down(self.up(x_BTV, *self.norm())))


class Norm(nn.Module):
    """The gain and shift of a LayerNorm whose work is done by the linear behind it.

    Copies: under ZeRO-3 the parameters themselves are gone when this module's forward ends.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight.clone(), self.bias.clone()


class _Matrix(nn.Module):
    """The weight of a linear without bias, initialised as `nn.Linear` does.

    Not a subclass of it, as `Norm` is none of LayerNorm: what replaces or wraps those by type (LoRA, for one) would
    compute something else.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class NormedLinear(_Matrix):
    """A linear without bias that normalises its input first, and keeps that input only."""

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return normed_linear(x, gain, shift, self.weight)


class GeluLinear(_Matrix):
    """A linear without bias that applies GELU to its input first, and keeps that input only."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(x, self.weight)


class CrossLayer(nn.Module):
    """Cross-attention and feed-forward, each with a residual."""

    def __init__(self, width: int, num_heads: int, head_width: int, ff_mult: int) -> None:
        super().__init__()
        self.cross = CrossAttention(width, num_heads, head_width)
        self.ff = FeedForward(width, ff_mult)

    def forward(self, queries_BTV: Tensor, key_values_BNE: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        queries_BTV = queries_BTV + self.cross(queries_BTV, key_values_BNE, mask_BN)
        return cast(Tensor, queries_BTV + self.ff(queries_BTV))


def run_layers(
    layers: nn.ModuleList, norm: nn.LayerNorm, queries: Tensor, media: Tensor, mask: Tensor | None, *, fold_kv: bool
) -> Tensor:  # fmt: skip
    """The stack and its final norm; every layer sees the same media.

    Args:
        mask: bool (B, N), which of the media are real; None: all.
        fold_kv: whether keys and values of all layers come from one product; the same result within rounding.
    """
    crosses = [cast(CrossLayer, layer).cross for layer in layers]
    if fold_kv:
        key_values = folded_key_values(
            media, [cross.norm_media for cross in crosses], [cross.to_kv for cross in crosses]
        )
    else:
        key_values = [cross.key_values(media) for cross in crosses]
    for layer, key_value in zip(layers, key_values, strict=True):
        queries = layer(queries, key_value, mask)
    return cast(Tensor, norm(queries))


class MultiHeadAttention(nn.Module):
    """Attention as `nn.MultiheadAttention` computes it, with biases, on inputs of one width."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_width = width_of_heads(width, num_heads)
        self.dropout = dropout
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, queries_BTD: Tensor, keys_BND: Tensor, values_BND: Tensor, mask_BN: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            mask_BN: bool, which keys are real; None: all.
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        out_BTHK = attend(
            heads(self.to_q(queries_BTD)), heads(self.to_k(keys_BND)), heads(self.to_v(values_BND)),
            scale=self.head_width**-0.5, dropout=self.dropout if self.training else 0.0,
            mask=None if mask_BN is None else mask_BN[:, None, None], backend=Backend.sdpa,
        )  # fmt: skip
        return cast(Tensor, self.to_out(out_BTHK.flatten(2)))


def mlp2x_gelu(vision_width: int, text_width: int) -> nn.Sequential:
    """LLaVA-1.5's projector: Linear, GELU, Linear, with bias."""
    return nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))
