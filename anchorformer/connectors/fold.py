"""Keys and values of all cross layers from one matrix product, with their LayerNorms folded into the weights.

Shapes: L layers, V vision width, E = 2 * heads * head width: keys and values of one layer side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from anchorformer.kernels.normed_linear import normed_linear


def folded_key_values(media_BNV: Tensor, norms: Sequence[nn.Module], linears: Sequence[nn.Module]) -> list[Tensor]:
    """[linear(norm(media)) for each layer], (B, N, E) each, from media that are normalised once.

    All norms see the same media and differ in their affine part only, so

        W (g * xh + b) = (W diag(g)) xh + W b        with xh the media less their mean over their deviation,

    and what is left of the L products is one, with L * E outputs. The weights are read outside the forward of the
    modules that own them, which ZeRO-3 does not allow.
    """
    weight, bias = _Fold.apply(*chain.from_iterable((linear.weight, norm.weight, norm.bias)
                                                    for norm, linear in zip(norms, linears, strict=True)))  # fmt: skip
    return list(normed_linear(media_BNV, None, None, weight, bias).chunk(len(norms), dim=-1))


class _Fold(torch.autograd.Function):
    """W diag(g) and W b of every layer, one below the other, computed in at least fp32 and rounded once.

    Only the parameters themselves are kept for backward. Arguments are W (E, V), g (V,) and b (V,) of each layer.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*parameters)
        weight_LEV, gain_LV, shift_LV = _stack(parameters)
        folded_LEV = weight_LEV * gain_LV[:, None]
        bias_LE = (weight_LEV * shift_LV[:, None]).sum(-1)  # no product of matrices: autocast would round it
        dtype = parameters[0].dtype
        return folded_LEV.flatten(0, 1).to(dtype), bias_LE.flatten().to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor, ...]:
        weight_LEV, gain_LV, shift_LV = _stack(ctx.saved_tensors)
        grad_LEV, grad_LE = grad_weight.to(weight_LEV).view_as(weight_LEV), grad_bias.to(weight_LEV)
        grad_LE = grad_LE.view(weight_LEV.shape[:2])
        gradients = (
            grad_LEV * gain_LV[:, None] + grad_LE[..., None] * shift_LV[:, None],
            (grad_LEV * weight_LEV).sum(1),
            (grad_LE[..., None] * weight_LEV).sum(1),
        )
        dtype = ctx.saved_tensors[0].dtype
        return tuple(chain.from_iterable(zip(*(gradient.to(dtype).unbind() for gradient in gradients), strict=True)))


def _stack(parameters: Sequence[Tensor]) -> Iterable[Tensor]:
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    return (torch.stack(tuple(parameters[kind::3])).to(dtype) for kind in range(3))
