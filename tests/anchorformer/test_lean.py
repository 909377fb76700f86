"""A lean language model computes what the stock one does, from fewer saved bytes; its kernels against the formulas."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from anchorformer.kernels import rms_norm as rms_norm_module
from anchorformer.kernels import rope as rope_module
from anchorformer.kernels import swiglu as swiglu_module
from anchorformer.kernels.attention import FLAT_MASK, TEXT_ATTENTION
from anchorformer.kernels.rms_norm import rms_norm
from anchorformer.kernels.rope import rotate
from anchorformer.kernels.swiglu import swiglu
from anchorformer.lean import make_lean
from bench.runner import saved_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LAYERS = 2
PER_LAYER = 4  # two norms, one feed-forward, one rotation
HEAD_NORMS = {"qwen3": 2}  # of queries and keys, in every layer


def _model(family: str, **changes: Any) -> PreTrainedModel:
    config_class, model_class = FAMILIES[family]
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    model: PreTrainedModel = model_class._from_config(config_class(**sizes), attn_implementation=TEXT_ATTENTION)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def _run(model: PreTrainedModel, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    ids, weights = torch.randint(0, 61, (2, 9)), torch.randn(2, 9, 61)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logits = model(ids, use_cache=False).logits
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_and_every_gradient_equal_the_stock_model(family: str) -> None:
    stock = _model(family)
    lean = copy.deepcopy(stock)
    assert make_lean(lean) == (PER_LAYER + HEAD_NORMS.get(family, 0)) * LAYERS + 1
    (logits, gradients), (expected, expected_gradients) = _run(lean), _run(stock)
    # Norms and gates are bit-equal forward; the rotation rounds once where the stock one rounds three times.
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-5 * expected_gradients[name].norm(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_no_further_from_fp32_than_twice_the_stock_model(autocast: bool) -> None:
    exact_model = _model("qwen2")
    exact = _run(copy.deepcopy(exact_model))
    half = exact_model if autocast else exact_model.bfloat16()
    lean = copy.deepcopy(half)
    make_lean(lean)

    def errors(model: PreTrainedModel) -> tuple[float, float]:
        logits, gradients = _run(model, torch.bfloat16 if autocast else None)
        squares = [(gradients[name].float() - exact[1][name]).square().sum() for name in exact[1]]
        return float((logits.float() - exact[0]).norm()), float(torch.stack(squares).sum().sqrt())

    for mine, theirs in zip(errors(lean), errors(half), strict=True):
        assert 0 < mine <= 2 * theirs


def test_only_forwards_of_this_instance_change() -> None:
    stock = _model("llama")
    lean = copy.deepcopy(stock)
    make_lean(lean)
    assert [type(module) for module in lean.modules()] == [type(module) for module in stock.modules()]
    assert lean.state_dict().keys() == stock.state_dict().keys()
    assert not any("forward" in module.__dict__ for module in stock.modules())
    again = copy.deepcopy(lean)
    with torch.no_grad():
        again.model.norm.weight.zero_()
    assert again(torch.tensor([[1, 2]])).logits.abs().max() == 0  # the copy's methods are bound to the copy
    assert lean(torch.tensor([[1, 2]])).logits.abs().max() > 0


def test_wrapped_linears_and_hooks_are_called() -> None:
    """LoRA replaces linears by modules of its own, and ZeRO-3 gathers weights in hooks of the module that owns them."""
    model = _model("llama")
    make_lean(model)
    layer = model.model.layers[0]
    expected = model(torch.tensor([[1, 2, 3]])).logits
    calls: list[str] = []
    layer.mlp.gate_proj = nn.Sequential(layer.mlp.gate_proj, nn.Identity())
    for name, module in layer.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, expected)
    assert {"mlp.gate_proj.0", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "self_attn.q_proj"} <= set(calls)


def test_unknown_families_and_activations_keep_their_own_code(caplog: pytest.LogCaptureFixture) -> None:
    gelu = _model("llama", hidden_act="gelu")
    assert make_lean(gelu) == (PER_LAYER - 1) * LAYERS + 1
    assert "forward" not in gelu.model.layers[0].mlp.__dict__
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    with caplog.at_level(logging.INFO, logger="anchorformer.lean"):
        assert make_lean(other) == 0
    assert "GPT2LMHeadModel keeps its own" in caplog.text


# --- saved bytes -----------------------------------------------------------------------------------------------------


def _saved_kib_per_token(width: int, layers: int, trainable: bool, device: str) -> float:
    """What a flat forward keeps for backward, at Llama-2-7B's proportions."""
    positions = 704  # beyond the rows for which the CPU chooses attention with scores
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width * 11008 // 4096, num_hidden_layers=layers,
        num_attention_heads=width // 128,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=TEXT_ATTENTION, dtype=torch.bfloat16).to(device)
    model.requires_grad_(trainable)
    make_lean(model)
    embeds = torch.randn(1, positions, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    inputs: dict[str, Any] = {
        "inputs_embeds": embeds, "position_ids": torch.arange(positions, device=device)[None], "use_cache": False,
        "attention_mask": FLAT_MASK, "max_length_q": positions, "logits_to_keep": 1,
        "cu_seq_lens_q": torch.tensor([0, positions], dtype=torch.int32, device=device),
    }  # fmt: skip
    kept, _ = saved_bytes(lambda: model(**inputs), model.parameters())
    return kept / 1024 / positions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("trainable", "limit"), [(False, 95), (True, 133)])
