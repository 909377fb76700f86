"""The kernels for samples that lie end to end: whether one can run, and how each release wants to be called.

Shapes: S positions of all samples together, H query heads, h key heads (h divides H), K head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from anchorformer.errors import UserError

WIDEST_HEAD = 256
WIDEST_HEAD_ELSEWHERE = 192
"""On cards with less shared memory than A100, H100 and B200 the backward pass of wider heads does not fit."""
LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0))


def flash_attn_obstacle(dtype: torch.dtype, head_width: int) -> str | None:
    """Why the flash-attn wheel cannot run here, or None."""
    if _flash_attn() is None:
        return "the flash-attn wheel is not installed"
    return _kernel_obstacle(dtype, head_width)


def torch_obstacle(dtype: torch.dtype, head_width: int) -> str | None:
    """Why torch's own varlen kernel cannot run here, or None."""
    function = _torch_varlen()
    if function is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if not {"is_causal", "window_size"} & _parameters(function):
        return f"varlen_attn of torch {torch.__version__} has a signature that is not known"
    return _kernel_obstacle(dtype, head_width)


def flash_attn(
    query_SHK: Tensor,
    key_ShK: Tensor,
    value_ShK: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
) -> Tensor:
    """Causal attention inside each sample by the flash-attn wheel, (S, H, K); `cu_seqlens` is int32 (samples + 1,).

    Source: `flash_attn_varlen_func` of flash-attn 2.7 and 2.8, github.com/Dao-AILab/flash-attention.
    """
    function = _flash_attn()
    assert function is not None
    out = function(
        query_SHK, key_ShK, value_ShK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p=dropout, softmax_scale=scale, causal=True,
    )  # fmt: skip
    return cast(Tensor, out)


def torch_varlen(
    query_SHK: Tensor,
    key_ShK: Tensor,
    value_ShK: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
) -> Tensor:
    """The same by `torch.nn.attention.varlen.varlen_attn`, whose signature has grown with the releases:

    * 2.10 has `is_causal`, and the scale 1 / sqrt(K) only;
    * 2.11 has `window_size` and `scale`;
    * 2.12 and 2.13 have `enable_gqa` as well; before, key heads are repeated.

    Raises:
        UserError: attention dropout, which the kernel does not have.
    """
    if dropout > 0:
        raise UserError(
            "the varlen kernel has no attention dropout",
            found=f"attention_dropout={dropout}",
            expected="attention_dropout=0",
            remedy="set attention_dropout to 0 in the language model's config.json",
        )
    function = _torch_varlen()
    assert function is not None
    has = _parameters(function)
    groups = query_SHK.shape[1] // key_ShK.shape[1]
    options: dict[str, Any] = {}
    if "enable_gqa" in has:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key_ShK, value_ShK = key_ShK.repeat_interleave(groups, 1), value_ShK.repeat_interleave(groups, 1)
    if "window_size" in has:
        options |= {"window_size": (-1, 0), "scale": scale}  # everything before a position, nothing behind it
    else:
        built_in = query_SHK.shape[2] ** -0.5
        query_SHK = query_SHK if scale == built_in else query_SHK * (scale / built_in)
        options["is_causal"] = True
    out = function(query_SHK, key_ShK, value_ShK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return cast(Tensor, out)


def _kernel_obstacle(dtype: torch.dtype, head_width: int) -> str | None:
    # Both are FlashAttention-2 underneath, with the same limits.
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the varlen kernel takes half precision, not {dtype}"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    widest = WIDEST_HEAD if capability in LARGE_SHARED_MEMORY else WIDEST_HEAD_ELSEWHERE
    if head_width % 8 or head_width > widest:
        return f"the varlen kernel takes head widths that 8 divides up to {widest}, not {head_width}"
    if capability < (8, 0):
        return "the varlen kernel needs compute capability 8.0"
    return None


@cache
def _flash_attn() -> Callable[..., Any] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # also raised by a wheel that was built for another torch
        return None
    return cast(Callable[..., Any], flash_attn_varlen_func)


@cache
def _torch_varlen() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast(Callable[..., Any], varlen_attn)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
