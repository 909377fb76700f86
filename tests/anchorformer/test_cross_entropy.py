"""The loss over the vocabulary in chunks: the same value and gradients, from a third of the memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anchorformer.kernels import cross_entropy
from anchorformer.kernels.cross_entropy import cross_entropy_sum

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _case(rows: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = (5 * torch.randn(rows, 37)).to(device, dtype).requires_grad_()
    return logits, torch.randint(0, 37, (rows,), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9])
def test_chunks_change_nothing(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 4 * 37)
    logits, targets = _case(rows, device)
    found = 3 * cross_entropy_sum(logits, targets)
    expected = 3 * F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_used_in_fp32_and_get_gradients_of_their_own_dtype(
    dtype: torch.dtype, device: str
) -> None:
    logits, targets = _case(9, device, dtype)
    found = cross_entropy_sum(logits, targets)
    assert found.dtype is torch.float32
    (gradient,) = torch.autograd.grad(found, logits)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert gradient.dtype is dtype
    # One rounding of a gradient below one.
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


def test_only_the_logits_are_kept_and_they_are_left_alone() -> None:
    logits, targets = _case(9)
    before, kept = logits.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = cross_entropy_sum(logits, targets)
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() != logits.data_ptr()) == 2 * 9
    loss.backward()
    assert torch.equal(logits, before)
