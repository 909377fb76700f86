"""Connectors of other papers against a plain statement of what those compute, loop by loop and in float64."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from anchorformer.connectors.anchor_former import AnchorFormerConnectorConfig
from anchorformer.connectors.base import Connector, ConnectorConfig
from anchorformer.connectors.c_abstractor import CAbstractorConfig, pooled
from anchorformer.connectors.identity import IdentityConfig
from anchorformer.connectors.qformer import QFormerConfig
from anchorformer.connectors.resampler import ResamplerConfig
from anchorformer.connectors.resampler_flamingo import FlamingoResamplerConfig
from anchorformer.connectors.resampler_honeybee import HoneybeeResamplerConfig
from anchorformer.connectors.resampler_mqt import MqtResamplerConfig, sine_places
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from anchorformer.schema import parse

V, D, N = 16, 24, 17


def _ready(config: ConnectorConfig) -> tuple[dict[str, Tensor], Connector, VisionFeatures]:
    """A connector whose every value is random, its weights by name, and the tokens of two images."""
    torch.manual_seed(3)
    connector = config.build(V, D).double().eval()
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    media = torch.randn(2, N, V, dtype=torch.float64)
    return dict(connector.named_parameters()), connector, VisionFeatures(media, None, True)


def _run(connector: Connector, features: VisionFeatures) -> Tensor:
    out: Tensor = connector(Anchors(features.tokens_BNV[:, :3], None), features)
    return out


def _norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def _attention(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    parts = zip(*(x.chunk(num_heads, dim=-1) for x in (queries, keys, values)), strict=True)
    return torch.cat([(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v for q, k, v in parts], dim=-1)


def test_flamingo_s_queries_see_each_other() -> None:
    config = FlamingoResamplerConfig(num_queries=5, depth=2, num_heads=2, head_dim=4, ff_mult=2)
    w, connector, features = _ready(config)
    latents = w["queries_TV"].expand(2, -1, -1)
    for layer in ("layers.0", "layers.1"):
        normed = _norm(latents, w, f"{layer}.cross.norm_queries")
        both = torch.cat([_norm(features.tokens_BNV, w, f"{layer}.cross.norm_media"), normed], dim=1)
        keys, values = _linear(both, w, f"{layer}.cross.to_kv").chunk(2, dim=-1)
        seen = _attention(_linear(normed, w, f"{layer}.cross.to_q"), keys, values, config.num_heads)
        latents = latents + _linear(seen, w, f"{layer}.cross.to_out")
        inner = F.gelu(_linear(_norm(latents, w, f"{layer}.ff.norm"), w, f"{layer}.ff.up"))
        latents = latents + _linear(inner, w, f"{layer}.ff.down")
    projected = F.gelu(_linear(_norm(latents, w, "norm"), w, "projector.0"))
    torch.testing.assert_close(_run(connector, features), _linear(projected, w, "projector.2"))


def test_honeybee_s_residual_is_the_normalised_query() -> None:
    config = HoneybeeResamplerConfig(num_queries=5, depth=2, num_heads=2, width=12, ff_width=20)
    w, connector, features = _ready(config)
    media, queries = _linear(features.tokens_BNV, w, "entrance"), w["queries_TD"].expand(2, -1, -1)
    for layer in ("layers.0", "layers.1"):
        queries = _norm(queries, w, f"{layer}.norm_queries")
        both = torch.cat([queries, _norm(media, w, f"{layer}.norm_media")], dim=1)
        q, k, v = (_linear(x, w, f"{layer}.cross.to_{n}") for n, x in (("q", queries), ("k", both), ("v", both)))
        queries = queries + _linear(_attention(q, k, v, config.num_heads), w, f"{layer}.cross.to_out")
        normed = _norm(queries, w, f"{layer}.norm")
        gated = F.silu(_linear(normed, w, f"{layer}.ff.gate")) * _linear(normed, w, f"{layer}.ff.up")
        queries = queries + _linear(_norm(gated, w, f"{layer}.ff.norm", 1e-6), w, f"{layer}.ff.down")
    torch.testing.assert_close(_run(connector, features), _linear(queries, w, "projector"))


@pytest.mark.parametrize(
    "config",
    [
        AnchorFormerConnectorConfig(depth=2, num_heads=2, head_dim=4), IdentityConfig(),
        ResamplerConfig(num_queries=5, depth=2, num_heads=2, head_dim=4),
        FlamingoResamplerConfig(num_queries=5, depth=2, num_heads=2, head_dim=4),
        HoneybeeResamplerConfig(num_queries=5, depth=2, num_heads=2, width=12, ff_width=20),
        QFormerConfig(num_queries=5, depth=3, num_heads=2, width=12, ff_width=20),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_what_a_mask_hides_is_not_there(config: ConnectorConfig) -> None:
    assert config.spans_tiles
    _, connector, features = _ready(config)
    mask = torch.arange(N).expand(2, -1) < torch.tensor([[N], [9]])
    together = _run(connector, replace(features, mask_BN=mask, sizes=(N, 9)))
    for image, size in enumerate((N, 9)):
        alone = VisionFeatures(features.tokens_BNV[image : image + 1, :size], None, True)
        torch.testing.assert_close(together[image : image + 1], _run(connector, alone))


def test_honeybee_s_queries_start_equal_and_dropout_is_what_tells_them_apart() -> None:
    torch.manual_seed(0)
    connector = HoneybeeResamplerConfig(num_queries=3, depth=1, num_heads=2, width=12, ff_width=20).build(V, D)
    features = VisionFeatures(torch.randn(1, N, V), None, True)
    out = _run(connector.eval(), features)
    torch.testing.assert_close(out[:, 1:], out[:, :1].expand(-1, 2, -1))
    (_run(connector.train(), features) * torch.randn(1, 3, D)).sum().backward()
    first, second, _ = connector.queries_TD.grad
    assert not torch.equal(first, second)
    with pytest.raises(UserError, match="greater than 0"):
        parse(HoneybeeResamplerConfig, {"dropout": 0.0}, "connector")


def test_mqt_looks_by_place_alone() -> None:
    config = MqtResamplerConfig(num_queries=9, num_heads=2)
    w, connector, features = _ready(config)
    places = sine_places(3, V, torch.device("cpu"))
    of_patches = F.interpolate(places.T.reshape(1, V, 3, 3), (4, 4), mode="bicubic").reshape(V, 16).T
    queries = _norm(w["queries_TV"] + places, w, "norm_queries", 1e-6)
    keys = _norm(of_patches.double(), w, "norm_keys", 1e-6)
    values = _norm(features.tokens_BNV[:, 1:], w, "norm_values", 1e-6)
    q, k, v = (_linear(x, w, f"cross.to_{n}") for n, x in (("q", queries), ("k", keys), ("v", values)))
    seen = _linear(_attention(q[None], k[None], v, config.num_heads), w, "cross.to_out")
    # The places are computed in fp32, so the two ways to a table of them agree to that.
    torch.testing.assert_close(_run(connector, features), _linear(seen, w, "projector"), atol=1e-6, rtol=1e-5)


def test_places_are_sines_of_column_and_row() -> None:
    places = sine_places(3, 8, torch.device("cpu"))
    for cell in range(9):
        row, column = divmod(cell, 3)
        waves = [1.0, 1 / 100]
        expected = [f(x * wave) for x in (column, row) for f in (math.sin, math.cos) for wave in waves]
        torch.testing.assert_close(places[cell], torch.tensor(expected))


@pytest.mark.parametrize(("length", "side"), [(24, 12), (8, 4), (7, 3), (5, 5), (4, 1)])
def test_pooling_is_torch_s(length: int, side: int) -> None:
    grid = torch.randn(2, length, length, 3, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    torch.testing.assert_close(pooled(grid, side), expected)


def test_the_q_former_is_that_of_transformers(caplog: pytest.LogCaptureFixture) -> None:
    config = QFormerConfig(num_queries=5, depth=3, num_heads=2, width=12, ff_width=20)
    with caplog.at_level(logging.WARNING, logger="anchorformer.connectors.qformer"):
        w, connector, features = _ready(config)
    assert "random weights" in caplog.text
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20, encoder_hidden_size=V,
            attn_implementation="eager",
        )
    )  # fmt: skip
    theirs.double().eval().load_state_dict(connector.qformer.state_dict())
    assert [layer.has_cross_attention for layer in theirs.encoder.layer] == [True, False, True]
    media = _norm(features.tokens_BNV, w, "norm_media")
    seen = theirs(query_embeds=w["queries_TD"].expand(2, -1, -1), encoder_hidden_states=media).last_hidden_state
    torch.testing.assert_close(_run(connector, features), _linear(seen, w, "projector"))


def test_a_q_former_without_weights_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Where it is built to be filled from a folder."""
    with caplog.at_level(logging.WARNING), torch.device("meta"):
        QFormerConfig(depth=1).build(V, D)
    assert not caplog.records


