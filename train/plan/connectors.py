"""What connectors cost, one function each: parameters, arithmetic and what they keep for backward.

The letters of the formulas: n visual tokens, p patches, t embeddings; v vision width, d the language model's, w the
connector's own, i the width of all its heads, f of its feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from train.plan.spec import field_of, row_of

FP32 = 4

Spec = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ConnectorShape:
    """A connector at its sizes.

    Attributes:
        queries: embeddings per image.
        parameters: all of them, projector counted.
        flops: of a forward of one image; a product of an (m, k) and a (k, n) matrix counts 2 m k n, all else nothing.
        values: kept of one image for backward, in the dtype it computes in. Left out is what dropout keeps, and what
            is kept once for all images.
        statistics: numbers kept of one image in fp32: of norms and of the softmax.
    """

    queries: int
    parameters: int
    flops: float
    values: float
    statistics: float = 0

    def kept(self, value_bytes: int) -> float:
        """Bytes per image that are kept for backward, at so many bytes per value."""
        return value_bytes * self.values + FP32 * self.statistics


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a connector stands between.

    Attributes:
        anchors: that the selector hands on.
        tokens: N, [CLS] counted.
        vision, text: widths.
    """

    anchors: int
    tokens: int
    patches: int
    vision: int
    text: int


def connector_shape(spec: Spec, around: Surroundings) -> ConnectorShape:
    """
    Args:
        spec: plug-in mapping with all of its fields.

    Raises:
        UserError: a connector whose cost is not written down here, or a field that is left out.
    """
    return row_of(spec, "connector", _ROWS)(spec, around)


