"""The [CLS] row of attention logits by itself, for layers whose attention runs in a kernel that keeps no logits."""

from __future__ import annotations

import torch
from torch import Tensor

from anchorformer.kernels.backend import Kernels, kernels_on, on_device_of


def cls_row(query_BHNK: Tensor, key_BHNK: Tensor, scale: float) -> Tensor:
    """fp32 logits of query 0 over all keys, (B, H, N), without gradient.

    A product and a sum instead of a matrix product: that stays fp32 under autocast and TF32, and the scores of an image
    do not depend on which images share its batch.
    """
    if kernels_on(key_BHNK.device) is Kernels.triton:
        return _fused(query_BHNK.detach(), key_BHNK.detach(), scale)
    return _plain(query_BHNK, key_BHNK, scale)


@torch.library.custom_op("anchorformer::cls_row", mutates_args=())
def _fused(query_BHNK: Tensor, key_BHNK: Tensor, scale: float) -> Tensor:
    from anchorformer.kernels.cls_row_triton import launch

    with on_device_of(key_BHNK):
        return launch(query_BHNK, key_BHNK, scale)


@_fused.register_fake
def _(query_BHNK: Tensor, key_BHNK: Tensor, scale: float) -> Tensor:
    return key_BHNK.new_empty(key_BHNK.shape[:3], dtype=torch.float32)


def _plain(query_BHNK: Tensor, key_BHNK: Tensor, scale: float) -> Tensor:
    with torch.no_grad():
        return (query_BHNK[:, :, :1].float() * key_BHNK.float()).sum(-1) * scale