@pytest.mark.parametrize("width", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_saved_bytes_of_a_layer_at_7b_width(width: int, trainable: bool, limit: float, device: str) -> None:
    """Bytes per token are proportional to the width, so an eighth of it tells the same; two layers minus one."""
    one, two = (_saved_kib_per_token(width, layers, trainable, device) for layers in (1, 2))
    assert (two - one) * 4096 / width <= limit


# --- the kernels -----------------------------------------------------------------------------------------------------


def _rms_norm_case(dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(3, 5, 64), torch.rand(64) + 0.5]


def _swiglu_case(dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(3, 5, 96), torch.randn(3, 5, 96)]


def _rope_case(dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)]


def _angles(like: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.logspace(0, -3, 8, dtype=torch.float64)
    both = torch.cat((angles, angles), -1)[None].to(like.device)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def _stock_norm(x: Tensor, weight: Tensor) -> Tensor:
    x_wide = x if x.dtype is torch.float64 else x.float()
    return weight * (x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


CASES: list[Any] = [
    (_rms_norm_case, lambda x, weight: rms_norm(x, weight, 1e-5), _stock_norm),
    (_swiglu_case, swiglu, lambda gate, up: F.silu(gate) * up),
    (_rope_case, lambda q, k: rotate(q, k, *_angles(q)), lambda q, k: apply_rotary_pos_emb(q, k, *_angles(q))),
]


def _with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.manual_seed(3)
    loss = sum((x.double() * torch.randn(x.shape, dtype=torch.float64).to(x.device)).sum() for x in outs)
    assert isinstance(loss, Tensor)
    return [*(x.detach() for x in outs), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "ours", "stock"), CASES, ids=["rms_norm", "swiglu", "rope"])
def test_error_is_at_most_twice_that_of_the_plain_formula(
    make: Callable[..., list[Tensor]], ours: Any, stock: Any, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(2)
    inputs = [x.to(device, dtype) for x in make(dtype, device)]
    exact = _with_gradients(stock, [x.double() for x in inputs])
    found, plain = _with_gradients(ours, inputs), _with_gradients(stock, inputs)
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + 1e-12


def test_plain_forms_are_bit_equal_to_the_stock_modules_forward() -> None:
    torch.manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, 64).to(dtype)
        norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))
        assert torch.equal(swiglu(x, x.flip(0)), F.silu(x) * x.flip(0))


def test_a_compiler_takes_them_in_one_graph() -> None:
    def layer(x: Tensor, weight: Tensor, up: Tensor) -> Tensor:
        x = swiglu(rms_norm(x, weight, 1e-5), up)
        query, key = rotate(x[:, None], x[:, None], torch.ones(1, 5, 64), torch.zeros(1, 5, 64))
        return query + key

    inputs = [torch.randn(3, 5, 64), torch.rand(64), torch.randn(3, 5, 64)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(_with_gradients(compiled, inputs), _with_gradients(layer, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_liger_is_called_by_its_signature_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, tuple[Any, ...]] = {}

    def stand_in(file: str, name: str, answer: Callable[..., Any]) -> None:
        class Function:
            @staticmethod
            def apply(*arguments: Any) -> Any:
                calls[name] = arguments
                return answer(*arguments)

        module = ModuleType(file)
        setattr(module, name, Function)
        monkeypatch.setitem(sys.modules, file, module)

    def norm(X: Tensor, W: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return _stock_norm(X, W)

    stand_in("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", norm)
    stand_in("liger_kernel.ops.swiglu", "LigerSiLUMulFunction", lambda a, b: F.silu(a) * b)
    stand_in("liger_kernel.ops.rope", "LigerRopeFunction", lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, sin))
    for module in (rms_norm_module, swiglu_module, rope_module):
        monkeypatch.setattr(module, "rows_run_on_liger", lambda device: True)
    for make, ours, stock in CASES:
        inputs = make(torch.float32, "cpu")
        for mine, theirs in zip(_with_gradients(ours, inputs), _with_gradients(stock, inputs), strict=True):
            assert torch.equal(mine, theirs)
    assert len(calls) == 3
