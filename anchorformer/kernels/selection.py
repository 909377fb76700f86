"""The anchor rule as a function of the scores: heads in turn add the patches that their [CLS] query ranks highest."""

from __future__ import annotations

import torch
from torch import Tensor

from anchorformer.kernels.backend import Kernels, kernels_on, on_device_of


def select_anchors(scores_BHN: Tensor, num_anchors: int) -> Tensor:
    """[CLS], then for each head in order its highest ranked patches that no earlier head has taken.

    Equal scores go to the lower index, and -0.0 equals 0.0. No host synchronisation, static shapes.
    Source: AnchorFormer, arXiv 2405.18405, and the `feature_select` function of its released code.

    Args:
        scores_BHN: scores of the [CLS] query over N tokens, [CLS] at 0; logits or probabilities, since only the order
            within a head counts. Ranked in fp32.
        num_anchors: T; every head adds (T-1) // H. A remainder is dropped as in the released code; the selector refuses
            one in its config.

    Returns:
        int64 (B, T), ascending, 0 first.

    Raises:
        ValueError: there are fewer patches than that.
    """
    heads, tokens = scores_BHN.shape[1:]
    per_head = (num_anchors - 1) // heads
    if heads * per_head >= tokens:
        raise ValueError(f"{heads} heads cannot add {per_head} patches each where there are {tokens - 1}")
    if kernels_on(scores_BHN.device) is Kernels.triton:
        return _fused(scores_BHN, 1 + heads * per_head)
    return _plain(scores_BHN, 1 + heads * per_head)


@torch.library.custom_op("anchorformer::select_anchors", mutates_args=())
def _fused(scores_BHN: Tensor, num_anchors: int) -> Tensor:
    from anchorformer.kernels.selection_triton import launch

    with on_device_of(scores_BHN):
        return launch(scores_BHN, num_anchors)


@_fused.register_fake
def _(scores_BHN: Tensor, num_anchors: int) -> Tensor:
    return scores_BHN.new_empty(scores_BHN.shape[0], num_anchors, dtype=torch.int64)


def _plain(scores_BHN: Tensor, num_anchors: int) -> Tensor:
    batch, heads, tokens = scores_BHN.shape
    per_head = (num_anchors - 1) // heads
    keys_BHP = _unique_keys(scores_BHN[..., 1:])
    taken_BP = torch.zeros(batch, tokens - 1, dtype=torch.bool, device=scores_BHN.device)
    lowest = torch.iinfo(torch.int64).min
    for head in range(heads):
        free_BP = keys_BHP[:, head].masked_fill(taken_BP, lowest)
        best = free_BP.topk(per_head, dim=-1, sorted=False).indices
        taken_BP.scatter_(1, best, True)
    # A stable sort of "not taken" brings the taken ones forward without disturbing their order.
    patches = (~taken_BP).to(torch.uint8).argsort(dim=-1, stable=True)[:, : heads * per_head]
    return torch.cat([patches.new_zeros(batch, 1), patches + 1], dim=1)


def _unique_keys(scores_BHP: Tensor) -> Tensor:
    """int64 keys in the order of the scores, no two alike within a head: topk is not stable, so ties must not exist.

    The upper half is the fp32 score as an integer of the same order, the lower half the reversed index.
    """
    # +0.0 turns -0.0 into 0.0, whose bit patterns would otherwise rank equal scores apart.
    bits = (scores_BHP.float() + 0.0).contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    num_patches = scores_BHP.shape[-1]
    return (ordered << 32) + torch.arange(num_patches - 1, -1, -1, device=scores_BHP.device)
