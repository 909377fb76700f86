"""The folded connector equals the plain one, both keep less than the published form, and a compiler takes both."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorformer.connectors.anchor_former import AnchorFormerConnectorConfig
from anchorformer.connectors.base import Connector
from anchorformer.connectors.fold import folded_key_values
from anchorformer.connectors.resampler import ResamplerConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.kernels.gelu_linear import gelu_linear
from bench.published.connector import PublishedConnector

CONFIGS = [
    AnchorFormerConnectorConfig(depth=3, num_heads=4, head_dim=16, ff_mult=2),
    ResamplerConfig(depth=3, num_heads=4, head_dim=16, ff_mult=2, num_queries=9),
]


def _inputs(num_tokens: int = 65, width: int = 64, anchors: int = 9, batch: int = 2) -> tuple[Anchors, VisionFeatures]:
    torch.manual_seed(0)
    tokens = torch.randn(batch, num_tokens, width)
    return Anchors(tokens[:, :anchors], None), VisionFeatures(tokens, None, True)


def _pair(config: Any, width: int = 64) -> tuple[Connector, Connector]:
    """Plain and folded, with the same weights; norms are drawn, since ones and zeros would hide a forgotten factor."""
    torch.manual_seed(1)
    plain = config.build(width, 96)
    for module in plain.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    folded = dataclasses.replace(config, fold_kv=True).build(width, 96)
    folded.load_state_dict(plain.state_dict())
    return plain, folded


def _run(connector: nn.Module, anchors: Anchors, features: VisionFeatures) -> dict[str, Tensor]:
    out = connector(anchors, features)
    torch.manual_seed(2)
    (out.float() * torch.randn(out.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in connector.named_parameters()}
    return {"output": out.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_folded_output_and_gradients_of_every_parameter_equal_the_plain_ones(config: Any) -> None:
    plain, folded = (_run(connector, *_inputs()) for connector in _pair(config))
    assert folded.keys() == plain.keys()
    # The bound; both orders of the products round in fp32.
    assert {name: d for name in plain if (d := _distance(folded[name], plain[name])) > 5e-6} == {}


def test_folded_half_precision_is_no_further_from_fp32_than_twice_the_plain_one() -> None:
    plain, folded = _pair(CONFIGS[0])
    exact = _run(plain, *_inputs())
    plain.zero_grad()
    half, half_folded = (_run(connector.bfloat16(), *_inputs()) for connector in (plain, folded))
    for name, truth in exact.items():
        assert _distance(half_folded[name], truth) <= 2 * _distance(half[name], truth), name


def test_the_fold_is_differentiated_correctly() -> None:
    torch.manual_seed(3)
    norms, linears = nn.ModuleList([nn.LayerNorm(6) for _ in range(2)]), [nn.Linear(6, 4, bias=False) for _ in range(2)]
    modules = nn.ModuleList([*norms, *linears]).double()
    media = torch.randn(1, 3, 6, dtype=torch.double, requires_grad=True)
    leaves = [media, *modules.parameters()]

    def fold(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(folded_key_values(media, list(norms), linears))  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(fold, leaves)


def test_choosing_the_fold_changes_neither_the_weights_nor_the_identity_of_a_connector() -> None:
    config = CONFIGS[0]
    plain, folded = _pair(config)
    assert dataclasses.replace(config, fold_kv=True) == config
    assert plain.state_dict().keys() == folded.state_dict().keys()


def test_gelu_linear_equals_its_two_steps_and_keeps_its_input_only() -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(2, 5, 12, requires_grad=True), torch.randn(7, 12, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = gelu_linear(x, weight)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}
    expected = F.linear(F.gelu(x), weight)
    grad = torch.randn_like(out)
    assert torch.equal(out, expected)
    for mine, theirs in zip(
        torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gelu_linear(x, weight)
    assert half.dtype is torch.bfloat16
    (wide,) = torch.autograd.grad(half, x, grad.bfloat16())
    assert wide.dtype is torch.float32


def _saved_bytes(connector: nn.Module, anchors: Anchors, features: VisionFeatures) -> int:
    """Bytes kept for backward, each storage once, parameters not."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in connector.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        connector(anchors, features)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("num_tokens", "plain_ratio", "folded_ratio"), [(577, 1.4, 1.65), (2305, 1.8, 2.5)])
def test_saved_bytes_against_the_published_form(num_tokens: int, plain_ratio: float, folded_ratio: float) -> None:
    """An eighth of the true width and heads, which scales every tensor alike."""
    config = AnchorFormerConnectorConfig(num_heads=1)
    torch.manual_seed(5)
    plain = config.build(128, 512).bfloat16()
    folded = dataclasses.replace(config, fold_kv=True).build(128, 512).bfloat16()
    anchors, features = _inputs(num_tokens, 128, 145, batch=1)
    anchors = Anchors(anchors.tokens_BTV.bfloat16(), None)
    features = VisionFeatures(features.tokens_BNV.bfloat16(), None, True)
    published = _saved_bytes(PublishedConnector(plain), anchors, features)
    assert published / _saved_bytes(plain, anchors, features) >= plain_ratio
    assert published / _saved_bytes(folded, anchors, features) >= folded_ratio


@pytest.mark.parametrize("folded", [False, True])
def test_a_compiler_takes_the_connector_in_one_graph_forward_and_backward(folded: bool) -> None:
    config = dataclasses.replace(CONFIGS[0], depth=2)
    expected_from, connector = _pair(config)[folded], _pair(config)[folded]
    expected = _run(expected_from, *_inputs())
    compiled = _run(torch.compile(connector, fullgraph=True, backend="aot_eager"), *_inputs())  # type: ignore[arg-type]
    for name, value in expected.items():
        torch.testing.assert_close(compiled.get(name, compiled.get(f"_orig_mod.{name}")), value, atol=1e-5, rtol=1e-5)
