"""The attention that every token receives, for layers whose attention runs in a kernel that keeps no map."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES_AT_ONCE = 64
"""Rows of the attention map that exist at a time."""


def received_attention(query_BHNK: Tensor, key_BHNK: Tensor, scale: float) -> Tensor:
    """Column means of softmax(q k^T scale) over heads and queries: fp32 (B, N), each row summing to 1.

    Without gradient; in fp32 also under autocast; a few queries after another, so that no N x N map exists at any time.
    """
    batch, heads, tokens, _ = query_BHNK.shape
    with torch.no_grad(), torch.autocast(query_BHNK.device.type, enabled=False):
        key_BHKN = key_BHNK.float().transpose(-1, -2)
        sums_BN = key_BHKN.new_zeros(batch, tokens)
        for rows_BHNK in (query_BHNK.float() * scale).split(QUERIES_AT_ONCE, dim=2):
            sums_BN += (rows_BHNK @ key_BHKN).softmax(-1).sum((1, 2))
        return sums_BN / (heads * tokens)