def test_the_identity_is_llava_s_projector() -> None:
    connector = IdentityConfig().build(V, D)
    theirs = nn.Sequential(nn.Linear(V, D), nn.GELU(), nn.Linear(D, D))
    connector.projector.load_state_dict(theirs.state_dict())
    anchors = torch.randn(2, 5, V)
    assert torch.equal(connector(Anchors(anchors, None), VisionFeatures(anchors, None, False)), theirs(anchors))


@pytest.mark.parametrize(
    ("config", "tokens", "word"),
    [
        (CAbstractorConfig(num_queries=10), 577, "9 or 16"),
        (CAbstractorConfig(num_queries=144), 1 + 24 * 20, "patches have to fill a square"),
        (CAbstractorConfig(num_queries=144), 101, "at most 100"),
        (CAbstractorConfig(positions=576), 257, "positions=256"),
        (MqtResamplerConfig(num_queries=65), 577, "64 or 81"),
        (MqtResamplerConfig(num_queries=64), 1 + 24 * 20, "patches have to fill a square"),
    ],
)
def test_what_does_not_go_with_the_tower_is_said(config: ConnectorConfig, tokens: int, word: str) -> None:
    with pytest.raises(UserError) as caught:
        config.count(tokens, 9, True)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "config", [HoneybeeResamplerConfig(num_heads=3), MqtResamplerConfig(num_heads=3), QFormerConfig(num_heads=5),
               CAbstractorConfig(num_queries=10), MqtResamplerConfig(num_queries=5)],
)  # fmt: skip
def test_sizes_that_do_not_go_together_are_said_at_build(config: ConnectorConfig) -> None:
    with pytest.raises(UserError):
        config.build(V, D)
