"""RMSNorm that keeps its input and one number per row for backward, behind one seam.

Shapes: (..., D).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from anchorformer.kernels.backend import rows_run_on_liger


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), the mean in fp32 and the normed value rounded to x's dtype, as in Llama.

    Written as it stands this keeps four tensors of x's size for backward, two of them in fp32; every way here keeps x
    itself, which the residual stream holds anyway, and one number per row.

    Returns:
        (..., D) in the dtype that `weight_D` and x promote to.

    Source: arXiv 1910.07467; the form of transformers' LlamaRMSNorm, to which the plain form's output is bit-equal.
    """
    if rows_run_on_liger(x.device):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # in_place would write the gradient of x over that of the output, which is not ours.
        return cast(Tensor, LigerRMSNormFunction.apply(x, weight_D, eps, 0.0, "llama", False))
    if x.is_cuda and x.dtype == weight_D.dtype and hasattr(torch.ops.aten, "_fused_rms_norm"):
        return F.rms_norm(x, (x.shape[-1],), weight_D, eps)  # one kernel on CUDA, which keeps the same two tensors
    return cast(Tensor, _RmsNorm.apply(x, weight_D, eps))


class _RmsNorm(torch.autograd.Function):
    """The plain form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        rstd = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_D, rstd)
        return weight_D * (x_fp32 * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_D, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        grad_normed = (grad * weight_D).float()
        grad_x = rstd * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight_D.dtype)
        return grad_x.to(x.dtype), grad_weight, None
