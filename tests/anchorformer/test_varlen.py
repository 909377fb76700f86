"""Packed attention on CUDA: each release's own signature, and the kernels themselves where a card is there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from anchorformer.errors import UserError
from anchorformer.kernels import backend as backend_module
from anchorformer.kernels import varlen
from anchorformer.kernels.attention import attend, attend_flat
from anchorformer.kernels.backend import Backend, choose

LENGTHS = [40, 7, 129]
WIDTH = 64


def _exact(query_SHK: Tensor, key_ShK: Tensor, value_ShK: Tensor, scale: float, lengths: list[int]) -> Tensor:
    """Causal softmax attention sample by sample in float64."""
    groups = query_SHK.shape[1] // key_ShK.shape[1]
    samples = []
    for query, key, value in zip(*(x.double().split(lengths) for x in (query_SHK, key_ShK, value_ShK)), strict=True):
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("shk,thk->hst", query, key) * scale
        later = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).triu(1)
        samples.append(torch.einsum("hst,thk->shk", scores.masked_fill(later, float("-inf")).softmax(-1), value))
    return torch.cat(samples)


def _qkv(groups: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> list[Tensor]:
    torch.manual_seed(4)
    heads = (2 * groups, 2, 2)
    return [torch.randn(sum(LENGTHS), count, width).to(dtype).requires_grad_() for count in heads]


def _cu_seqlens(device: str = "cpu") -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)


# --- the signatures, each answered by the exact computation ----------------------------------------------------------


def _answer(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Any:
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype is torch.int32
    lengths = cu_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    return lambda scale: _exact(query, key, value, scale or query.shape[-1] ** -0.5, lengths).to(query.dtype)


def _torch_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert is_causal
    assert query.shape[1] == key.shape[1], "shared key heads are not documented in this release"
    return _answer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)(None)


def _torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert window_size == (-1, 0)
    assert query.shape[1] == key.shape[1], "shared key heads are not documented in this release"
    return _answer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)(scale)


def _torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert window_size == (-1, 0)
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _answer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)(scale)


def _flash_attn_2_8(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert causal
    assert dropout_p == 0.0
    return _answer(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)(softmax_scale)


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    probes = (varlen._flash_attn, varlen._torch_varlen, backend_module._choose_flat_on_cuda)
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: Callable[..., Any] | None) -> None:
    stand_in = ModuleType(module)
    if function is not None:
        setattr(stand_in, name, function)
    monkeypatch.setitem(sys.modules, module, stand_in)


def _pretend_h200(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("release", [_torch_2_10, _torch_2_11, _torch_2_13])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scale", [WIDTH**-0.5, 0.3])
def test_every_signature_of_torch_gets_the_same_attention(
    release: Callable[..., Any], groups: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, "torch.nn.attention.varlen", "varlen_attn", release)
    _pretend_h200(monkeypatch)
    assert varlen.torch_obstacle(torch.bfloat16, WIDTH) is None
    _check(varlen.torch_varlen, groups, scale)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_flash_attn_wheel_is_called_by_its_signature_and_comes_first(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, "flash_attn", "flash_attn_varlen_func", _flash_attn_2_8)
    _pretend_h200(monkeypatch)
    assert choose(torch.device("cuda"), torch.bfloat16, 129, WIDTH, flat=True, in_blocks=False) is Backend.flash_attn
    _check(varlen.flash_attn, groups, 0.3)


def _check(kernel: Callable[..., Tensor], groups: int, scale: float) -> None:
    leaves = _qkv(groups)
    out = kernel(*leaves, scale=scale, cu_seqlens=_cu_seqlens(), max_seqlen=max(LENGTHS), dropout=0.0)
    expected = _exact(*leaves, scale, LENGTHS)
    weights = torch.randn_like(expected)
    # One rounding of the stand-in's float64 answer to fp32, and of a query that is scaled beforehand.
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    found = torch.autograd.grad((out.double() * weights).sum(), leaves)
    for mine, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=5e-6)


def test_without_a_kernel_the_rectangle_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_h200(monkeypatch)
    cuda = torch.device("cuda")
    assert choose(cuda, torch.bfloat16, 9, WIDTH, flat=True, in_blocks=False) is Backend.varlen
    assert choose(cuda, torch.float32, 9, WIDTH, flat=True, in_blocks=False) is Backend.sdpa
    assert "half precision" in backend_module._choose_flat_on_cuda(torch.float32, WIDTH)[1]
    assert choose(cuda, torch.bfloat16, 9, 60, flat=True, in_blocks=False) is Backend.sdpa
    assert "head widths" in backend_module._choose_flat_on_cuda(torch.bfloat16, 60)[1]

    _install(monkeypatch, "torch.nn.attention.varlen", "varlen_attn", lambda query, key, value, borders: None)
    varlen._torch_varlen.cache_clear()
    assert "not known" in str(varlen.torch_obstacle(torch.bfloat16, WIDTH))
    _install(monkeypatch, "torch.nn.attention.varlen", "varlen_attn", None)
    varlen._torch_varlen.cache_clear()
    assert "has no torch.nn.attention.varlen" in str(varlen.torch_obstacle(torch.bfloat16, WIDTH))


@pytest.mark.parametrize(("capability", "width", "fits"), [
    ((9, 0), 256, True), ((8, 9), 256, False), ((8, 9), 192, True), ((7, 5), 64, False),
])  # fmt: skip
def test_heads_whose_backward_does_not_fit_the_card_are_refused(
    capability: tuple[int, int], width: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_h200(monkeypatch, capability)
    assert (varlen.torch_obstacle(torch.bfloat16, width) is None) == fits


def test_dropout_is_refused_where_the_kernel_has_none() -> None:
    with pytest.raises(UserError, match="dropout"):
        varlen.torch_varlen(*_qkv(1), scale=1.0, cu_seqlens=_cu_seqlens(), max_seqlen=129, dropout=0.1)


# --- on a card -------------------------------------------------------------------------------------------------------


def _flat(tensors: list[Tensor], device: str) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in tensors)
    return attend_flat(
        query, key, value, scale=WIDTH**-0.5, cu_seqlens=_cu_seqlens(device), max_seqlen=max(LENGTHS)
    )[0]  # fmt: skip


def _errors(leaves: list[Tensor], run: Callable[[list[Tensor]], Tensor]) -> list[float]:
    """Largest error of output and gradients against float64, after rounding the inputs to the leaves' dtype."""
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    expected = _exact(*exact_leaves, WIDTH**-0.5, LENGTHS)
    weights = torch.randn_like(expected)
    out = run(leaves)
    gradients = torch.autograd.grad((out * weights.to(out)).sum(), leaves)
    exact = torch.autograd.grad((expected * weights).sum(), exact_leaves)
    return [
        float((mine.double().cpu() - theirs.cpu()).abs().max())
        for mine, theirs in zip((out, *gradients), (expected, *exact), strict=True)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_varlen_error_is_at_most_twice_that_of_the_plain_computation(groups: int) -> None:
    """Output and gradients; the yardstick is flash-attention's own: plain attention in the same precision."""
    assert choose(torch.device("cuda"), torch.bfloat16, 129, WIDTH, flat=True, in_blocks=False) in (
        Backend.varlen,
        Backend.flash_attn,
    )
    leaves = [x.detach().cuda().requires_grad_() for x in _qkv(groups, torch.bfloat16)]

    def plain(tensors: list[Tensor]) -> Tensor:
        samples = []
        for sample in zip(*(x.split(LENGTHS) for x in tensors), strict=True):
            heads = [x.transpose(0, 1)[None] for x in sample]
            samples.append(attend(heads[0], heads[1], heads[2], scale=WIDTH**-0.5, causal=True,
                                  backend=Backend.matmul)[0])  # fmt: skip
        return torch.cat(samples)

    found, yardstick = _errors(leaves, lambda tensors: _flat(tensors, "cuda")), _errors(leaves, plain)
    assert all(mine <= 2 * theirs for mine, theirs in zip(found, yardstick, strict=True)), (found, yardstick)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_fp32_on_cuda_runs_as_a_rectangle_and_is_exact(groups: int) -> None:
    leaves = [x.detach().cuda().requires_grad_() for x in _qkv(groups)]
    # fp32 products (TF32 is off unless asked for): about a hundred roundings of values of order one.
    assert max(_errors(leaves, lambda tensors: _flat(tensors, "cuda"))) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_head_widths_with_gradients(width: int) -> None:
    leaves = [x.detach().cuda().requires_grad_() for x in _qkv(2, torch.bfloat16, width)]
    query, key, value = (x.transpose(0, 1)[None] for x in leaves)
    out = attend_flat(
        query, key, value, scale=width**-0.5, cu_seqlens=_cu_seqlens("cuda"), max_seqlen=max(LENGTHS)
    )  # fmt: skip
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["vision", "connector", "masked", "causal", "static cache"])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_rectangle_builds_a_matrix_of_scores(kind: str, groups: int, dtype: torch.dtype) -> None:
    """Asked of the profiler: torch's own fallback, and with it every softmax of its own, is a silent one."""
    queries, keys = {"connector": (145, 577), "static cache": (96, 200)}.get(kind, (300, 300))
    torch.manual_seed(0)
    query = torch.randn(1, 8, queries, 64, device="cuda", dtype=dtype, requires_grad=True)
    key, value = (
        torch.randn(1, 8 // groups, keys, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
    )
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device="cuda").tril() if kind == "masked" else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        attend(query, key, value, scale=0.125, causal=kind in ("causal", "static cache"), mask=mask).sum().backward()
    ran = {event.key for event in profiler.key_averages()}
    assert not ran & {"aten::_scaled_dot_product_attention_math", "aten::_softmax", "aten::bmm"}, ran
    assert any("_scaled_dot_product" in name and "backward" in name for name in ran), ran
