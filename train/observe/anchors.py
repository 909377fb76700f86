"""What can be said of anchors and attention in numbers: where they look, how alike, how concentrated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CELLS = 4
"""Per side, of the raster in which an image counts as covered; finer than the patches it is the patches themselves."""


def hits(indices_BT: Tensor, num_tokens: int, *, has_cls: bool) -> Tensor:
    """Which patches are anchors, bool (B, P); [CLS] is no patch.

    Args:
        indices_BT: into the N visual tokens, [CLS] counted.
        num_tokens: N.
    """
    hit_BN = torch.zeros(indices_BT.shape[0], num_tokens, dtype=torch.bool, device=indices_BT.device)
    return hit_BN.scatter_(1, indices_BT, True)[:, int(has_cls) :]


def coverage(hits_BP: Tensor) -> float:
    """Mean share of an image's cells with an anchor in them; patches that are no square are cells themselves."""
    side = math.isqrt(hits_BP.shape[1])
    if side * side != hits_BP.shape[1]:
        return float(hits_BP.float().mean())
    grid_B1HW = hits_BP.float().view(-1, 1, side, side)
    return float(torch.nn.functional.adaptive_max_pool2d(grid_B1HW, min(CELLS, side)).mean())


def patches_used(hits_BP: Tensor) -> float:
    """Share of the patches that are an anchor in at least one of the images."""
    return float(hits_BP.any(0).float().mean())


def common_share(hits_BP: Tensor) -> float:
    """Share of an image's anchors that are anchors in all of the images; 1 where the selection ignores the image."""
    return float(hits_BP.all(0).sum() / hits_BP.sum(1).float().mean().clamp(min=1))


def head_overlap(scores_BHP: Tensor, per_head: int) -> float:
    """Mean share that two heads have in common of the patches that each of them ranks highest; 1 with one head."""
    heads = scores_BHP.shape[1]
    if heads == 1:
        return 1.0
    best = scores_BHP.topk(per_head, dim=-1).indices
    chosen_BHP = torch.zeros(scores_BHP.shape, device=scores_BHP.device).scatter_(2, best, 1.0)
    shared_BHH = chosen_BHP @ chosen_BHP.transpose(1, 2) / per_head
    own = shared_BHH.diagonal(dim1=1, dim2=2).sum(-1)
    return float(((shared_BHH.sum((1, 2)) - own) / (heads * (heads - 1))).mean())


def entropy(logits: Tensor) -> float:
    """Mean entropy of the softmax over the last dimension, as a share of its largest value: 1 is an even look.

    Logits of -inf, which a mask leaves, do not count among those that could be looked at.
    """
    entropies = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    largest = (logits != -torch.inf).sum(-1).clamp(min=2).log()
    return float((entropies / largest).mean())
