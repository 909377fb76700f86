"""Connectors: shapes, parameter counts of the real sizes, gradients everywhere, and the published names."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from anchorformer.connectors.anchor_former import AnchorFormerConnectorConfig
from anchorformer.connectors.base import PACKAGE, Connector, ConnectorConfig
from anchorformer.connectors.c_abstractor import Activation, CAbstractorConfig
from anchorformer.connectors.identity import IdentityConfig
from anchorformer.connectors.mlp import MlpConfig
from anchorformer.connectors.resampler import ResamplerConfig
from anchorformer.connectors.resampler_flamingo import FlamingoResamplerConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.convert import from_published, to_published
from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin, plugin_to_plain

TINY: dict[str, Any] = {"depth": 2, "num_heads": 4, "head_dim": 8, "ff_mult": 2}
CONF = Path(__file__).resolve().parents[2] / "conf" / "connector"


def _yaml(name: str) -> dict[str, Any]:
    """A shipped mapping, with what it takes over from another one."""
    spec: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    base, *_ = spec.pop("defaults", [None])
    return _yaml(base) | spec if base else spec


def _shipped() -> list[ConnectorConfig]:
    """Every connector with a YAML of its own, at a tiny size; a new one is tested by having its YAML."""
    small = TINY | {"num_queries": 4, "width": 32, "ff_width": 48}
    specs = [yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))]
    return [
        parse_plugin(
            ConnectorConfig,
            {key: value if value is None else small.get(key, value) for key, value in spec.items()},
            PACKAGE, "connector",
        )
        for spec in specs
        if "_target_" in spec  # the others are sizes of one of these
    ]  # fmt: skip


CONFIGS = [
    *_shipped(),
    AnchorFormerConnectorConfig(**TINY, width=32),
    CAbstractorConfig(num_queries=9, depth=1, positions=16, activation=Activation.silu),
]
PUBLISHED = (AnchorFormerConnectorConfig, ResamplerConfig, FlamingoResamplerConfig, MlpConfig)
"""Those that `anchorformer.convert` has names for."""


def _inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Anchors, VisionFeatures]:
    torch.manual_seed(0)
    tokens = torch.randn(batch, 17, 24, dtype=dtype)
    return Anchors(tokens[:, :9], None), VisionFeatures(tokens, None, True)


def _build(config: ConnectorConfig) -> Connector:
    """As after a few steps: no dropout, and nothing at zero that passes no gradient on."""
    torch.manual_seed(1)
    connector = config.build(24, 40).eval()
    with torch.no_grad():
        for parameter in connector.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_()
    return connector


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_shape_is_the_declared_count_and_every_parameter_learns(config: ConnectorConfig) -> None:
    connector = _build(config)
    out = connector(*_inputs())
    assert out.shape == (2, config.count(17, 9, True), 40)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_images_of_a_batch_do_not_mix_and_an_empty_batch_is_fine(config: ConnectorConfig) -> None:
    connector = _build(config)
    anchors, features = _inputs(3)
    together = connector(anchors, features)
    alone = connector(
        Anchors(anchors.tokens_BTV[1:2], None), VisionFeatures(features.tokens_BNV[1:2], None, features.has_cls)
    )
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-5)
    empty = connector(Anchors(anchors.tokens_BTV[:0], None), VisionFeatures(features.tokens_BNV[:0], None, True))
    assert empty.shape == (0, together.shape[1], 40)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_half_precision_stays_near_fp32_and_takes_features_of_another_dtype(config: ConnectorConfig) -> None:
    connector = _build(config)
    exact = connector(*_inputs())
    half = connector.bfloat16()(*_inputs())
    assert half.dtype is torch.bfloat16
    # bf16 keeps 8 bits; a few layers of it lose a few per cent of the largest output.
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_state_dict_and_config_survive_a_round_trip(config: ConnectorConfig) -> None:
    again = parse_plugin(ConnectorConfig, plugin_to_plain(config), PACKAGE, "connector")
    assert again == config
    first, second = _build(config), again.build(24, 40).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*_inputs()), second(*_inputs()))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_what_calls_itself_a_linear_or_a_norm_is_one(config: ConnectorConfig) -> None:
    """LoRA and quantisation wrap every `nn.Linear` by its type, and would leave out whatever else one did."""
    for module in config.build(16, 24).modules():
        if isinstance(module, torch.nn.Linear):
            x = torch.randn(3, module.in_features)
            torch.testing.assert_close(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
        if isinstance(module, torch.nn.LayerNorm):
            x = torch.randn(3, *module.normalized_shape)
            expected = torch.nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)
            torch.testing.assert_close(module(x), expected)


def test_queries_are_an_argument_and_never_module_state() -> None:
    connector = _build(AnchorFormerConnectorConfig(**TINY))
    anchors, features = _inputs()
    before = {key: value.clone() for key, value in connector.__dict__.items() if isinstance(value, Tensor)}
    first = connector(anchors, features)
    connector(Anchors(anchors.tokens_BTV * 2, None), features)
    assert torch.equal(first, connector(anchors, features))
    assert {key for key, value in connector.__dict__.items() if isinstance(value, Tensor)} == before.keys()


def test_bad_sizes_are_refused_when_the_config_is_read() -> None:
    spec = {"_target_": f"{PACKAGE}.anchor_former.AnchorFormerConnectorConfig", "depth": 0}
    with pytest.raises(UserError, match="depth"):
        parse_plugin(ConnectorConfig, spec, PACKAGE, "connector")
    with pytest.raises(UserError, match="num_heads"):
        parse_plugin(ConnectorConfig, {**spec, "depth": 1, "num_head": 2}, PACKAGE, "connector")


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (AnchorFormerConnectorConfig(depth=3), 31_477_760),
        (AnchorFormerConnectorConfig(depth=6), 62_953_472),
        (AnchorFormerConnectorConfig(depth=12), 125_904_896),
        (ResamplerConfig(num_queries=144, depth=6), 63_100_928),
        (FlamingoResamplerConfig(num_queries=144, depth=6), 63_100_928),
        (CAbstractorConfig(), 15_828_480),
        (CAbstractorConfig(positions=576, activation=Activation.silu), 15_828_480 + 576 * 1024),
        (MlpConfig(), 0),
        (IdentityConfig(), 0),
    ],
)
def test_parameters_at_true_width(config: ConnectorConfig, parameters: int) -> None:
    """The table of the golden vectors; the projector into a 7B model is counted apart."""
    with torch.device("meta"):
        connector = config.build(1024, 4096)
    assert sum(parameter.numel() for parameter in connector.parameters()) == parameters + 20_979_712


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_yaml_builds_as_it_is_shipped(name: str) -> None:
    """At the widths of CLIP-L and a 7B model, and for its 24 x 24 patches."""
    config = parse_plugin(ConnectorConfig, _yaml(name), PACKAGE, name)
    with torch.device("meta"):
        connector = config.build(1024, 4096)
    assert config.count(577, 145, True) > 0
    assert sum(parameter.numel() for parameter in connector.parameters()) > 0


@pytest.mark.parametrize("prefix", ["", "mm_projector.", "model.mm_projector."])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_published_names_round_trip_where_there_are_any(config: ConnectorConfig, prefix: str) -> None:
    ours = _build(config).state_dict()
    if not isinstance(config, PUBLISHED) or "entrance.weight" in ours:
        with pytest.raises(UserError, match="no counterpart"):
            to_published(ours)
        return
    published = {prefix + key: value for key, value in to_published(ours).items()}
    back = from_published(published, ours)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_unused_latents_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    ours = _build(AnchorFormerConnectorConfig(**TINY)).state_dict()
    published = to_published(ours, num_latents=7)
    assert published["0.latents"].shape == (7, 24)
    with caplog.at_level(logging.INFO, logger="anchorformer.convert"):
        from_published(published, ours)
    assert "dropped `latents` (7, 24)" in caplog.text


@pytest.mark.parametrize("fault", ["missing", "renamed", "deeper", "wider"])
def test_published_state_dicts_that_do_not_fit_are_refused(fault: str) -> None:
    config = AnchorFormerConnectorConfig(**TINY)
    published = to_published(_build(config).state_dict())
    if fault == "missing":
        del published["0.layers.1.0.to_q.weight"]
    elif fault == "renamed":
        published["0.layers.1.0.to_query.weight"] = published.pop("0.layers.1.0.to_q.weight")
    elif fault == "deeper":
        config = dataclasses.replace(config, depth=3)
    else:
        config = dataclasses.replace(config, ff_mult=4)
    with pytest.raises(UserError, match="does not fit"):
        from_published(published, _build(config).state_dict())
