"""LayerNorm and the linear behind it, keeping only what comes in for backward."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
"""As in the published connector, where it is `nn.LayerNorm`'s own."""


def normed_linear(
    x: Tensor, gain_I: Tensor | None, shift_I: Tensor | None, weight_OI: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """LayerNorm of x (..., I), times the transposed weight, plus the bias, (..., O); as the steps, gradients included.

    The steps keep the normed x beside x for the gradient of the weight; here x is normalised again in backward.
    """
    if torch.is_autocast_enabled(x.device.type):  # which casts each step in its own way
        return F.linear(F.layer_norm(x, x.shape[-1:], gain_I, shift_I, EPS), weight_OI, bias_O)
    return cast(Tensor, _NormedLinear.apply(x, gain_I, shift_I, weight_OI, bias_O))


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain_I: Tensor | None, shift_I: Tensor | None, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain_I, shift_I, EPS)
        # A folded weight is no parameter, and would be kept for nothing where the images need no gradient.
        ctx.save_for_backward(x, mean, rstd, gain_I, shift_I, weight_OI if any(ctx.needs_input_grad[:3]) else None)
        return F.linear(normed, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gain_I, shift_I, weight_OI = ctx.saved_tensors
        wants_x, wants_gain, wants_shift, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = grad_gain = grad_shift = None
        if wants_x or wants_gain or wants_shift:
            grad_x, grad_gain, grad_shift = torch.ops.aten.native_layer_norm_backward(
                grad @ weight_OI, x, x.shape[-1:], mean, rstd, gain_I, shift_I, (wants_x, wants_gain, wants_shift)
            )
        grad_rows = grad.flatten(0, -2)
        grad_weight = grad_bias = None
        if wants_weight:
            normed = F.layer_norm(x, x.shape[-1:], gain_I, shift_I, EPS)
            grad_weight = grad_rows.T @ normed.flatten(0, -2)
        if wants_bias:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_gain, grad_shift, grad_weight, grad_bias
