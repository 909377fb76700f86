"""The rotary position embedding of queries and keys in a third of the passes over them, behind one seam.

Shapes: B rows, H query heads, h key heads, S positions, K head width; dimension k turns together with k + K / 2.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from anchorformer.kernels.backend import rows_run_on_liger


def rotate(query_BHSK: Tensor, key_BhSK: Tensor, cos_BSK: Tensor, sin_BSK: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + (-x[K/2:], x[:K/2]) * sin for queries and keys, with the signature of transformers' families.

    Args:
        cos_BSK, sin_BSK: both halves of the last dimension alike; without gradient.

    Source: arXiv 2104.09864, in the layout of GPT-NeoX that Hugging Face uses for Llama, Mistral and Qwen2.
    """
    if rows_run_on_liger(query_BHSK.device) and query_BHSK.dtype == cos_BSK.dtype:
        from liger_kernel.ops.rope import LigerRopeFunction

        return cast(tuple[Tensor, Tensor], LigerRopeFunction.apply(query_BHSK, key_BhSK, cos_BSK, sin_BSK))
    return cast(tuple[Tensor, Tensor], _Rotate.apply(query_BHSK, key_BhSK, cos_BSK, sin_BSK))


class _Rotate(torch.autograd.Function):
    """The plain form; the gradient of a rotation is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos_BSK: Tensor, sin_BSK: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_BSK, sin_BSK)
        ctx.dtypes = query.dtype, key.dtype
        return _turn(query, cos_BSK, sin_BSK, 1), _turn(key, cos_BSK, sin_BSK, 1)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos_BSK, sin_BSK = ctx.saved_tensors
        query_dtype, key_dtype = ctx.dtypes
        query = _turn(grad_query, cos_BSK, sin_BSK, -1).to(query_dtype)
        return query, _turn(grad_key, cos_BSK, sin_BSK, -1).to(key_dtype), None, None


def _turn(x_BHSK: Tensor, cos_BSK: Tensor, sin_BSK: Tensor, direction: int) -> Tensor:
    half = x_BHSK.shape[-1] // 2
    sin_B1SK = sin_BSK.unsqueeze(1)
    out_BHSK = x_BHSK * cos_BSK.unsqueeze(1)
    out_BHSK[..., :half].addcmul_(x_BHSK[..., half:], sin_B1SK[..., :half], value=-direction)
    out_BHSK[..., half:].addcmul_(x_BHSK[..., :half], sin_B1SK[..., half:], value=direction)
    return out_BHSK