def _get(spec: Spec, *names: str) -> list[int]:
    return [field_of(spec, "connector", name) for name in names]


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of one with bias."""
    return (inputs + 1) * outputs


def _projector(width: int, text: int) -> int:
    return _linear(width, text) + _linear(text, text)


def _mlp(spec: Spec, around: Surroundings) -> ConnectorShape:
    """The visual tokens are kept once, and the inner values before and after GELU."""
    t, n, v, d = around.anchors, around.tokens, around.vision, around.text
    return ConnectorShape(
        queries=t, parameters=_projector(v, d), flops=2 * t * (v * d + d**2), values=n * v + 2 * t * d
    )  # fmt: skip


def _cross(
    spec: Spec, around: Surroundings, queries: int, *, learns_queries: bool = False, sees_queries: bool = False
) -> ConnectorShape:
    """A stack of cross layers.

    The visual tokens are kept once. Each layer keeps their keys and values, and of the queries both residuals, the
    projected ones, the attention's output and the feed-forward before GELU; norms are taken again in backward. The
    projector keeps its input, before and after the last norm, and its inner values before and after GELU.
    """
    depth, heads, head_dim, mult = _get(spec, "depth", "num_heads", "head_dim", "ff_mult")
    t, n, v, d, i = queries, around.tokens, around.vision, around.text, heads * head_dim
    w = spec.get("width") or v
    keys = n + t * sees_queries
    layer = 2 * keys * w * 2 * i + 4 * t * keys * i + 2 * t * (2 * w * i + 2 * mult * w**2)
    parameters = depth * (6 * w + 4 * w * i + 2 * mult * w**2) + 2 * w + learns_queries * t * w + _projector(w, d)
    flops = depth * layer + 2 * t * (w * d + d**2)
    values = n * v + depth * (2 * keys * i + t * ((2 + mult) * w + 2 * i)) + 2 * t * (w + d)
    if spec.get("width"):  # the entrance, of anchors and tokens
        parameters, flops, values = parameters + v * w, flops + 2 * (n + t) * v * w, values + t * v + n * w
    statistics = depth * (2 * n + (4 + 2 * sees_queries + heads) * t)
    return ConnectorShape(queries=t, parameters=parameters, flops=flops, values=values, statistics=statistics)


def _honeybee_resampler(spec: Spec, around: Surroundings) -> ConnectorShape:
    """Each layer keeps the queries before and after both norms, what keys and values are made of, attention's four
    parts, and of the gated feed-forward five steps."""
    t, depth, heads, w, f = _get(spec, "num_queries", "depth", "num_heads", "width", "ff_width")
    n, v, d, keys = around.tokens, around.vision, around.text, around.tokens + t
    layer = 6 * w + 4 * _linear(w, w) + 2 * _linear(w, f) + 2 * f + _linear(f, w)
    arithmetic = 4 * t * w**2 + 4 * keys * w**2 + 4 * t * keys * w + 6 * t * w * f
    return ConnectorShape(
        queries=t, parameters=t * w + _linear(v, w) + depth * layer + _linear(w, d),
        flops=2 * n * v * w + depth * arithmetic + 2 * t * w * d,
        values=n * v + n * w + depth * (w * (6 * t + 3 * keys) + 5 * t * f) + t * w,
        statistics=depth * (2 * n + (6 + heads) * t),
    )  # fmt: skip


def _mqt_resampler(spec: Spec, around: Surroundings) -> ConnectorShape:
    """Kept are what queries, keys and values are made of, attention's four parts, and the projector's input."""
    t, heads = _get(spec, "num_queries", "num_heads")
    p, v, d = around.patches, around.vision, around.text
    return ConnectorShape(
        queries=t, parameters=t * v + 6 * v + 4 * _linear(v, v) + v * d,
        flops=4 * t * v**2 + 4 * p * v**2 + 4 * t * p * v + 2 * t * v * d,
        values=v * (around.tokens + 2 * p + t) + v * (2 * t + 2 * p) + t * v,
        statistics=2 * p + heads * t,
    )  # fmt: skip


def _c_abstractor(spec: Spec, around: Surroundings) -> ConnectorShape:
    """Each bottleneck keeps ten values per cell and channel: what its three products, norms and activations read, the
    gated one, and the sum."""
    t, depth, positions = _get(spec, "num_queries", "depth", "positions")
    p, v, d, inner = around.patches, around.vision, around.text, round(around.vision / 4)
    side, small = isqrt(p), isqrt(t)
    block = 2 * v**2 + 9 * v + 6 * v + _linear(v, inner) + _linear(inner, v)
    pooling = 2 * small * side * (side + small) * v
    flops = 2 * depth * ((p + t) * (2 * v**2 + 9 * v) + 2 * 2 * v * inner) + pooling + 2 * t * (v * d + d**2)
    return ConnectorShape(
        queries=t, parameters=2 * depth * block + positions * v + _projector(v, d), flops=flops,
        values=10 * depth * (p + t) * v + (p + small * side + t) * v + 2 * t * d, statistics=6 * depth * (p + t),
    )  # fmt: skip


def _qformer(spec: Spec, around: Surroundings) -> ConnectorShape:
    """Each layer keeps what its products and norms read; every second one also keys and values of the tokens."""
    t, depth, heads, w, f = _get(spec, "num_queries", "depth", "num_heads", "width", "ff_width")
    n, v, d, crosses = around.tokens, around.vision, around.text, (depth + 1) // 2
    layer = 4 * _linear(w, w) + _linear(w, f) + _linear(f, w) + 4 * w
    cross = 2 * _linear(w, w) + 2 * _linear(v, w) + 2 * w
    arithmetic = depth * (8 * t * w**2 + 4 * t**2 * w + 4 * t * w * f)
    arithmetic += crosses * (4 * t * w**2 + 4 * n * v * w + 4 * t * n * w)
    return ConnectorShape(
        queries=t, parameters=t * w + 2 * v + 2 * w + depth * layer + crosses * cross + _linear(w, d),
        flops=arithmetic + 2 * t * w * d,
        values=2 * n * v + depth * (8 * t * w + 2 * t * f) + crosses * (4 * t * w + 2 * n * w) + 2 * t * w,
        statistics=2 * n + (2 + heads) * t * (depth + crosses) + 2 * t * (depth + 1),
    )  # fmt: skip


def _learned(spec: Spec, around: Surroundings, *, sees_queries: bool = False) -> ConnectorShape:
    (queries,) = _get(spec, "num_queries")
    return _cross(spec, around, queries, learns_queries=True, sees_queries=sees_queries)


_ROWS: dict[str, Callable[[Spec, Surroundings], ConnectorShape]] = {
    f"anchorformer.connectors.{name}": row
    for name, row in {
        "anchor_former.AnchorFormerConnectorConfig": lambda spec, around: _cross(spec, around, around.anchors),
        "c_abstractor.CAbstractorConfig": _c_abstractor,
        "identity.IdentityConfig": _mlp,
        "mlp.MlpConfig": _mlp,
        "qformer.QFormerConfig": _qformer,
        "resampler.ResamplerConfig": _learned,
        "resampler_flamingo.FlamingoResamplerConfig": lambda spec, around: _learned(spec, around, sees_queries=True),
        "resampler_honeybee.HoneybeeResamplerConfig": _honeybee_resampler,
        "resampler_mqt.MqtResamplerConfig": _mqt_resampler,
    }.items()
}
