"""GELU and the linear behind it, keeping only what comes in for backward."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """erf-GELU of x (..., I), times the transposed weight, (..., O); equal to the two steps, gradients included.

    The two steps keep gelu(x) beside x, and in a feed-forward both have its inner width.
    """
    if torch.is_autocast_enabled(x.device.type):  # which casts each step in its own way
        return F.linear(F.gelu(x), weight_OI)
    return cast(Tensor, _GeluLinear.apply(x, weight_OI))


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(F.gelu(x), weight_OI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.gelu_backward(grad @ weight_OI, x)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ F.gelu(x).flatten(0, -2)
        return grad_x, grad_weight
