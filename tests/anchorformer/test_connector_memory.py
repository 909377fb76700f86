"""The folded connector equals the plain one, both keep less than the published form, and a compiler takes both."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorformer.connectors.anchor_former import AnchorFormerConnectorConfig
from anchorformer.connectors.base import Connector
from anchorformer.connectors.fold import _Fold, folded_key_values
from anchorformer.connectors.resampler import ResamplerConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.kernels.gelu_linear import gelu_linear
from anchorformer.kernels.normed_linear import normed_linear
from bench.published.connector import PublishedConnector
from bench.runner import saved_bytes

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
    (out.double() * torch.randn(out.shape).to(out.device)).sum().backward()
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


@pytest.mark.gpu
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_it_is_no_further_from_the_exact_result_than_twice_the_cpu(
    dtype: torch.dtype, folded: bool
) -> None:
    connector = _pair(CONFIGS[0])[folded]
    exact = _run(copy.deepcopy(connector).double(), *_inputs())
    cpu = _run(copy.deepcopy(connector).to(dtype), *_inputs())
    anchors, features = _inputs()
    cuda = _run(
        connector.to("cuda", dtype), Anchors(anchors.tokens_BTV.cuda(), None),
        VisionFeatures(features.tokens_BNV.cuda(), None, True),
    )  # fmt: skip
    for name, truth in exact.items():
        assert _distance(cuda[name].cpu(), truth) <= 2 * _distance(cpu[name], truth), name


def test_autocast_does_not_round_what_is_folded() -> None:
    torch.manual_seed(3)
    norms, linears = [nn.LayerNorm(64) for _ in range(2)], [nn.Linear(64, 32, bias=False) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.bias)
    parameters = [
        p for norm, linear in zip(norms, linears, strict=True) for p in (linear.weight, norm.weight, norm.bias)
    ]
    expected = _Fold.apply(*parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _Fold.apply(*parameters)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


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


STEPS: dict[str, Any] = {
    "gelu": (gelu_linear, lambda x, weight: F.linear(F.gelu(x), weight), []),
    "norm": (
        lambda x, weight, gain, shift: normed_linear(x, gain, shift, weight),
        lambda x, weight, gain, shift: F.linear(F.layer_norm(x, (12,), gain, shift), weight),
        [(12,), (12,)],
    ),
    "norm without gain": (
        lambda x, weight, bias: normed_linear(x, None, None, weight, bias),
        lambda x, weight, bias: F.linear(F.layer_norm(x, (12,)), weight, bias),
        [(7,)],
    ),
}


@pytest.mark.parametrize("frozen", [0, 1, None], ids=["frozen input", "frozen weight", "all trained"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_linear_with_the_step_before_it_equals_both_and_keeps_its_input_only(kind: str, frozen: int | None) -> None:
    fused, steps, more = STEPS[kind]
    torch.manual_seed(4)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 5, 12), (7, 12), *more)]
    if frozen is not None:
        leaves[frozen].requires_grad_(False)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    statistics = 2 * 2 * 5 * 4  # mean and deviation of ten rows
    kept, found = saved_bytes(lambda: fused(*leaves), leaves)
    assert kept <= statistics
    expected = steps(*leaves)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, trained, grad), torch.autograd.grad(expected, trained, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(*leaves), steps(*leaves))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("num_tokens", "ratio"), [(577, 2.1), (2305, 2.5)])
def test_saved_bytes_against_the_published_form(num_tokens: int, ratio: float, folded: bool) -> None:
    """An eighth of the true width and heads, which scales every tensor alike."""
    torch.manual_seed(5)
    connector = AnchorFormerConnectorConfig(num_heads=1, fold_kv=folded).build(128, 512).bfloat16()
    tokens = torch.randn(1, num_tokens, 128).bfloat16()
    inputs = Anchors(tokens[:, :145], None), VisionFeatures(tokens, None, True)
    besides = [tokens, *connector.parameters()]
    published, _ = saved_bytes(lambda: PublishedConnector(connector)(*inputs), besides)
    ours, _ = saved_bytes(lambda: connector(*inputs), besides)
    assert published >= ratio * ours


@pytest.mark.parametrize("folded", [False, True])
def test_a_compiler_takes_the_connector_in_one_graph_forward_and_backward(folded: bool) -> None:
    config = dataclasses.replace(CONFIGS[0], depth=2)
    expected_from, connector = _pair(config)[folded], _pair(config)[folded]
    expected = _run(expected_from, *_inputs())
    compiled = _run(torch.compile(connector, fullgraph=True, backend="aot_eager"), *_inputs())  # type: ignore[arg-type]
    for name, value in expected.items():
        torch.testing.assert_close(compiled.get(name, compiled.get(f"_orig_mod.{name}")), value, atol=1e-5, rtol=1e-5)
