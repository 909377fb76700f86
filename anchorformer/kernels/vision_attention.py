"""Attention of vision towers: no mask, all tokens see each other, and tapped layers leave what selectors read."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from anchorformer.kernels.attention import attend
from anchorformer.kernels.backend import Kernels, kernels_on, on_device_of
from anchorformer.kernels.cls_row import cls_row
from anchorformer.kernels.received import received_attention

logger = logging.getLogger(__name__)

VISION_ATTENTION = "anchorformer_vision"

LARGEST_FUSED_WIDTH = 64
"""Widest head for which, in half precision, one kernel is the faster way; wider ones would be padded to 128.

`python -m bench gpu-micro --only tapped_attention` times one kernel, SDPA, and SDPA with `cls_row`. On an H200 (torch
2.11, Triton 3.6, SDPA by cuDNN) one kernel was ahead at 577 and 2305 tokens and level at 5185 with heads of 64, and
behind with heads of 80.
"""

_PARKED = "parked_cls_scores"
_PARKED_RECEIVED = "parked_received"
_PARKED_QK = "parked_qk"


def attend_with_cls_row(
    query_BHNK: Tensor,
    key_BHNK: Tensor,
    value_BHNK: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v and the logits of query 0, both from one kernel where that serves and pays.

    Args:
        scale: above 0.
        mask, dropout: as in `attend`; the logits know of neither.

    Returns:
        (B, N, H, K), contiguous, and fp32 (B, H, N) without gradient.
    """
    obstacle = _obstacle(query_BHNK, key_BHNK, value_BHNK, mask, dropout)
    if not torch.compiler.is_compiling():
        _log_once(query_BHNK.device.type, query_BHNK.dtype, obstacle)
    if obstacle is None:
        return _fused(query_BHNK, key_BHNK, value_BHNK, scale)
    out_BNHK = attend(query_BHNK, key_BHNK, value_BHNK, scale=scale, mask=mask, dropout=dropout)
    return out_BNHK, cls_row(query_BHNK, key_BHNK, scale)


def park_nothing(attention: nn.Module) -> None:
    """From now on this attention module keeps nothing of a forward."""
    for name in (_PARKED, _PARKED_RECEIVED, _PARKED_QK):
        vars(attention).pop(name, None)


def park_cls_scores(attention: nn.Module) -> None:
    """From now on this attention module keeps its [CLS] logits of each forward until `pop_cls_scores` takes them."""
    setattr(attention, _PARKED, None)


def pop_cls_scores(attention: nn.Module) -> Tensor | None:
    """The fp32 [CLS] logits (B, H, N) of the last forward, which the module then forgets; None if none were left."""
    scores: Tensor | None = getattr(attention, _PARKED)
    setattr(attention, _PARKED, None)
    return scores


def park_received(attention: nn.Module) -> None:
    """From now on this attention module keeps what its tokens received in each forward, until `pop_received`."""
    setattr(attention, _PARKED_RECEIVED, None)


def pop_received(attention: nn.Module) -> Tensor | None:
    """The fp32 received attention (B, N) of the last forward, which the module then forgets; None if none was left."""
    received: Tensor | None = getattr(attention, _PARKED_RECEIVED)
    setattr(attention, _PARKED_RECEIVED, None)
    return received


def park_qk(attention: nn.Module) -> None:
    """From now on this attention module keeps its first query and its keys of each forward, until `pop_qk`."""
    setattr(attention, _PARKED_QK, None)


def pop_qk(attention: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Query 0 (B, V) and the keys (B, N, V) of the last forward, heads side by side, without gradient, which the module
    then forgets; None if none were left."""
    parked: tuple[Tensor, Tensor] | None = getattr(attention, _PARKED_QK)
    setattr(attention, _PARKED_QK, None)
    return parked


def _vision_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature for vision towers."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if hasattr(module, _PARKED_RECEIVED):
        setattr(module, _PARKED_RECEIVED, received_attention(query, key, scale))
    if hasattr(module, _PARKED_QK):
        first_BV = query[:, :, 0].detach().flatten(1)
        setattr(module, _PARKED_QK, (first_BV, key.detach().transpose(1, 2).flatten(2)))
    if not hasattr(module, _PARKED):
        return attend(query, key, value, scale=scale, mask=attention_mask, dropout=dropout), None
    out, scores = attend_with_cls_row(query, key, value, scale, mask=attention_mask, dropout=dropout)
    setattr(module, _PARKED, scores)
    return out, None


@torch.library.custom_op("anchorformer::attend_with_cls_row", mutates_args=())
def _fused(query_BHNK: Tensor, key_BHNK: Tensor, value_BHNK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from anchorformer.kernels.vision_attention_triton import launch

    with on_device_of(query_BHNK):
        return launch(query_BHNK, key_BHNK, value_BHNK, scale)


@_fused.register_fake
def _(query_BHNK: Tensor, key_BHNK: Tensor, value_BHNK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = query_BHNK.shape
    out_BNHK = query_BHNK.new_empty(batch, tokens, heads, width)
    return out_BNHK, query_BHNK.new_empty(batch, heads, tokens, dtype=torch.float32)


def _obstacle(
    query_BHNK: Tensor, key_BHNK: Tensor, value_BHNK: Tensor, mask: Tensor | None, dropout: float
) -> str | None:
    """Why the fused kernel does not serve here, or None."""
    if kernels_on(query_BHNK.device) is not Kernels.triton:
        return "torch computes the anchor operations here"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query_BHNK, key_BHNK, value_BHNK)):
        return "the tower trains, and the kernel has no backward"
    if mask is not None or dropout > 0:
        return "the kernel has no mask and no dropout"
    if not query_BHNK.dtype == key_BHNK.dtype == value_BHNK.dtype:
        return "queries, keys and values come in different dtypes"
    if query_BHNK.dtype not in (torch.bfloat16, torch.float16):
        return "the kernel multiplies half precision only"
    if query_BHNK.shape[-1] > LARGEST_FUSED_WIDTH:
        return f"heads are wider than {LARGEST_FUSED_WIDTH}"
    return None


@cache
def _log_once(device_type: str, dtype: torch.dtype, obstacle: str | None) -> None:
    chosen = "one kernel" if obstacle is None else f"one after the other ({obstacle})"
    name = str(dtype).removeprefix("torch.")
    logger.info("attention and [CLS] row of the tapped layer on %s in %s: %s", device_type, name, chosen)


AttentionInterface.register(VISION_ATTENTION, _vision_forward)
