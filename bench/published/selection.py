"""The published anchor selection: Python loops over images and heads, each ranking copied to the host."""

from __future__ import annotations

import torch
from torch import Tensor


def select(attention_row_BHN: Tensor, num_anchors: int) -> list[list[int]]:
    """Head by head, the best ranked patches are taken; the window on a ranking grows until it yields enough new ones.

    The published sort leaves ties to chance; here it is stable, so that equal scores go to the lower index and sets can
    be compared. T - 1 that the heads do not divide shrinks as published, by rounding down.

    Args:
        attention_row_BHN: scores of the [CLS] query over all N tokens, [CLS] at 0; logits or probabilities.
        num_anchors: T, [CLS] counted.

    Returns:
        Per image the chosen tokens, ascending, 0 ([CLS]) first.
    """
    heads = attention_row_BHN.shape[1]
    per_head = int((num_anchors - 1) / heads)
    return [_one_image(row_HN, per_head) for row_HN in attention_row_BHN]


def _one_image(row_HN: Tensor, per_head: int) -> list[int]:
    chosen = {0}
    for head, row_N in enumerate(row_HN):
        ranking = (torch.argsort(row_N[1:], descending=True, stable=True) + 1).cpu().tolist()
        wanted = 1 + (head + 1) * per_head
        window = per_head
        grown = chosen | set(ranking[:window])
        while len(grown) < wanted:
            window += 1
            grown = chosen | set(ranking[:window])
        chosen = grown
    return sorted(chosen)
